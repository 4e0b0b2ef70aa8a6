"""A trained model on files from disk: which slices there are, and what the model finds on them.

Sizes: H, W are an image's rows and columns, M its boxes.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image

from ..data.context import last_number, read_places
from ..data.dicom import CT_STORAGE, may_be_head, neighbours, read_series, sort_frames
from ..data.splits import IMAGE_FOLDERS, read_patients

IMAGE_SUFFIXES = IMAGE_FOLDERS["JPEGImages"]
REMOVED = "[removed]"
"""Stands in file names for what would tell whose they are."""

_HEADER = (
    "SOPClassUID",
    "Modality",
    "ImageType",
    "PatientID",
    "PatientName",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "BodyPartExamined",
)


@dataclass(frozen=True)
class Slice:
    """A slice to diagnose.

    Attributes:
        path: where it is.
        file: its path under the given folder, or its name; fit to be written down.
        patient, series: pseudonyms, "patient-001" and "series-01" (of that patient).
        index: 0-based; along the slice normal in a DICOM series, else by file name.
        given: named by the user, not found in a folder.
        patient_id, series_uid, sop_uid: as in the header; empty where there is none.
        frame: 0-based, in a file of several; else None.
        context_files: file and frame of the slices before, this one and those after; empty if it is
            not known where the slice lies.
    """

    path: Path
    file: str
    patient: str
    series: str
    index: int
    given: bool
    patient_id: str
    series_uid: str
    sop_uid: str
    frame: int | None = None
    context_files: tuple[tuple[str, int | None], ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A file in a folder that is not diagnosed.

    Attributes:
        file: as in :class:`Slice`.
        reason: in words.
        lost: whether it is, or may be, a slice that a reader would have to look at.
        patients: pseudonyms of those who may have lost it.
    """

    file: str
    reason: str
    lost: bool = False
    patients: tuple[str, ...] = ()


def find_slices(
    inputs: Sequence[str | os.PathLike],
    *,
    identify: bool = False,
    context: int = 1,
    by_name: bool = False,
) -> tuple[list[Slice], list[Skipped]]:
    """Finds the CT slices in files and folders; reads headers only.

    A patient is, in this order: who ``patients.csv`` of a VOC tree says; the Patient ID; the
    study, where there is no Patient ID; the file itself. It is numbered by (Patient ID, Study
    Instance UID).

    Args:
        inputs: DICOM files, PNG or JPEG files, and folders of them.
        identify: keep names and IDs of patients and UIDs in ``file``.
        context: neighbours on either side in ``context_files``.
        by_name: as in ``data.context.find_context``.

    Returns:
        The slices by patient, series and position, and the files of folders that are none.

    Raises:
        FileNotFoundError, ValueError: one sentence that names a given file that cannot be read, or
            saying that there is no slice.
    """
    _read_tree.cache_clear()
    found: list[_Found] = []
    skipped: list[_Found] = []
    inputs = [Path(path) for path in inputs]
    given = {path.resolve() for path in inputs if not path.is_dir()}
    for folder in (path for path in inputs if path.is_dir()):
        new, bad = _find_in_folder(folder)
        found += new
        skipped += bad
    found += _find_given([path for path in inputs if not path.is_dir()])

    # Several inputs may hold the same file, or the same image in different files.
    images: dict[tuple, _Found] = {}
    unique: dict[tuple, _Found] = {}
    for entry in found:
        resolved = entry.path.resolve()
        uid = entry.header["SOPInstanceUID"]
        first = images.setdefault((uid or str(resolved), entry.frame), entry)
        if first is entry:
            unique[resolved, entry.frame] = entry
        elif (resolved, entry.frame) not in unique:
            entry.reason = f"repeats the image {first.file} (SOP Instance UID)."
            skipped.append(entry)
    skipped = {entry.path.resolve(): entry for entry in skipped}
    used = {path for path, _ in unique}
    skipped = [entry for path, entry in skipped.items() if path not in used]
    uids = {uid for uid, _ in images}
    unique = list(unique.values())
    if not unique:
        raise ValueError(_nothing_found(inputs, skipped))

    # A file that looks like a slice but does not say whose may be of any patient beside it.
    beside: dict[Path, set[tuple]] = {}
    for entry in unique:
        beside.setdefault(entry.path.parent, set()).add(entry.patient_key)
    kinds = {(entry.path.parent, entry.suffix) for entry in unique}
    owners: list[tuple[_Found, bool, set[tuple]]] = []
    for entry in skipped:
        alike = entry.is_blank and (entry.path.parent, entry.suffix) in kinds
        lost = (entry.looks_like_slice or alike) and entry.header["SOPInstanceUID"] not in uids
        keys = beside.get(entry.path.parent, set()) if entry.is_blank else {entry.patient_key}
        owners.append((entry, lost, keys if lost else set()))

    order: dict[tuple, tuple] = {}
    for entry in unique:
        order.setdefault(entry.patient_key, entry.order_key)
        order[entry.patient_key] = min(order[entry.patient_key], entry.order_key)
    for entry, _, keys in owners:
        for key in keys:
            order.setdefault(key, entry.order_key)
    patients = {
        key: f"patient-{i:03d}" for i, key in enumerate(sorted(order, key=order.get), start=1)
    }
    remove = (lambda text: text) if identify else _remover(unique + skipped)

    groups: dict[tuple, dict[tuple, list[_Found]]] = {}
    for entry in unique:
        groups.setdefault(entry.patient_key, {}).setdefault(entry.series_key, []).append(entry)
    slices = []
    for key in patients:
        series = sorted(groups.get(key, {}).items())
        for number, (_, entries) in enumerate(series, start=1):
            positions = [entry.position for entry in entries]
            if by_name and np.isnan(positions).all():
                positions = [last_number(entry.path.stem) for entry in entries]
            beside = [[]] * len(entries)
            if not np.isnan(positions).any():
                # Several inputs may hold a series, and pictures be named in any order.
                entries = [entries[i] for i in np.argsort(positions, kind="stable")]
                beside = neighbours(sorted(positions), context)
            for index, entry in enumerate(entries):
                slices.append(
                    Slice(
                        path=entry.path,
                        file=remove(entry.file),
                        patient=patients[key],
                        series=f"series-{number:02d}",
                        index=index,
                        given=entry.path.resolve() in given,
                        patient_id=entry.header["PatientID"] or entry.listed_patient,
                        series_uid=entry.header["SeriesInstanceUID"],
                        sop_uid=entry.header["SOPInstanceUID"],
                        frame=entry.frame,
                        context_files=tuple(
                            (os.fspath(entries[i].path), entries[i].frame) for i in beside[index]
                        ),
                    )
                )
    return slices, [
        Skipped(
            remove(entry.file),
            remove(entry.reason),
            lost=lost,
            patients=tuple(sorted(patients[key] for key in keys)),
        )
        for entry, lost, keys in owners
    ]


