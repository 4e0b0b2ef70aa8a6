#!/usr/bin/env python
"""Measures this project against what it stands on, both in one run.

    python tools/benchmark.py train-step --size 320 --batch 4 --steps 30
    python tools/benchmark.py configs --size 512
    python tools/benchmark.py diagnosis --images 1000000 --thresholds 99
    python tools/benchmark.py read-slices path/to/series --rounds 20
    python tools/benchmark.py diagnose --backends eager openvino
    python tools/benchmark.py growth --studies 1 2 4 8 --slices 10 20 40 80
    python tools/benchmark.py loader --data path/to/voc_tree --workers 0 1 2

train-step: against stock Detectron2. configs: seconds and peak memory of a training step of each
config, in a process of its own, from random weights with nothing frozen; classifiers scale the
slices to their own input. diagnosis: at many thresholds against a loop over scikit-learn's metrics,
with the same numbers as result. read-slices: a windowed slice against pydicom's pixel_array,
apply_rescale and a float64 window, once where the C library gives the memory of each array back, as
in a process that has just begun, and once where it keeps it, as it comes to do in long ones.
diagnose: CPU-seconds from files to scores against Detectron2's DefaultPredictor behind pydicom,
slice by slice, as shipped (800 px) and at the model's own pixels, with the same scores. growth: the
same over the number of studies and of a study's slices, and the straight lines through it. loader:
slices per second of the training loader. What is compared is timed in turn, so that a machine whose
speed wanders slows both; quote the ratio, not the seconds.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ich_det2.cli import guard, keep_freed_memory, quiet_imports

with quiet_imports():
    import numpy as np
    import pydicom
    import torch
    from detectron2.engine import DefaultPredictor
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage
    from pydicom.pixels import apply_rescale
    from sklearn import metrics as sk
    from tabulate import tabulate

    import ich_det2
    from ich_det2.anchors import Anchors
    from ich_det2.data import register_ich_datasets
    from ich_det2.data.cache import SliceCache
    from ich_det2.data.dicom import apply_window, read_hu, read_series, read_windowed
    from ich_det2.engine import IchTrainer
    from ich_det2.engine.anchors import anchor_settings
    from ich_det2.engine.checks import thaw_without_weights
    from ich_det2.engine.config import dataset_settings, load_config
    from ich_det2.engine.run_folder import RunFolder
    from ich_det2.evaluation.diagnosis import (
        confusion_at_thresholds,
        diagnosis_metrics,
        group_scores,
        roc_auc_score,
    )
    from ich_det2.evaluation.intervals import bootstrap_by_group
    from ich_det2.inference import BACKENDS
    from ich_det2.inference.diagnoser import Diagnoser
    from ich_det2.phantom import write_exam

SIZES, RATIOS = [[32.0, 64.0, 128.0]], [[0.5, 1.0, 2.0]]
# What glibc does with the memory of arrays of some megabytes; other C libraries do not read it.
HEAPS = {
    "given back": "glibc.malloc.mmap_threshold=131072",
    "kept": "glibc.malloc.mmap_threshold=134217728:glibc.malloc.trim_threshold=268435456",
}
STOCK = ["MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "MODEL.RPN.HEAD_NAME", "StandardRPNHead"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("train-step", help="forward, backward and update of one batch")
    step.add_argument("--config-file", default="configs/csfrcnn_effnet_lite0.yaml", metavar="FILE")
    step.add_argument("--size", type=int, default=320, help="square input, pixels")
    step.add_argument("--batch", type=int, default=4, help="images per step")
    step.add_argument("--steps", type=int, default=30, help="timed steps of each")
    step.add_argument("--warmup", type=int, default=3, help="steps before, not timed")
    step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    step.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    step.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    step.set_defaults(run=train_step)
    each = commands.add_parser("configs", help="time and memory of a training step of each config")
    each.add_argument(
        "configs", nargs="*", type=Path, metavar="FILE", help="default: all of configs/"
    )
    each.add_argument("--size", type=int, default=512, help="square input, pixels")
    each.add_argument("--batch", type=int, default=1, help="images per step")
    each.add_argument("--steps", type=int, default=5, help="timed steps of each")
    each.add_argument("--warmup", type=int, default=1, help="steps before, not timed")
    each.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    each.set_defaults(run=configs)
    curves = commands.add_parser("diagnosis", help="metrics at many thresholds, and the bootstrap")
    curves.add_argument("--images", type=int, default=1_000_000)
    curves.add_argument("--patients", type=int, default=50_000)
    curves.add_argument("--thresholds", type=int, default=99)
    curves.add_argument("--bootstrap-images", type=int, default=20_000)
    curves.add_argument("--bootstrap-patients", type=int, default=1_000)
    curves.add_argument("--resamples", type=int, default=2_000)
    curves.set_defaults(run=diagnosis)
    read = commands.add_parser("read-slices", help="DICOM files to windowed slices")
    read.add_argument("folder", type=Path, metavar="FOLDER", help="of CT series")
    read.add_argument("--rounds", type=int, default=20, help="timed passes over the files")
    read.add_argument(
        "--window", type=float, nargs=2, default=(50, 100), metavar=("LEVEL", "WIDTH")
    )
    read.add_argument("--memory", choices=HEAPS, help=argparse.SUPPRESS)  # of this process
    read.set_defaults(run=read_slices)
    whole = commands.add_parser(
        "diagnose", help="studies from files to scores, by DefaultPredictor"
    )
    default = "configs/csfrcnn_effnet_lite0.yaml"
    whole.add_argument("--config-file", default=default, metavar="FILE")
    whole.add_argument("--studies", type=int, default=3, help="of the phantom")
    whole.add_argument("--slices", type=int, default=30, help="of a study")
    whole.add_argument("--size", type=int, default=512, help="rows and columns, pixels")
    whole.add_argument("--backends", nargs="+", default=["eager"], choices=BACKENDS)
    whole.add_argument("--rounds", type=int, default=3, help="timed passes")
    whole.add_argument("--threads", type=int, default=1)
    whole.set_defaults(run=diagnose)
    more = commands.add_parser("growth", help="diagnosis over the number of studies and slices")
    more.add_argument("--config-file", default=default, metavar="FILE")
    more.add_argument("--studies", type=int, nargs="+", default=[1, 2, 4, 8], help="of 10 slices")
    more.add_argument("--slices", type=int, nargs="+", default=[10, 20, 40, 80], help="of a study")
    more.add_argument("--size", type=int, default=512, help="rows and columns, pixels")
    more.add_argument("--rounds", type=int, default=3, help="timed passes")
    more.add_argument("--threads", type=int, default=1)
    more.set_defaults(run=growth)
    feed = commands.add_parser("loader", help="the training loader, by number of workers")
    feed.add_argument("--data", type=Path, required=True, help="VOC tree with ImageSets")
    feed.add_argument("--config-file", default="configs/csfrcnn_r50.yaml", metavar="FILE")
    feed.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    feed.add_argument("--batches", type=int, default=30, help="timed batches")
    feed.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    feed.set_defaults(run=loader)
    return parser.parse_args(argv)


def synthetic_batch(
    size: int, batch: int, seed: int = 0, *, sequence_slices: int = 0, scan_slices: int = 0
) -> list[dict]:
    """Images of noise, every other one with two boxes, as half of the slices bleed.

    With ``sequence_slices`` or ``scan_slices`` each stands among copies of itself.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for i in range(batch):
        instances = Instances((size, size))
        boxes = torch.tensor([[0.2, 0.3, 0.45, 0.5], [0.6, 0.55, 0.7, 0.75]]) * size
        boxes = boxes if i % 2 == 0 else boxes[:0]
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
        image = torch.rand(3, size, size, generator=generator) * 255
        example = {"image": image, "instances": instances, "height": size, "width": size}
        example["image_label"] = int(len(boxes) > 0)
        if sequence_slices:
            example["sequence"] = image.repeat(2 * sequence_slices + 1, 1, 1, 1)
        if scan_slices:
            example["scan"] = image.repeat(scan_slices, 1, 1, 1)
        inputs.append(example)
    return inputs


