"""From a diagnosis to a folder of DICOM files."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydicom import Dataset

from ..files import nested, replace_folder
from ..version import __version__
from .study import NOTICE, NoSegmentation, StudyDiagnosis, studies

if TYPE_CHECKING:
    from ..inference.results import Diagnosis

logger = logging.getLogger(__name__)

# What highdicom raises where it does not expect what a header says.
_UNFIT = (AttributeError, IndexError, KeyError, TypeError, ValueError)

KINDS = ("sr", "gsps", "sc", "kos")
"""Structured report, presentation state, Secondary Capture, Key Object Selection."""

ALL_KINDS = (*KINDS, "seg")
"""And, of a model that gives masks, Segmentation."""

SR_CLASSES = ("3d", "comprehensive")
"""Comprehensive 3D SR, which IHE's AI Results asks for, or Comprehensive SR for older viewers."""

INDEX = "objects.json"
"""Lists what was written, and for which study."""


def build_objects(
    study: StudyDiagnosis,
    kinds: Sequence[str] = KINDS,
    *,
    sr_class: str = "3d",
    previous: Sequence[Dataset] = (),
) -> Iterator[tuple[str, Dataset]]:
    """The objects of a study.

    Args:
        study: of :func:`studies`.
        kinds: of ``ALL_KINDS``.
        sr_class: of ``SR_CLASSES``.
        previous: reports of the study that the new one takes the place of.

    Yields:
        Kind and object, which ``save_as`` writes. A kind that cannot be made is left out, and said
        in the log, unless it is the only one.

    Raises:
        NoSegmentation: see :func:`build_segmentations`.
        ValueError: no kind can be made, or a header is not enough to be referred to.
    """
    # The library takes its time to be imported, and is an extra.
    from .capture import build_captures
    from .key_objects import build_key_objects
    from .presentation import build_presentations
    from .report import build_report
    from .segmentation import build_segmentations

    builders = {
        "sr": lambda: [build_report(study, sr_class, previous)],
        "gsps": lambda: build_presentations(study),
        "sc": lambda: build_captures(study),
        "kos": lambda: [build_key_objects(study)],
        "seg": lambda: build_segmentations(study),
    }
    failed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _ = study.headers  # what is wrong with one concerns all kinds
    for kind in kinds:
        try:
            with warnings.catch_warnings():
                # They would tell names of patients, such as those of one component.
                warnings.simplefilter("ignore", UserWarning)
                built = list(builders[kind]())
        except NoSegmentation:
            raise
        except _UNFIT as error:
            failed.append(kind)
            logger.warning("DICOM %s cannot be made (%s)", kind.upper(), type(error).__name__)
            continue
        yield from ((kind, each) for each in built)
    if failed and len(failed) == len(kinds):
        raise ValueError(
            f"DICOM {', '.join(failed).upper()} cannot be made of a study with such headers."
        )


def write_dicom(
    diagnosis: Diagnosis,
    folder: str | os.PathLike,
    kinds: Sequence[str] = KINDS,
    *,
    sr_class: str = "3d",
    force: bool = False,
) -> list[Path]:
    """Writes DICOM objects of a diagnosis, all or none. They carry the identity of their source.

    Args:
        diagnosis: of DICOM files.
        folder: a new one; it gets ``<patient>/<study>/<kind>-<number>.dcm`` and ``objects.json``,
            which also lists kinds that could not be made.
        kinds: of ``ALL_KINDS``.
        sr_class: of ``SR_CLASSES``.
        force: replace an earlier result of this function.

    Returns:
        The written files.

    Raises:
        ValueError: one sentence; see :func:`check_dicom_output` and :func:`studies`.
    """
    check_dicom_output(folder, diagnosis.inputs, kinds, sr_class=sr_class, force=force)
    folder, rows, failed = Path(folder), [], []
    with replace_folder(folder) as fresh:
        numbers: dict[str, int] = {}
        for study in studies(diagnosis):
            patient = study.patient.patient
            numbers[patient] = numbers.get(patient, 0) + 1
            place = Path(patient, f"study-{numbers[patient]:02d}")
            (fresh / place).mkdir(parents=True)
            count: dict[str, int] = {}
            for kind, built in build_objects(study, kinds, sr_class=sr_class):
                count[kind] = count.get(kind, 0) + 1
                file = place / f"{kind}-{count[kind]:03d}.dcm"
                built.save_as(fresh / file, enforce_file_format=True)
                rows.append(
                    {
                        "file": file.as_posix(),
                        "kind": kind,
                        "patient": patient,
                        "verdict": study.verdict,
                        "study_uid": built.StudyInstanceUID,
                        "series_uid": built.SeriesInstanceUID,
                        "sop_class_uid": built.SOPClassUID,
                        "sop_uid": built.SOPInstanceUID,
                    }
                )
            failed += [
                {"kind": kind, "folder": place.as_posix()}
                for kind in kinds
                if kind in KINDS and kind not in count
            ]
        index = {"tool": "ich_det2.dicom_out", "version": __version__, "notice": NOTICE}
        text = json.dumps({**index, "objects": rows, "not_made": failed}, indent=1)
        (fresh / INDEX).write_text(text + "\n", encoding="utf-8")
    return [folder / row["file"] for row in rows]


def check_dicom_output(
    folder: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    kinds: Sequence[str] = KINDS,
    *,
    sr_class: str = "3d",
    force: bool = False,
) -> None:
    """Refuses what could not be written, or would lose something, before hours of work.

    Raises:
        ValueError: one sentence with the remedy.
    """
    if unknown := [kind for kind in kinds if kind not in ALL_KINDS]:
        raise ValueError(f"DICOM objects {', '.join(unknown)}: expected {', '.join(ALL_KINDS)}.")
    if sr_class not in SR_CLASSES:
        raise ValueError(f"sr_class is {sr_class!r}, expected one of {', '.join(SR_CLASSES)}.")
    if importlib.util.find_spec("highdicom") is None:
        raise ValueError(
            "DICOM objects need highdicom, which is not installed; pip install 'ich_det2[dicom]'."
        )
    output = Path(folder)
    if path := nested(output, inputs):
        raise ValueError(
            f"The folder of DICOM objects {output} and {path.name} lie in one another, so that one"
            " would be taken for a part of the other; give a folder elsewhere."
        )
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; give a new folder for the DICOM objects.")
    if output.is_dir() and any(output.iterdir()) and not (force and (output / INDEX).is_file()):
        raise ValueError(
            f"{output}: holds something already; give a new folder for the DICOM objects"
            + (", or --force to replace them." if (output / INDEX).is_file() else ".")
        )
