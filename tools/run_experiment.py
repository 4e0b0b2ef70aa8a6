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

import os
import sys
from pathlib import Path

from ich_det2.cli import guard, quiet_imports

with quiet_imports():
    import hydra
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import DictConfig
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from ich_det2.experiments.cells import run_cells
    from ich_det2.experiments.experiment import build_cells, check_data, check_settings, report

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
EXPERIMENTS = CONFIGS / "experiments"
TRAIN_NET = ROOT / "tools/train_net.py"


@hydra.main(version_base="1.3", config_path=str(EXPERIMENTS))
def run(cfg: DictConfig) -> None:
    """Runs the cells, or one of them; exits with 1 if one has failed, with 2 on a user's error."""
    exit_with(lambda: run_all(cfg))  # Hydra tells more than one sentence of an error


def run_all(cfg: DictConfig) -> int:
    """Runs the cells, or one of them, and reports; returns the exit code."""
    failures = []
    check_settings(cfg, EXPERIMENTS)
    cells = build_cells(cfg)
    if not cfg.report_only:
        check_data(cfg)
    if cfg.cell is not None:  # of a multirun, whose end reports
        if cfg.cell not in range(len(cells)):
            raise ValueError(f"cell is {cfg.cell!r}, expected a number from 0 to {len(cells) - 1}.")
        run_cells([cells[cfg.cell]], TRAIN_NET)
        return 0
    if cells and not cfg.report_only:
        failures = run_cells(cells, TRAIN_NET, jobs=cfg.jobs)
    print(report(cfg, cells))
    return 1 if failures else 0


def run_hydra() -> None:
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
        raise ValueError(f"experiment is '{name}', expected one of {', '.join(known)}.")
    sys.argv.insert(sys.argv.index(given[-1]), f"configs={CONFIGS}")
    sys.argv[1:1] = ["--config-name", name]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of to the terminal
    run()


def exit_with(call) -> None:
    """Raises SystemExit with the exit code of what is called, unless that is 0."""

    def translate():
        try:
            return call()
        except MissingMandatoryValue as error:
            raise ValueError(
                f"{error.full_key} is not given, expected {error.full_key}=VALUE."
            ) from error
        except (HydraException, OmegaConfBaseException) as error:
            what = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
            raise ValueError(what + " ".join(str(error).split())) from error

    again = "what is trained stays, and the same command goes on."
    if code := guard("run_experiment.py", translate, interrupted=again):
        raise SystemExit(code)


def main() -> None:
    """Runs the command; raises SystemExit with the exit code, unless that is 0."""
    exit_with(run_hydra)


if __name__ == "__main__":
    main()