class _Found:
    """A file on the way to a :class:`Slice` or a :class:`Skipped`."""

    def __init__(
        self,
        path: Path,
        folder: Path | None,
        *,
        group: int = 0,
        reason: str = "",
        frame: int | None = None,
        position: float = math.nan,
    ):
        """
        Args:
            path: the file.
            folder: the given folder in which it was found.
            group: tells series of one UID apart.
            reason: why it is skipped.
            frame: in a file of several.
            position: along the slice normal, mm.
        """
        self.path = path
        self.frame, self.position = frame, position
        name = path.name if folder is None else path.relative_to(folder).as_posix()
        # Names of files need not be text.
        self.file = os.fsencode(name).decode("utf-8", "replace")
        if frame is not None:
            self.file += f"#{frame + 1}"
        self.reason = reason
        self.is_image = path.suffix.lower() in IMAGE_SUFFIXES
        self.header = dict.fromkeys(_HEADER, "") if self.is_image else _read_header(path)
        self.listed_patient, listed_place, tree = _listed(path)
        # Without a header there is no telling what it is, nor whose.
        self.is_blank = not (self.is_image or any(self.header.values()))
        # The end of a UID, as of a file exported by a PACS, is no suffix.
        self.suffix = "" if path.suffix[1:].isdigit() else path.suffix.lower()

        study, series = self.header["StudyInstanceUID"], self.header["SeriesInstanceUID"]
        if self.is_image and not math.isnan(listed_place[1]):
            series, self.position = listed_place
        itself = _natural(os.fspath(path))
        if self.listed_patient:
            self.patient_key = ("listed", tree, self.listed_patient)
        elif self.is_image:
            self.patient_key = ("file", os.fspath(path))
        else:
            # As in training: without Patient ID the study stands for the patient.
            patient = self.header["PatientID"]
            self.patient_key = ("header", patient or study or series or os.fspath(path))
        patient = self.listed_patient or self.header["PatientID"]
        self.order_key = (_natural(patient), study, series, itself)
        # Images without a header are one series per folder.
        self.series_key = (study, series, os.fspath(path.parent) if self.is_image else "", group)

    @property
    def looks_like_slice(self) -> bool:
        """Whether the file says that it is a slice, by its header or else by its name."""
        if self.is_image or self.is_blank:
            return self.is_image or self.suffix in IMAGE_FOLDERS["DICOM"]
        return (
            self.header["Modality"] in ("", "CT")
            and self.header["SOPClassUID"] in ("", *CT_STORAGE)
            and "LOCALIZER" not in self.header["ImageType"].upper()
            and may_be_head(self.header["BodyPartExamined"])
        )


