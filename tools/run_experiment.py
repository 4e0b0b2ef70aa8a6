#!/usr/bin/env python
"""Runs an experiment of the paper on any data, and writes its tables and figures.

    python tools/run_experiment.py experiment=figure3 data=ct_ich
    python tools/run_experiment.py experiment=figure4 data=own data.root=my/data jobs=2 \\
        hardware=gpu grid.method=[frcnn,csfrcnn] seeds=[0,1]
    python tools/run_experiment.py experiment=figure3 data=ct_ich report_only=true

In output/experiments/<data>/<experiment>/: a folder for each cell (a run of train_net.py), and of
the finished cells results.csv (all metrics of each), table.csv and table.md (mean and spread over
seeds), the figure as PNG and SVG, selected.json (figure3) and curves.csv (figure4).

A finished cell is not run again and one that was killed goes on, so the same command is given again
at will. A failed cell is reported, the others go on, and the exit code is 1. Ctrl-C and SIGTERM end
the trainings too.

Every setting is a key of Hydra: `++opts.SOLVER.MAX_ITER=1000` reaches train_net.py, `--cfg job`
shows all. One process runs all cells, jobs=N of them at a time, on GPUs each on the next one: this
needs no plugin. Hydra's launchers carry the cells elsewhere, each as a Hydra job with `cell=<i>`:

    python tools/run_experiment.py --multirun experiment=figure3 data=ct_ich \\
        hydra/launcher=submitit_slurm hydra.launcher.gpus_per_node=1
"""

import sys
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ich_det2.experiments.cells import run_cells
from ich_det2.experiments.experiment import build_cells, check_data, report

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
EXPERIMENTS = CONFIGS / "experiments"
TRAIN_NET = ROOT / "tools/train_net.py"


@hydra.main(version_base="1.3", config_path=str(EXPERIMENTS))
def run(cfg: DictConfig) -> None:
    """Runs the cells, or one of them; exits with 1 if one has failed, with 2 on a user's error."""
    failures = []
    try:
        cells = build_cells(cfg)
        if not cfg.report_only:
            check_data(cfg)
        if cfg.cell is not None:  # of a multirun, whose end reports
            run_cells([cells[cfg.cell]], TRAIN_NET)
            return
        if cells and not cfg.report_only:
            failures = run_cells(cells, TRAIN_NET, jobs=cfg.jobs)
        print(report(cfg, cells))
    except MissingMandatoryValue as error:
        _fail(f"{error.full_key} is not given, expected {error.full_key}=VALUE.")
    except (OSError, ValueError, OmegaConfBaseException) as error:
        _fail(error)
    if failures:
        raise SystemExit(1)


def main() -> None:
    """Translates experiment=NAME to Hydra's --config-name and runs Hydra."""
    known = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem != "base")
    given = [arg for arg in sys.argv[1:] if arg.startswith("experiment=")]
    if not given:
        print(f"{__doc__}\nexperiment: {', '.join(known)}")
        for group in ("data", "hardware"):
            choices = sorted(path.stem for path in (EXPERIMENTS / group).glob("*.yaml"))
            print(f"{group}: {', '.join(choices)}")
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    name = given[-1].removeprefix("experiment=")
    if name not in known:
        _fail(f"experiment is '{name}', expected one of {', '.join(known)}.")
    sys.argv.insert(sys.argv.index(given[-1]), f"configs={CONFIGS}")
    sys.argv[1:1] = ["--config-name", name]
    run()


def _fail(message) -> NoReturn:
    print(f"run_experiment.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
