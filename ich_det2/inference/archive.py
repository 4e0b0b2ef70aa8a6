"""Many studies, one after the other or on many machines: a folder for each, and a table of all."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from ..dicom_out import check_dicom_output, write_dicom
from ..engine.config import plain_settings
from ..engine.operating_point import find_operating_point
from ..files import nested, sha256, walk, write_atomically, write_csv
from ..version import __version__
from . import ENGINES
from .api import diagnose
from .diagnoser import Diagnoser, load_run
from .results import Diagnosis

FIELDS = (
    *("study", "status", "patients", "n_slices", "n_slices_failed", "n_positive_slices"),
    *("score", "verdict", "complete", "error"),
)
"""Columns of ``studies.csv``."""

_RECORD = "archive.json"
_STATES = ".states"
"""Folder of a file for each study that is done: of which files. No study is named so."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)
# Of the settings, what changes nothing in the answers; the weights are known by their SHA-256.
_ANY = ("model", "output", "dicom_output", "device", "batch_size", "threads")
_TRIES = 3
"""Of a study whose worker is lost, before it counts as failed."""


@dataclass(frozen=True)
class Job:
    """A study to diagnose: the name of its folder, and its files or folders."""

    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """How all studies of an archive are diagnosed and written.

    Attributes:
        model: OUTPUT_DIR of a training, or ``zoo://NAME``.
        device, batch_size, backend, threads: as of ``Diagnoser.load``.
        threshold, identify, any_body_part: as of ``ich_det2.diagnose``.
        overlays, viewer: as of :meth:`Diagnosis.write`.
        dicom, sr_class: kinds of DICOM objects, of ``dicom_out``; they go to ``dicom_output``.
        output, dicom_output: folders that get one for each study.
    """

    model: str
    output: str
    device: str = ""
    batch_size: int | None = None
    backend: str = "eager"
    threads: int | None = None
    threshold: float | None = None
    identify: bool = False
    any_body_part: bool = False
    overlays: str = "positive"
    viewer: bool = False
    dicom: tuple[str, ...] = ()
    sr_class: str = "3d"
    dicom_output: str = ""


def read_manifest(path: str | Path) -> list[Job]:
    """Reads a CSV of studies.

    Args:
        path: of a file with the columns ``study`` (a name for its folder of results) and ``path``
            (a file or folder; relative to the CSV's folder). Rows of one study belong together.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one sentence that names the line.
    """
    path = Path(path)
    jobs: dict[str, list[str]] = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not {"study", "path"} <= {*(reader.fieldnames or ())}:
            raise ValueError(
                f"{path}: has the columns {reader.fieldnames}, expected study and path."
            )
        for row in reader:
            name, place = (row["study"] or "").strip(), (row["path"] or "").strip()
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{path}: line {reader.line_num}: study {name!r} is no name for a folder,"
                    " expected letters, digits and ._- in it."
                )
            if not place:
                raise ValueError(f"{path}: line {reader.line_num}: the path is missing.")
            jobs.setdefault(name, []).append(os.fspath(path.parent / place))
    if not jobs:
        raise ValueError(f"{path}: names no study.")
    folded = Counter(name.casefold() for name in jobs)
    if alike := [name for name in jobs if folded[name.casefold()] > 1]:
        raise ValueError(f"{path}: studies {', '.join(alike)} differ in case alone.")
    return [Job(name, tuple(paths)) for name, paths in jobs.items()]


