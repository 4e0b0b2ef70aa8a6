"""Many studies, one after the other or on many machines: a folder for each, and a table of all."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
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

_RECORD, _TABLE = "archive.json", "studies.csv"
_STATES = ".states"
"""Folder of a file for each study that is done: of which files; hidden ones, of that study's name,
are there while it is read. No study is named so."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)
# Of the settings, what changes nothing in the answers; the weights are known by their SHA-256.
_ANY = ("model", "output", "dicom_output", "device", "batch_size", "threads")
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError)
"""What is raised of a JSON file that is cut short or holds something else."""
_TRIES = 3
"""Of a study whose worker is lost, alone, before it counts as failed."""
_PATIENCE = 10
"""Seconds that a worker has to tidy up when it is stopped."""

_logger = logging.getLogger(__name__)


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
            if "\0" in name + place:
                raise ValueError(f"{path}: line {reader.line_num}: holds a NUL, which no path has.")
            if name.casefold() in (_RECORD, _TABLE):
                raise ValueError(
                    f"{path}: line {reader.line_num}: study {name!r} is the name of a file of the"
                    " archive itself; give another."
                )
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
        Rows of the jobs, in their order. In ``studies.csv`` are those of other studies of the
        folder that are done, too, and errors do not name paths and files of the input.

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
        place = Path(settings.dicom_output)
        if nested(place, [output]):
            raise ValueError(
                f"--dicom-output {place} and --output {output} lie in one another; give a folder"
                " elsewhere."
            )
        for job in jobs:
            check_dicom_output(
                place / job.name, job.paths, settings.dicom, sr_class=settings.sr_class, force=True
            )
    _open(output, settings, jobs)
    rows: dict[str, dict] = {}
    left = []
    for job in jobs:
        if row := _current(output, job):
            rows[job.name] = row
            progress(rows[job.name] | {"status": "skipped"})
        else:
            left.append(job)
    run = {"local": _run_local, "ray": _run_on_ray}[engine]
    try:
        with closing(run(left, settings, workers)) as found:
            for row in found:
                rows[row["study"]] = row
                progress(row)
    finally:
        known = [job for job in jobs if job.name in rows]
        ordered = [rows[job.name] for job in known]
        told = [
            row | {"error": _without_names(row["error"], job)}
            for row, job in zip(ordered, known, strict=True)
        ]
        write_csv(output / _TABLE, FIELDS, told + _others(output, {job.name for job in jobs}))
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
        try:
            before = dict(json.loads(record.read_text(encoding="utf-8")))
        except _DAMAGED as error:
            raise ValueError(
                f"{record}: is damaged ({error}), so it does not say of which model the results"
                " are; restore it from a copy, or give a new --output."
            ) from error
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


def _current(output: Path, job: Job) -> dict | None:
    """The row of a study that is done, of the files that are there now; or are not there any
    more."""
    if not (output / job.name / "diagnosis.json").is_file():
        return None
    try:
        row = _finished(output, job.name)
    except _DAMAGED as error:
        _logger.warning(
            "%s: diagnosis.json is damaged (%r); it is diagnosed anew.", job.name, error
        )
        return None
    state, stored = _state(job), output / _STATES / job.name
    same = state is None or stored.is_file() and stored.read_text(encoding="ascii") == state
    return row if same else None


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


def _mark(settings: Settings, job: Job) -> Path:
    """The file that is there while a study is read."""
    return Path(settings.output) / _STATES / f".{job.name}"


def _without_names(text: str, job: Job) -> str:
    """An error's text without the study's paths and the names of what is in them, which may tell
    who the patient is."""
    if not text:
        return text
    names = {}
    for path in map(Path, job.paths):
        for each in (path, *(path.rglob("*") if path.is_dir() else ())):
            names |= dict.fromkeys((each.name, each.stem), "a file of it")
            names[str(each.relative_to(path))] = "a file of it"
            names[str(each)] = names[os.path.realpath(each)] = "a file of it"
        names |= {str(path): "the input", os.path.realpath(path): "the input"}
    for name in sorted((n for n in names if n not in ("", ".") and n in text), key=len)[::-1]:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", names[name], text)
    return text