class TrainStep:
    """One model and its optimizer, as a callable that does one step."""

    def __init__(self, cfg, inputs: list[dict]):
        torch.manual_seed(0)
        self.model = build_model(cfg).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6, momentum=0.9)
        self.inputs = inputs

    def __call__(self) -> None:
        losses = sum(self.model(self.inputs).values())
        self.optimizer.zero_grad()
        losses.backward()
        self.optimizer.step()


def interleave(
    steps: dict, rounds: int, warmup: int, device: str, clock=time.perf_counter
) -> dict[str, list[float]]:
    """Times callables in turn; the one that goes first alternates.

    Returns:
        Seconds of each call by name.
    """
    seconds = {name: [] for name in steps}
    for i in range(warmup + rounds):
        order = list(steps) if i % 2 == 0 else list(steps)[::-1]
        for name in order:
            if device != "cpu":
                torch.cuda.synchronize()
            start = clock()
            steps[name]()
            if device != "cpu":
                torch.cuda.synchronize()
            if i >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def train_step(args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    common = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", ""]
    common += ["MODEL.ANCHOR_GENERATOR.SIZES", str(SIZES)]
    common += ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", str(RATIOS), *args.opts]
    cost_sensitive = load_config(args.config_file, common)
    plain_heads = cost_sensitive.MODEL.ROI_HEADS.NAME.replace("CostSensitiveROI", "StandardROI")
    plain_heads = plain_heads.replace("CostSensitiveRes5", "Res5")
    stock = load_config(args.config_file, [*common, *STOCK, "MODEL.ROI_HEADS.NAME", plain_heads])
    screened = cost_sensitive.clone()
    screened.MODEL.RPN.SAMPLER.NMS_THRESH = 0.7
    inputs = synthetic_batch(args.size, args.batch)
    with EventStorage():
        steps = {
            "stock Detectron2": TrainStep(stock, inputs),
            "cost-sensitive": TrainStep(cost_sensitive, inputs),
            "cost-sensitive, NMS screening": TrainStep(screened, inputs),
        }
        seconds = interleave(steps, args.steps, args.warmup, args.device)
    rows = compare(seconds, "stock Detectron2")
    print(
        f"{platform.processor() or platform.machine()}, {args.device}, {torch.get_num_threads()}"
        f" threads, torch {torch.__version__}; {args.config_file}, {args.batch} x {args.size} px,"
        f" {args.steps} steps each in turn"
    )
    headers = ["", "median s", "min s", "ratio, median of pairs", "ratio of minima"]
    print(tabulate(rows, headers, floatfmt=".4f", tablefmt="github"))


def configs(args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    files = args.configs or sorted(Path("configs").glob("[a-z]*_*.yaml"))
    if not files:
        raise ValueError("there is no config in configs/ here; name config files.")
    rows = []
    # Spawned anew for each, since the peak is the process's own, and never falls.
    spawn = multiprocessing.get_context("spawn")
    for file in files:
        options = file, args.size, args.batch, args.steps, args.warmup, torch.get_num_threads()
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            try:
                rows.append([file.name, *process.submit(measure_config, *options).result()])
                print(*rows[-1], file=sys.stderr)
            except BrokenProcessPool as error:
                raise ValueError(f"{file}: its process was killed; out of memory?") from error
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__};"
        f" {args.batch} x {args.size} px, {args.steps} steps, random weights, nothing frozen"
    )
    headers = ["config", "parameters, millions", "median s", "min s", "mean CPU s", "peak GiB"]
    floats = ("", ".1f", ".2f", ".2f", ".2f", ".2f")
    print(tabulate(rows, headers, floatfmt=floats, tablefmt="github"))


