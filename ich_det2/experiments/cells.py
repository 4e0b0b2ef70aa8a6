"""Trainings as the cells of an experiment: run side by side, finished once, never mixed up.

A cell is one ``tools/train_net.py --resume`` in a folder of its own, which keeps its whole config,
so that a cell of other settings is not taken for it, and a mark when the training has ended well.
"""

import contextlib
import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from ..data.datasets import fingerprints, register_ich_datasets
from ..engine.config import dataset_settings, differences, load_config, plain_settings
from ..engine.partitions import names_of
from ..engine.run_folder import Fingerprints, RunFolder
from ..files import write_json

_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Cell:
    """A training and where it is.

    Attributes:
        folder: OUTPUT_DIR.
        config: config file.
        opts: keys of the config and their values.
        values: what tells it from the other cells: axis -> value.
    """

    folder: Path
    config: Path
    opts: Mapping[str, object]
    values: Mapping[str, object] = field(default_factory=dict)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def finished(self) -> bool:
        return self.run.done.is_file()

    def arguments(self) -> list[str]:
        """KEY VALUE pairs of the command line."""
        return [str(x) for pair in (*self.opts.items(), ("OUTPUT_DIR", self.folder)) for x in pair]

    def settings(self) -> dict:
        """The whole config as key -> value, but for where it runs.

        Raises:
            FileNotFoundError, ValueError: if config or keys are wrong.
        """
        return plain_settings(load_config(self.config, self.arguments()))


def check_cells(cells: Sequence[Cell]) -> None:
    """Compares cells with what is in their folders; keys that only one of both knows are left out,
    and so are data that are not there any more.

    Raises:
        FileNotFoundError, ValueError: if a config is wrong, or a folder holds a training of other
            settings, or of initial weights or data that have changed since.
    """
    read = cache(_read_data)  # cells share their data
    for cell in cells:
        cfg, run = load_config(cell.config, cell.arguments()), cell.run
        # A run that never reached a checkpoint has nothing to mix up.
        begun = cell.finished or run.checkpoint() is not None
        if not begun or not run.settings.is_file():
            continue
        before = json.loads(run.settings.read_text(encoding="utf-8"))
        differs = differences(before, plain_settings(cfg))
        differs = differs or run.changed_weights(cfg)
        root, classes = cfg.DATASETS.ICH_ROOT, tuple(cfg.DATASETS.ICH_CLASSES)
        if not differs and Path(root).is_dir():
            settings = tuple(dataset_settings(cfg).items())
            differs = run.changed_data(read(root, classes, settings, tuple(names_of(cfg))))
        for key, (trained, expected) in sorted(differs.items()):
            raise ValueError(
                f"{cell.folder}: was trained with {key} {trained!r}, expected {expected!r}; remove"
                " that folder to train it again, or give another output."
            )


def _read_data(
    root: str, classes: Sequence[str], settings: Sequence[tuple[str, object]], names: Sequence[str]
) -> Fingerprints:
    register_ich_datasets(root, classes, **dict(settings))
    return fingerprints(names)


def run_cells(cells: Sequence[Cell], train_net: Path, *, jobs: int = 1) -> list[str]:
    """Runs the cells that are not finished; a failure does not stop the others.

    On SIGINT and SIGTERM the trainings are ended too; they go on from their last checkpoints when
    the cells are run again. GPUs are handed out in turn, CPU cores divided.

    Args:
        cells: with different folders.
        train_net: the program.
        jobs: how many at a time.

    Returns:
        What went wrong, a sentence for each cell that failed.

    Raises:
        FileNotFoundError, ValueError: of :func:`check_cells`, before anything is started.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}, expected at least 1.")
    check_cells(cells)
    runner, failures = _Runner(train_net, jobs), []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with _exit_on_signals(), Progress(*columns) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("trainings", total=len(cells))
        try:
            for done in as_completed([pool.submit(runner.run, cell) for cell in cells]):
                progress.advance(task)
                if message := done.result():
                    failures.append(message)
                    progress.console.print(message, markup=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
            raise
    return failures


class _Runner:
    def __init__(self, train_net: Path, jobs: int):
        self._train_net = train_net
        self._threads = max(1, (os.cpu_count() or 1) // jobs)
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)
        self._lock, self._running, self._stopped = threading.Lock(), set(), False

    def run(self, cell: Cell) -> str | None:
        """Runs one cell unless it is finished; returns what went wrong, if anything."""
        slot = self._slots.get()
        try:
            return self._train(cell, slot)
        finally:
            self._slots.put(slot)

    def stop(self) -> None:
        """Ends what runs; nothing is started any more."""
        with self._lock:
            self._stopped, running = True, list(self._running)
        for process in running:
            _signal(process, signal.SIGTERM)
        for process in running:
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)

    def _train(self, cell: Cell, slot: int) -> str | None:
        cell.folder.mkdir(parents=True, exist_ok=True)
        with open(cell.run.terminal, "ab") as log:
            try:
                # The training inherits the lock: it holds as long as anything writes there.
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return f"{cell.folder}: is being trained by another process; left alone."
            if cell.finished:
                return None
            write_json(cell.run.settings, cell.settings())
            command = [sys.executable, str(self._train_net), "--resume"]
            command += ["--config-file", str(cell.config), *cell.arguments()]
            with self._lock:
                if self._stopped:
                    return None
                process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(slot),
                    start_new_session=True,  # so that its workers can be ended with it
                )
                self._running.add(process)
            code = process.wait()
            with self._lock:
                self._running.discard(process)
        if code:
            log = cell.run.terminal
            lines = log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            return f"{cell.folder}: exit code {code}; {log.name} there ends with '{last.strip()}'."
        cell.run.done.touch()
        return None

    def _environment(self, slot: int) -> dict[str, str]:
        environment = {"OMP_NUM_THREADS": str(self._threads), **os.environ}
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        devices = given.split(",") if given else [str(i) for i in range(count)]
        if count:
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return environment


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise SystemExit in the main thread; elsewhere nothing is changed."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, leave) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
