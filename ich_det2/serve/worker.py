"""From a study on disk to an answer on disk."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import pydicom

from ..dicom_out import (
    ALL_KINDS,
    KINDS,
    NoSegmentation,
    StudyDiagnosis,
    build_objects,
    studies,
)
from ..inference.api import diagnose
from ..inference.diagnoser import Diagnoser
from ..inference.results import Diagnosis
from .config import ServeConfig
from .dicomweb import Dicomweb
from .journal import Journal, Study
from .log import study_key
from .points import reach
from .receiver import sync_folder, write_durably

logger = logging.getLogger(__name__)


class Worker:
    """Diagnoses studies that have been quiet, one after the other, by a model loaded once."""

    def __init__(self, cfg: ServeConfig, journal: Journal, model: Diagnoser):
        self._cfg, self._journal, self._model = cfg, journal, model
        complete = cfg.complete
        self._source = (
            Dicomweb(complete.qido, ca=complete.ca, token_file=complete.token_file)
            if complete.qido
            else None
        )
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        """Spent on diagnosing."""

    def work(self) -> int:
        """Answers what may be answered now; returns how many studies were tried."""
        tried = 0
        for study in self._journal.quiet_studies(self._cfg.complete.quiet_s):
            if self._waits(study) or self._journal.study(study.uid).version != study.version:
                continue  # it waits, or more of it came while others were diagnosed
            tried += 1
            self.answer(study)
        return tried

    def _waits(self, study: Study) -> bool:
        """Whether the source has more of a study, and the time to wait for it is not over."""
        if self._source is None:
            return False
        expected = study.expected
        try:
            expected = self._source.count_instances(study.uid)
        except Exception as error:  # a source that is down must not keep studies from an answer
            logger.warning("QIDO failed", extra={"reason": type(error).__name__})
        there = len(self._journal.instances(study.uid))
        waited = time.time() - study.last_at
        if expected is None or there >= expected or waited >= self._cfg.complete.wait_s:
            self._journal.set_expected(study.uid, expected, 0)
            return False
        pause = min(max(self._cfg.complete.quiet_s, 1.0), self._cfg.complete.wait_s - waited)
        self._journal.set_expected(study.uid, expected, time.time() + pause)
        return True

    def answer(self, study: Study) -> None:
        """Diagnoses a study, or notes why that is not possible and when it is tried again."""
        start, key = time.monotonic(), study_key(study.uid)
        try:
            verdict, complete, n_objects = self._answer(self._journal.study(study.uid))
        except Exception as error:
            # Whatever it is, the study stays in the journal, visibly failed.
            wait = backoff(self._cfg, study.attempts)
            reason = describe(error)
            self._journal.fail_study(study.uid, study.version, reason, time.time() + wait)
            self.counts["failed"] += 1
            logger.error(
                "study failed",
                extra={"study": key, "reason": type(error).__name__, "retry_s": round(wait, 1)},
                exc_info=not isinstance(error, (ValueError, OSError)),
            )
            return
        took = time.monotonic() - start
        self.seconds += took
        self.counts["answered"] += 1
        logger.info(
            "study answered",
            extra={
                "study": key,
                "verdict": verdict,
                "complete": complete,
                "objects": n_objects,
                "seconds": round(took, 2),
            },
        )

    def _answer(self, study: Study) -> tuple[str, bool, int]:
        cfg, journal = self._cfg, self._journal
        folder = cfg.root / "incoming" / study.uid
        diagnosis = diagnose(folder, self._model, threshold=cfg.threshold)
        reach("detected")
        expected = journal.study(study.uid).expected
        there = sum(Path(path).is_file() for path in journal.instances(study.uid))
        diagnosis = _with_missing(diagnosis, there, max(expected or 0, study.gone))
        wanted = {kind for d in cfg.send for kind in d.objects} or KINDS
        kinds = [kind for kind in ALL_KINDS if kind in wanted]
        previous = [pydicom.dcmread(p) for p in journal.last_reports(study.uid, study.version)]
        place = cfg.root / "results" / study.uid
        objects, verdicts, complete = [], [], True
        known = {Path(path).stem for path in journal.results(study.uid)}
        for part in studies(diagnosis):
            part = self._newest(part, known, previous)
            verdicts.append(part.verdict)
            complete = complete and part.n_lost == 0
            for kind, built in self._build(part, kinds, previous):
                path = place / f"{kind}-{built.SOPInstanceUID}.dcm"
                if not path.is_file():  # another try may have written it already
                    content = io.BytesIO()
                    built.save_as(content, enforce_file_format=True)
                    write_durably(path, content.getvalue())
                to = [d.name for d in cfg.send if kind in d.objects]
                objects.append((built.SOPInstanceUID, kind, os.fspath(path), to))
        reach("stored")
        verdict = max(verdicts, key=("absent", "undetermined", "present").index)
        journal.answer(study.uid, study.version, verdict, complete, objects)
        reach("answered")
        return verdict, complete, len(objects)

    def _newest(
        self, part: StudyDiagnosis, known: Set[str], previous: Sequence[pydicom.Dataset]
    ) -> StudyDiagnosis:
        """The part, as another answer where the same was given before, but not last: an archive
        would keep the one in between as the newest."""
        last = {f"sr-{ds.SOPInstanceUID}" for ds in previous}
        whole = (part.diagnosis, part.patient, part.study_uid, part.slices)
        for turn in itertools.count(1):
            name = f"sr-{part.uid('sr', self._cfg.sr_class, 1)}"
            if name not in known or name in last:
                return part
            part = _Again(*whole, turn)

    def _build(
        self, part: StudyDiagnosis, kinds: Sequence[str], previous: Sequence[pydicom.Dataset]
    ) -> Iterator[tuple[str, pydicom.Dataset]]:
        """The objects of a study; the others go without a segmentation that cannot be."""
        sr_class = self._cfg.sr_class
        previous = _others(previous, part.uid("sr", sr_class, 1))
        try:
            yield from build_objects(part, kinds, sr_class=sr_class, previous=previous)
        except NoSegmentation as error:  # which is the last kind
            self.counts["without_segmentation"] += 1
            why = str(error).partition(";")[0]  # what follows may tell what is in the files
            extra = {"study": study_key(part.study_uid), "reason": why}
            logger.warning("no segmentation", extra=extra)


@dataclass(frozen=True)
class _Again(StudyDiagnosis):
    """What was found in a study, once more after something else was found in it.

    Attributes:
        turn: how often before.
    """

    turn: int

    def uid(self, *what: str | int) -> str:
        return super().uid(*what, f"again {self.turn}")


def _with_missing(diagnosis: Diagnosis, there: int, expected: int) -> Diagnosis:
    """Says of each patient of a study that instances of it are missing, if they are."""
    missing = max(0, expected - there)
    patients = tuple(
        replace(p, n_slices_missing=max(p.n_slices_missing, missing)) for p in diagnosis.patients
    )
    return replace(diagnosis, patients=patients)


def _others(previous: Sequence[pydicom.Dataset], uid: str) -> list[pydicom.Dataset]:
    """Reports but the one of this UID, which is the same answer."""
    return [ds for ds in previous if ds.SOPInstanceUID != uid]


def backoff(cfg: ServeConfig, attempts: int) -> float:
    """Seconds to wait after so many failures before."""
    return min(cfg.retry_s * 2 ** min(attempts, 30), cfg.max_retry_s)


def describe(error: BaseException) -> str:
    """An error for the journal, which only its owner reads."""
    return f"{type(error).__name__}: {error}"[:500]


def clean(cfg: ServeConfig, journal: Journal) -> int:
    """Removes studies that are done and old, or too many; returns how many."""
    now, removed = time.time(), 0
    done = journal.removable()
    total = journal.totals()["bytes"]
    for study, at, size in done:
        old = now - at > cfg.keep.days * 86400
        if not old and total <= cfg.keep.max_gb * 2**30:
            break  # the rest is younger
        with journal.files:  # or what arrives meanwhile would be removed too
            paths = journal.forget(study)
            if paths is None:
                continue
            for path in paths:
                Path(path).unlink(missing_ok=True)
            for folder in (cfg.root / "incoming" / study, cfg.root / "results" / study):
                with contextlib.suppress(OSError):  # what is not the journal's is swept
                    folder.rmdir()
        total -= size
        removed += 1
        logger.info("study removed", extra={"study": study_key(study)})
    return removed


def sweep(cfg: ServeConfig, journal: Journal) -> int:
    """Removes files that no row of the journal names: those of a process that was killed.

    Only to be called before the receiver starts, since a file is on disk before it is in the
    journal. A folder that lacks files which the journal names is left as it is: something is wrong
    with it that a person should look at.
    """
    removed = 0
    for folder in (*(cfg.root / "incoming").glob("*"), *(cfg.root / "results").glob("*")):
        read = journal.instances if folder.parent.name == "incoming" else journal.results
        known = {Path(path).name for path in read(folder.name)}
        there = {path.name: path for path in folder.iterdir()}
        if lacking := known - there.keys():
            extra = {"study": study_key(folder.name), "files": len(lacking)}
            logger.error("files of the journal are not on disk", extra=extra)
            continue
        for name in there.keys() - known:
            there[name].unlink()
            removed += 1
        if not any(folder.iterdir()):
            folder.rmdir()
    sync_folder(cfg.root)
    return removed