def diagnose_archive(
    jobs: Sequence[Job],
    settings: Settings,
    *,
    engine: str = "local",
    workers: int = 1,
    progress: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Diagnoses studies; those that an earlier run has finished are not diagnosed again, unless
    their files have changed since: names, sizes or times of change.

    Each study is in ``output/<name>/`` whole or not at all. One that fails is noted with the
    reason, the others go on, and the next run tries it again.

    Args:
        jobs: of :func:`read_manifest`.
        settings: of all.
        engine: "local", or "ray" for a cluster that Ray knows of (else this machine).
        workers: that each load the model once.
        progress: is told the row of each study as it is done.

    Returns:
        Rows of ``studies.csv``, in the order of the jobs.

    Raises:
        ValueError: one sentence, if the output holds results of another model or other settings, or
            Ray is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}.")
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1.")
    output = Path(settings.output)
    if settings.dicom:
        for job in jobs:
            place = Path(settings.dicom_output)
            check_dicom_output(
                place / job.name, job.paths, settings.dicom, sr_class=settings.sr_class, force=True
            )
    _open(output, settings, jobs)
    rows: dict[str, dict] = {}
    left = []
    for job in jobs:
        if _is_current(output, job):
            rows[job.name] = _finished(output, job.name)
            progress(rows[job.name] | {"status": "skipped"})
        else:
            left.append(job)
    run = {"local": _run_local, "ray": _run_on_ray}[engine]
    try:
        for row in run(left, settings, workers):
            rows[row["study"]] = row
            progress(row)
    finally:
        ordered = [rows[job.name] for job in jobs if job.name in rows]
        write_csv(output / "studies.csv", FIELDS, ordered)
    return ordered