def _others(output: Path, names: Container[str]) -> list[dict]:
    """Rows of an earlier table, of studies of other names that are done and there."""
    try:
        with open(output / _TABLE, encoding="utf-8", newline="") as file:
            rows = [{k: row.get(k) or "" for k in FIELDS} for row in csv.DictReader(file)]
    except (OSError, ValueError, csv.Error):
        return []
    return [
        row
        for row in rows
        if row["status"] == "done"
        and row["study"] not in names
        and _NAME.fullmatch(row["study"])
        and (output / row["study"] / "diagnosis.json").is_file()
    ]


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
        mark = _mark(own, job)
        try:
            mark.parent.mkdir(exist_ok=True)
            mark.touch()  # stays if this process is killed
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
        finally:
            mark.unlink(missing_ok=True)
        return _finished(Path(own.output), job.name)

    def _write(self, job: Job, diagnosis: Diagnosis) -> None:
        own = self._settings
        if own.dicom:
            folder = Path(own.dicom_output) / job.name
            write_dicom(diagnosis, folder, own.dicom, sr_class=own.sr_class, force=True)
        folder = Path(own.output) / job.name
        if (folder / "diagnosis.json").is_file():
            try:
                _finished(folder.parent, job.name)
            except _DAMAGED:  # would not be replaced, since it is not known as a result
                shutil.rmtree(folder)
        diagnosis.write(folder, overlays=own.overlays, viewer=own.viewer, force=True)

    def _note(self, job: Job, state: str) -> None:
        """Says, at last, of which files the study is done."""
        with write_atomically(Path(self._settings.output) / _STATES / job.name) as file:
            file.write(state)


# ---- on this machine -----------------------------------------------------------------------------


def _run_local(jobs: Sequence[Job], settings: Settings, workers: int) -> Iterator[dict]:
    # What a process was lost at, in an earlier run or this one, comes last and alone.
    lost = [job for job in jobs if _mark(settings, job).exists()]
    rest = [job for job in jobs if job not in lost]
    if workers == 1 and rest:
        yield from map(Reader(settings), rest)
    else:
        for job, row in _in_workers(rest, settings, workers):
            if row is None:
                lost.append(job)
            else:
                yield row
    for job in lost:
        for _ in range(_TRIES):
            ((_, row),) = _in_workers([job], settings, 1)
            if row is not None:
                break
        yield row or _failed(job.name, RuntimeError(_LOST))


_LOST = (
    f"the process that read it was ended by the system {_TRIES} times, for want of memory perhaps."
)


def _in_workers(
    jobs: Sequence[Job], settings: Settings, workers: int
) -> Iterator[tuple[Job, dict | None]]:
    """Studies and their rows as they are done; None of one that its worker was lost at.

    Raises:
        ValueError: one sentence, if the model cannot be loaded.
    """
    context = get_context("spawn")  # not by fork, which a threaded PyTorch does not survive
    waiting, running = deque(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                pipe, theirs = context.Pipe()
                # The class by argument: a spawned process imports this module anew, and would not
                # know what stands in its place here.
                own = {"target": _work, "args": (theirs, Reader, settings), "daemon": True}
                worker = context.Process(**own)
                with _out_of_reach():
                    worker.start()
                theirs.close()
                _send(pipe, waiting[0])
                running[pipe] = worker, waiting.popleft(), False
            for pipe in wait(list(running)):
                worker, job, loaded = running[pipe]
                try:
                    told = pipe.recv()
                except (EOFError, OSError):
                    if not loaded:
                        raise ValueError(
                            "A worker was lost while it loaded the model, for want of memory"
                            " perhaps; give fewer --workers."
                        ) from None
                    del running[pipe]
                    _clear(settings, job)
                    yield job, None
                    continue
                if isinstance(told, Exception):
                    raise told
                if told is None:
                    running[pipe] = worker, job, True
                    continue
                if waiting:
                    _send(pipe, waiting[0])
                    running[pipe] = worker, waiting.popleft(), True
                else:
                    del running[pipe]
                    pipe.close()
                yield job, told
    finally:
        for worker, *_ in running.values():
            worker.terminate()
        for worker, job, _ in running.values():
            worker.join(_PATIENCE)
            worker.kill()
            worker.join()
            _clear(settings, job)


def _clear(settings: Settings, job: Job) -> None:
    """Removes what a process that was ended had half written of a study."""
    for folder in filter(None, (settings.output, settings.dicom_output)):
        for path in Path(folder).glob(f".{job.name}-????????"):  # as replace_folder names them
            shutil.rmtree(path, ignore_errors=True)


def _send(pipe: Connection, job: Job) -> None:
    with suppress(OSError):  # of a worker that is lost, which is noticed when it should answer
        pipe.send(job)


@contextmanager
def _out_of_reach():
    """Ctrl-C at a terminal reaches no process that is started here; its parent ends it then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, reader: Callable[[Settings], Reader], settings: Settings) -> None:
    """What a worker does: it says None, or why it has no model, then the row of each study."""
    # As by Ctrl-C, so that it leaves nothing half written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = None
    with suppress(EOFError, OSError, KeyboardInterrupt):  # there is no more, or nobody to ask
        try:
            read = reader(settings)
        except Exception as error:
            pipe.send(error)
            return
        pipe.send(None)
        while True:
            job = pipe.recv()
            pipe.send(read(job))
    if job is not None:  # an interrupt may fall into the cleaning up after another
        _clear(settings, job)


def _end_with_parent() -> None:
    parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(1)


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