def _find_in_folder(folder: Path) -> tuple[list[_Found], list[_Found]]:
    series, unusable = read_series(folder)
    found = [
        _Found(path, folder, group=i, frame=frame, position=position)
        for i, s in enumerate(series)
        for path, frame, position in zip(s.files, s.frames, s.positions_mm, strict=True)
    ]
    images, skipped = [], []
    root = folder.resolve()
    for path, reason in unusable:
        # Links out of the folder are not followed, as in `read_series`.
        within = path.is_file() and path.resolve().is_relative_to(root)
        if within and path.suffix.lower() in IMAGE_SUFFIXES:
            reason = _image_fault(path)
        (skipped if reason else images).append(_Found(path, folder, reason=reason))
    return found + sorted(images, key=lambda entry: _natural(entry.file)), skipped


def _find_given(paths: Sequence[Path]) -> list[_Found]:
    """Raises: FileNotFoundError, ValueError: naming the first file that cannot be read."""
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; check the path.")
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if fault := _image_fault(path):
                raise ValueError(f"{path}: {fault}")
            found.append(_Found(path, None))
        else:
            slices = sort_frames(path)
            found += [_Found(path, None, frame=f, position=position) for f, position in slices]
    # Files of one series may be given one by one; `read_series` takes folders alone.
    return sorted(found, key=lambda e: (np.nan_to_num(e.position), _natural(e.file)))


def _image_fault(path: Path) -> str:
    """Why the header of a PNG or JPEG is refused; empty if it is not."""
    try:
        with Image.open(path) as image:
            mode = image.mode
    except Exception as error:  # Pillow answers damage with many kinds of errors
        return f"cannot be read as an image ({_reason(error, path)})."
    if mode.startswith(("I", "F")):
        return f"has pixels of more than 8 bit (mode {mode}), expected a windowed 8-bit image."
    return ""


def _read_header(path: Path) -> dict:
    """What a DICOM header tells for grouping; empty strings where it does not."""
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER))
    except Exception:  # no DICOM, or damaged in any way
        return dict.fromkeys(_HEADER, "")
    header = {}
    for keyword in _HEADER:
        try:
            value = dataset.get(keyword)
            header[keyword] = "" if value is None else str(value).strip()
        except Exception:  # pydicom converts on access
            header[keyword] = ""
    header["SOPClassUID"] = header["SOPClassUID"] or str(
        dataset.file_meta.get("MediaStorageSOPClassUID", "")
    )
    return header


@cache
def _read_tree(tree: Path) -> tuple[dict, dict]:
    return read_patients(tree), read_places(tree)


def _listed(path: Path) -> tuple[str, tuple[str, float], str]:
    """Patient and place by ``patients.csv`` of the VOC tree that an image is in, and the tree."""
    folder = path.absolute().parent
    if folder.name not in IMAGE_FOLDERS:
        return "", ("", math.nan), ""
    patients, places = _read_tree(folder.parent)
    patient, _ = patients.get(path.stem, ("", ""))
    return patient, places.get(path.stem, ("", math.nan)), os.fspath(folder.parent)


def _remover(entries: Iterable[_Found]):
    """A function that takes identities out of names of files and of reasons.

    Exports name files after the SOP Instance UID, and folders after the patient.
    """
    words = set()
    for entry in entries:
        name = re.split(r"[\^=,\s]+", entry.header["PatientName"])
        words |= {w for w in (entry.header["PatientID"], "".join(name), *name) if len(w) > 2}
    # Whole words in any case; what is longer goes first. A UID is digits with four points or more.
    known = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    pattern = r"\d+(?:\.\d+){4,}" + (rf"|(?<![^\W_])(?:{known})(?![^\W_])" if known else "")
    return lambda text: re.sub(pattern, REMOVED, text, flags=re.IGNORECASE)


def _nothing_found(inputs: Sequence[Path], skipped: Sequence[_Found]) -> str:
    where = ", ".join(str(path) for path in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
    if not skipped:
        return f"{where}: holds no file; expected CT slices (DICOM, PNG or JPEG)."
    return (
        f"{where}: none of {len(skipped)} files is a readable CT slice; the first, "
        f"{skipped[0].file}, {skipped[0].reason.rstrip('.')}."
    )


def _natural(text: str) -> tuple:
    """Sorts "slice_9" before "slice_10"."""
    return tuple((int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"([0-9]+)", text))


def _reason(error: Exception, path: Path, *others: Path) -> str:
    """An error's first line without the path of a file, which says where a user's data are."""
    text = (str(error).splitlines() or [type(error).__name__])[0].strip()
    text = text.removeprefix(f"{path}: ").removeprefix(f"{path} ")
    for known in (path, *others):
        text = text.replace(os.fspath(known.absolute()), known.name)
        text = text.replace(os.fspath(known), known.name)
    return text