def _open(output: Path, settings: Settings, jobs: Sequence[Job]) -> None:
    """Makes the folder of results, or goes on in it.

    Raises:
        ValueError: it holds something else, or results of other settings.
    """
    cfg, weights = load_run(settings.model, device=settings.device)
    find_operating_point(cfg, weights)
    config = json.dumps(plain_settings(cfg), sort_keys=True).encode()
    if path := nested(output, (path for job in jobs for path in job.paths)):
        raise ValueError(
            f"--output {output} and the study {path.name} lie in one another; give a folder"
            " elsewhere."
        )
    own = {k: v for k, v in asdict(settings).items() if k not in _ANY}
    own |= {
        "version": __version__,
        "sha256": sha256(weights),
        "run": Path(cfg.OUTPUT_DIR).name,
        "operating_threshold": cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD,
        "config": hashlib.sha256(config).hexdigest(),
    }
    own = json.loads(json.dumps(own))
    record = output / _RECORD
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if differ := [k for k in own if before.get(k) != own[k]]:
            raise ValueError(
                f"{output}: was begun with another {differ[0]} ({before.get(differ[0])!r}, now"
                f" {own[differ[0]]!r}); give another --output."
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is not empty and holds no archive; give a new folder.")
    output.mkdir(parents=True, exist_ok=True)
    with write_atomically(record) as file:
        json.dump(own, file, indent=1)


def _is_current(output: Path, job: Job) -> bool:
    """Whether a study is done, of the files that are there now; or are not there any more."""
    if not (output / job.name / "diagnosis.json").is_file():
        return False
    state, stored = _state(job), output / _STATES / job.name
    return state is None or stored.is_file() and stored.read_text(encoding="ascii") == state


def _state(job: Job) -> str | None:
    """What changes with the names, sizes and times of a study's files; None without a path."""
    digest = hashlib.sha256()
    for path in map(Path, job.paths):
        if not path.exists():
            return None
        for file in walk(path) if path.is_dir() else [path]:
            about = file.stat()
            name = os.fsencode(os.path.relpath(file, path))
            digest.update(b"%s\0%d %d\n" % (name, about.st_size, about.st_mtime_ns))
    return digest.hexdigest()


def _finished(output: Path, name: str) -> dict:
    """The row of a study that is done."""
    text = (output / name / "diagnosis.json").read_text(encoding="utf-8")
    patients = json.loads(text)["patients"]
    return _row(name, patients, [p["complete"] for p in patients])


def _row(name: str, patients: Sequence[dict], complete: Sequence[bool]) -> dict:
    scores = [p["score"] for p in patients if p["score"] is not None]
    verdicts = [p["verdict"] for p in patients]
    order = ("negative", "undetermined", "positive")
    return {
        "study": name,
        "status": "done",
        "patients": len(patients),
        **{
            k: sum(p[k] for p in patients)
            for k in ("n_slices", "n_slices_failed", "n_positive_slices")
        },
        "score": f"{max(scores):.6f}" if scores else "",
        "verdict": max(verdicts, key=order.index),
        "complete": "yes" if all(complete) else "no",
        "error": "",
    }


def _failed(name: str, error: BaseException) -> dict:
    text = str(error) or type(error).__name__
    return dict.fromkeys(FIELDS, "") | {"study": name, "status": "failed", "error": text}


class Reader:
    """Diagnoses studies with a model that is loaded once."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._model = Diagnoser.load(
            settings.model,
            device=settings.device,
            batch_size=settings.batch_size,
            backend=settings.backend,
            threads=settings.threads,
        )

    def __call__(self, job: Job) -> dict:
        """Diagnoses and writes a study; returns its row, whatever happens to it."""
        own = self._settings
        try:
            state = _state(job)  # what changes while it is read is seen the next time
            diagnosis = diagnose(
                list(job.paths),
                self._model,
                threshold=own.threshold,
                identify=own.identify,
                any_body_part=own.any_body_part,
            )
            self._write(job, diagnosis)
            if state is not None:
                self._note(job, state)
        except Exception as error:  # one study ends no other
            return _failed(job.name, error)
        return _finished(Path(own.output), job.name)

    def _write(self, job: Job, diagnosis: Diagnosis) -> None:
        own = self._settings
        if own.dicom:
            folder = Path(own.dicom_output) / job.name
            write_dicom(diagnosis, folder, own.dicom, sr_class=own.sr_class, force=True)
        folder = Path(own.output) / job.name
        diagnosis.write(folder, overlays=own.overlays, viewer=own.viewer, force=True)

    def _note(self, job: Job, state: str) -> None:
        """Says, at last, of which files the study is done."""
        folder = Path(self._settings.output) / _STATES
        folder.mkdir(exist_ok=True)
        with write_atomically(folder / job.name) as file:
            file.write(state)


# ---- on this machine -----------------------------------------------------------------------------

_reader: Reader | None = None


def _load(settings: Settings) -> None:
    global _reader
    _reader = Reader(settings)


def _read(job: Job) -> dict:
    return _reader(job)


def _run_local(jobs: Sequence[Job], settings: Settings, workers: int) -> Iterator[dict]:
    if workers == 1:
        reader = Reader(settings) if jobs else None
        yield from map(reader, jobs)
        return
    # Not by fork, which a threaded PyTorch does not survive.
    left, tries = {job.name: job for job in jobs}, Counter()
    while left:
        try:
            with ProcessPoolExecutor(workers, get_context("spawn"), _load, (settings,)) as pool:
                waiting = {pool.submit(_read, job): job for job in left.values()}
                for future in as_completed(waiting):
                    row = future.result()
                    left.pop(row["study"])
                    yield row
        except BrokenProcessPool as error:
            # A worker was killed, for want of memory perhaps; the rest goes on with new ones.
            tries["pool"] += 1
            if tries["pool"] >= _TRIES:
                for job in left.values():
                    yield _failed(job.name, error)
                return


# ---- on many -------------------------------------------------------------------------------------


def _run_on_ray(jobs: Sequence[Job], settings: Settings, workers: int) -> Iterator[dict]:
    with _ray() as ray:
        # An actor that is lost is started anew, and its study tried again.
        actor = ray.remote(max_restarts=-1, max_task_retries=_TRIES)(Reader)
        readers = [actor.remote(settings) for _ in range(min(workers, len(jobs)))]
        waiting, running = list(reversed(jobs)), {}
        for reader in readers:
            job = waiting.pop()
            running[reader.__call__.remote(job)] = reader, job
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            reader, job = running.pop(done)
            try:
                row = ray.get(done)
            except ray.exceptions.RayError as error:
                row = _failed(job.name, error)
            if waiting:
                following = waiting.pop()
                running[reader.__call__.remote(following)] = reader, following
            yield row


@contextmanager
def _ray():
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "engine ray needs Ray, which is not installed; pip install 'ich_det2[ray]'."
        ) from error
    started = not ray.is_initialized()
    if started:
        # The cluster that RAY_ADDRESS names, else this machine.
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or "local",
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()