def measure_config(file: Path, size: int, batch: int, steps: int, warmup: int, threads: int):
    """Parameters in millions; a step's median, least and CPU seconds; this process's peak in GiB.

    CPU seconds are those of all threads together, which other programs on the machine change less.
    """
    keep_freed_memory()  # as tools/train_net.py
    torch.set_num_threads(threads)
    cfg = load_config(file, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    thaw_without_weights(cfg)
    # As many anchors, on as many levels, as clustering would give.
    sizes = np.geomspace(16, 256, cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.NUM_SIZES)
    cfg.MODEL.ANCHOR_GENERATOR.update(anchor_settings(cfg, Anchors(tuple(sizes), tuple(RATIOS[0]))))
    with EventStorage():
        more = {key.lower(): cfg.INPUT[key] for key in ("SEQUENCE_SLICES", "SCAN_SLICES")}
        inputs = synthetic_batch(size, batch, **more)
        step = TrainStep(cfg, inputs)
        for _ in range(warmup):
            step()
        start = time.process_time()
        (seconds,) = interleave({"": step}, steps, 0, "cpu").values()
        cpu_seconds = (time.process_time() - start) / steps
    parameters = sum(p.numel() for p in step.model.parameters()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    peak /= 2**30 if sys.platform == "darwin" else 2**20
    return parameters, statistics.median(seconds), min(seconds), cpu_seconds, peak


def cpu_name() -> str:
    """The processor's model where Linux tells it, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


SKLEARN = {
    "accuracy": sk.accuracy_score,
    "recall": sk.recall_score,
    "precision": sk.precision_score,
    "specificity": lambda y, p: sk.recall_score(y, p, pos_label=0),
    "npv": lambda y, p: sk.precision_score(y, p, pos_label=0),
    "f1": sk.f1_score,
    "f2": lambda y, p: sk.fbeta_score(y, p, beta=2),
    "balanced_accuracy": sk.balanced_accuracy_score,
    "mcc": sk.matthews_corrcoef,
}


def timed(function):
    """A function's result and its seconds."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def diagnosis(args) -> None:
    rng = np.random.default_rng(0)

    def cases(n, patients):
        y_true = rng.integers(0, 2, n)
        score = np.clip(0.3 * y_true + 0.7 * rng.random(n), 0, 1)
        return y_true, score, rng.integers(0, patients, n)

    y_true, score, patient = cases(args.images, args.patients)
    thresholds = np.linspace(0, 1, args.thresholds + 2)[1:-1]

    def by_patient():
        _, label, patient_score = group_scores(patient, y_true, score)
        return diagnosis_metrics(**confusion_at_thresholds(label, patient_score, thresholds))

    ours, seconds = timed(
        lambda: diagnosis_metrics(**confusion_at_thresholds(y_true, score, thresholds))
    )
    _, patient_seconds = timed(by_patient)
    theirs, loop = timed(
        lambda: [
            {name: f(y_true, (score >= t).astype(int)) for name, f in SKLEARN.items()}
            for t in thresholds
        ]
    )
    difference = max(
        abs(ours[name][i] - value) for i, row in enumerate(theirs) for name, value in row.items()
    )
    y_boot, s_boot, p_boot = cases(args.bootstrap_images, args.bootstrap_patients)

    def statistic(weights):
        counts = confusion_at_thresholds(y_boot, s_boot, [0.5], weights)
        metrics = diagnosis_metrics(**counts)
        return [roc_auc_score(y_boot, s_boot, weights), *(m[:, 0] for m in metrics.values())]

    _, bootstrap = timed(lambda: bootstrap_by_group(statistic, p_boot, n_resamples=args.resamples))
    what = f"{args.images} images x {args.thresholds} thresholds"
    rows = [
        [f"{what}, all metrics", seconds],
        [f"the same by {args.patients} patients, with the patients' scores", patient_seconds],
        [f"{what}, a loop over scikit-learn's {len(SKLEARN)} metrics", loop],
        [
            f"{args.resamples} bootstraps over patients of {args.bootstrap_images} images,"
            " AUC and all metrics",
            bootstrap,
        ],
    ]
    print(f"{platform.processor() or platform.machine()}, NumPy {np.__version__}")
    print(tabulate(rows, ["", "s"], floatfmt=".3f", tablefmt="github"))
    print(f"loop / ours: {loop / seconds:.0f}; largest difference {difference:.1e}")


def read_slices(args) -> None:
    if args.memory is None:  # it can only be chosen for a new process
        for memory, tunables in HEAPS.items():
            command = [sys.executable, __file__, "read-slices", str(args.folder)]
            command += ["--rounds", str(args.rounds), "--window", *map(str, args.window)]
            done = subprocess.run(
                [*command, "--memory", memory], env={**os.environ, "GLIBC_TUNABLES": tunables}
            )
            if done.returncode:
                sys.exit(done.returncode)
        return
    series, _ = read_series(args.folder)
    paths = {"compressed": [], "uncompressed": []}
    for path in dict.fromkeys(path for s in series for path in s.files):
        syntax = pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
        paths["compressed" if syntax.is_compressed else "uncompressed"].append(path)
    window = level, width = args.window
    low = level - width / 2

    def plainly(path):
        dataset = pydicom.dcmread(path)
        hu = apply_rescale(dataset.pixel_array, dataset).astype(np.float64)
        return np.clip((hu - low) / width, 0, 1)

    def window_in_place(path):
        hu = read_hu(path)
        return apply_window(hu, level, width, out=hu)

    with tempfile.TemporaryDirectory() as folder:
        cache = SliceCache(folder)
        ways = {
            "pydicom, float64 window": plainly,
            "read_hu, apply_window in place": window_in_place,
            "read_windowed (8 bit)": lambda path: read_windowed(path, [window]),
            "the same from the cache": lambda path: read_windowed(path, [window], cache=cache),
        }
        for kind, files in paths.items():
            if not files:
                continue
            if kind == "uncompressed":  # which the cache does not keep
                del ways["the same from the cache"]
            steps = {name: _Each(way, files) for name, way in ways.items()}
            # CPU time, which other programs on the machine change less than the time on the wall.
            seconds = interleave(steps, args.rounds, 1, "cpu", time.process_time)
            rows = compare(
                {name: [t / len(files) for t in times] for name, times in seconds.items()},
                "pydicom, float64 window",
            )
            for row in rows:
                row[1:] = row[1] * 1e3, row[2] * 1e3, 1 / row[3], 1 / row[4]
            worst = max(
                np.abs(plainly(path) - apply_window(read_hu(path), level, width)).max()
                for path in files
            )
            print(
                f"{len(files)} {kind} slices, memory {args.memory}; largest difference of the"
                f" window {worst:.1e}"
            )
            headers = ["", "median ms", "min ms", "times as fast", "by the minima"]
            print(tabulate(rows, headers, floatfmt=".2f", tablefmt="github"))


class _Each:
    """Calls a function for each file and lets go of what it returns."""

    def __init__(self, way, files):
        self.way, self.files = way, files

    def __call__(self) -> None:
        for path in self.files:
            self.way(path)


def diagnose(args) -> None:
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        studies = write_studies(folder / "studies", args.studies, args.slices, args.size)
        cfg = untrained_run(args.config_file, folder / "run")
        shipped = cfg.clone()
        shipped.INPUT.MIN_SIZE_TEST, shipped.INPUT.MAX_SIZE_TEST = 800, 1333
        scores: dict[str, dict[str, float]] = {}

        def by_predictor(name: str, cfg):
            predictor = DefaultPredictor(cfg)

            def run() -> None:
                found = scores[name] = {}
                for path in sorted(path for study in studies for path in study.iterdir()):
                    ds = pydicom.dcmread(path)
                    (window,) = cfg.INPUT.WINDOWS
                    grey = np.rint(255 * apply_window(apply_rescale(ds.pixel_array, ds), *window))
                    image = np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
                    instances = predictor(image)["instances"]
                    found[ds.SOPInstanceUID] = float(instances.scores.max())

            return run

        def by_diagnoser(backend: str):
            model = Diagnoser.load(
                folder / "run", device="cpu", backend=backend, threads=args.threads
            )

            def run() -> None:
                found = scores[f"ich_det2, {backend}"] = {}
                for study in studies:
                    for s in ich_det2.diagnose(study, model).slices:
                        found[s.source.identity.sop_uid] = s.score

            return run

        ways = {
            "DefaultPredictor as shipped, 800 px": by_predictor("shipped", shipped),
            "DefaultPredictor": by_predictor("predictor", cfg),
            **{f"ich_det2, {b}": by_diagnoser(b) for b in args.backends},
        }
        seconds = interleave(ways, args.rounds, 1, "cpu", clock=time.process_time)
    for backend in args.backends:
        own, wanted = scores[f"ich_det2, {backend}"], scores["predictor"]
        differ = max(abs(own[uid] - score) for uid, score in wanted.items())
        print(f"{backend}: largest difference of a slice's score {differ:.1e}")
    n = args.studies * args.slices
    each = {name: [s / n for s in times] for name, times in seconds.items()}
    print(
        f"{cpu_name()}, {args.threads} thread(s), torch {torch.__version__}; {args.config_file} of"
        f" random weights, {args.studies} studies of {args.slices} slices of {args.size} px,"
        f" {args.rounds} rounds; CPU-seconds a slice"
    )
    headers = ["", "median s", "min s", "ratio, median of pairs", "ratio of minima"]
    rows = compare(each, "DefaultPredictor")
    print(tabulate(rows, headers, floatfmt=".4f", tablefmt="github"))


def growth(args) -> None:
    torch.set_num_threads(args.threads)
    groups = {
        "studies": {n: (n, 10) for n in args.studies},
        "slices": {n: (1, n) for n in args.slices},
    }
    sizes = list(dict.fromkeys(size for group in groups.values() for size in group.values()))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        untrained_run(args.config_file, folder / "run")
        model = Diagnoser.load(folder / "run", device="cpu", threads=args.threads)

        def diagnosing(number: int, slices: int):
            studies = write_studies(folder / f"{number}x{slices}", number, slices, args.size)
            return lambda: [ich_det2.diagnose(study, model) for study in studies]

        ways = {size: diagnosing(*size) for size in sizes}
        seconds = interleave(ways, args.rounds, 1, "cpu", clock=time.process_time)
    best = {size: min(times) for size, times in seconds.items()}
    print(
        f"{cpu_name()}, {args.threads} thread(s), torch {torch.__version__}; {args.config_file} of"
        f" random weights, slices of {args.size} px, least CPU-seconds of {args.rounds} rounds"
    )
    rows = [[n, m, s, s / (n * m)] for (n, m), s in best.items()]
    print(tabulate(rows, ["studies", "slices of each", "s", "s a slice"], "github", ".3f"))
    for name, group in groups.items():
        times = [best[size] for size in group.values()]
        slope, start = np.polyfit(list(group), times, 1)
        off = max(abs(start + slope * n - s) / s for n, s in zip(group, times))
        print(f"over {name}: {start:.3f} s + {slope:.4f} s each, at most {off:.1%} off that line")


def write_studies(folder: Path, number: int, slices: int, size: int) -> list[Path]:
    """Phantom studies of so many slices, those of an exam again and again at new places."""
    studies = []
    for i in range(number):
        study = folder / str(i)
        exam = [pydicom.dcmread(path) for path in write_exam(folder / "exam", seed=i, size=size)]
        study.mkdir(parents=True)
        for k in range(slices):
            ds = exam[k % len(exam)]
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.{i}.{k + 1}"
            x, y, _ = ds.ImagePositionPatient
            ds.ImagePositionPatient, ds.InstanceNumber = [x, y, 5.0 * k], k + 1
            ds.save_as(study / f"{k:03d}.dcm")
        shutil.rmtree(folder / "exam")
        studies.append(study)
    return studies


def untrained_run(config_file: str, folder: Path):
    """What a training of a config would leave, of random weights; returns the config."""
    anchors = ["MODEL.ANCHOR_GENERATOR.SIZES", str(SIZES)]
    anchors += ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", str(RATIOS)]
    cfg = load_config(config_file, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *anchors])
    cfg.OUTPUT_DIR, cfg.DATASETS.TEST = str(folder), ()
    folder.mkdir()
    torch.manual_seed(0)
    model = build_model(cfg)
    run = RunFolder(folder)
    cfg.MODEL.WEIGHTS = str(run.final)
    torch.save({"model": model.state_dict()}, run.final)
    run.config.write_text(cfg.dump())
    return cfg


def loader(args) -> None:
    rows = []
    for workers in args.workers:
        opts = ["DATASETS.ICH_ROOT", str(args.data), "DATALOADER.NUM_WORKERS", str(workers)]
        cfg = load_config(args.config_file, [*opts, "SEED", "1", *args.opts])
        register_ich_datasets(args.data, cfg.DATASETS.ICH_CLASSES, **dataset_settings(cfg))
        batches = iter(IchTrainer.build_train_loader(cfg))
        # What workers have read ahead is not counted.
        for _ in range(2 + 2 * workers):
            next(batches)
        start = time.perf_counter()
        count = sum(len(next(batches)) for _ in range(args.batches))
        rows.append([workers, count / (time.perf_counter() - start)])
        del batches
    print(
        f"{args.data.name}, {args.config_file}, batches of {cfg.SOLVER.IMS_PER_BATCH}, shorter side"
        f" {list(cfg.INPUT.MIN_SIZE_TRAIN)} px, {os.cpu_count()} CPUs"
    )
    print(tabulate(rows, ["workers", "slices/s"], floatfmt=".1f", tablefmt="github"))


def compare(seconds: dict[str, list[float]], base: str) -> list[list]:
    """Rows of name, median and minimum, and both as ratios to those of ``base``."""
    return [
        [
            name,
            statistics.median(times),
            min(times),
            statistics.median(a / b for a, b in zip(times, seconds[base])),
            min(times) / min(seconds[base]),
        ]
        for name, times in seconds.items()
    ]


def main(argv=None) -> int:
    args = parse_args(argv)
    return guard("benchmark.py", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
