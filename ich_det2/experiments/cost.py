"""What a trained model costs: its parameters, and CPU time and memory to score slices.

    python -m ich_det2.experiments.cost RUN DATASET NUM_SLICES

prints that of a run as JSON. It is a process of its own, so that the memory is not a training's.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog

from ..data import register_ich_datasets
from ..data.mapper import IchDatasetMapper
from ..engine.checkpoint import load_trained
from ..engine.config import dataset_settings
from ..engine.run_folder import RunFolder
from ..files import write_json

COSTS = ("million parameters", "CPU-seconds a slice", "peak memory, GB")


def read_cost(run: RunFolder, dataset: str, num_slices: int) -> dict[str, float]:
    """Measures a run, once: the numbers are kept in its folder.

    Args:
        run: with trained weights.
        dataset: registered name, of the run's own data.
        num_slices: the first ones of the data set are scored.

    Returns:
        ``COSTS`` -> number.

    Raises:
        RuntimeError: with the last line of what went wrong.
    """
    if not run.cost.is_file():
        command = [sys.executable, "-m", __name__, str(run.path), dataset, str(num_slices)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(f"{run.path}: its cost was not measured; the last line is: {last}")
        write_json(run.cost, json.loads(done.stdout.splitlines()[-1]))
    return json.loads(run.cost.read_text(encoding="utf-8"))


def measure(run: RunFolder, dataset: str, num_slices: int) -> dict[str, float]:
    """As :func:`read_cost`, in this process.

    Slices are read, mapped and scored one after the other by one thread on the CPU; the first is
    scored once before, since libraries set up then.
    """
    torch.set_num_threads(1)
    cfg = run.read_config("cpu")
    register_ich_datasets(cfg.DATASETS.ICH_ROOT, cfg.DATASETS.ICH_CLASSES, **dataset_settings(cfg))
    model = load_trained(cfg, run.weights())
    mapper = IchDatasetMapper(cfg, is_train=False)
    slices = list(itertools.islice(DatasetCatalog.get(dataset), num_slices))
    with torch.no_grad():
        model([mapper(slices[0])])
        start = time.process_time()
        for entry in slices:
            model([mapper(entry)])
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    unit = 1 if sys.platform == "darwin" else 1024
    return dict(zip(COSTS, (parameters / 1e6, seconds / len(slices), peak * unit / 1e9)))


if __name__ == "__main__":
    print(json.dumps(measure(RunFolder(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]))))
