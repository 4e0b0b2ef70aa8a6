"""CT series: the slices of files, grouped and in anatomical order.

Sections "C.x" are of DICOM PS3.3.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ...files import sha256, walk
from .body_part import may_be_head
from .elements import Attributes, label
from .header import Header, find_other_kind, naming, printable, read_headers
from .identity import Identity, group_patients
from .pixels import read_hu

_SAME_MM = 1e-2
"""Slices nearer to each other than this lie at one position."""

_AXIAL = math.cos(math.radians(45))
"""Least cosine between the normal of an axial slice and the patient's long axis; a gantry tilts by
up to 30 degrees."""


@dataclass(frozen=True)
class CTSlice:
    """A slice of a file: the file, its header, and where the slice lies."""

    path: Path
    header: Header

    @property
    def frame(self) -> int | None:
        """0-based; None in a file of a single slice."""
        return self.header.frame if self.header.frames > 1 else None

    @cached_property
    def directions(self) -> np.ndarray | None:
        """(2, 3): unit vectors along a row and a column."""
        directions = np.array(self.header.values.numbers("ImageOrientationPatient"))
        if directions.size != 6:
            return None
        directions = directions.reshape(2, 3)
        lengths = np.linalg.norm(directions, axis=1)
        if not np.allclose(lengths, 1, atol=0.01) or abs(directions[0] @ directions[1]) > 0.01:
            return None
        return directions / lengths[:, None]

    @cached_property
    def position_mm(self) -> float:
        """Along the slice normal, row x column direction; NaN where the file does not say."""
        position = np.array(self.header.values.numbers("ImagePositionPatient"))
        if position.size != 3 or self.directions is None:
            return math.nan
        return float(position @ np.cross(*self.directions))

    @property
    def is_axial(self) -> bool:
        """Also where nothing says otherwise."""
        if self.directions is None:
            image_type = self.header.values.text("ImageType").upper()
            return not any(word in image_type for word in ("CORONAL", "SAGITTAL"))
        return bool(abs(np.cross(*self.directions)[2]) >= _AXIAL)

    @property
    def place(self) -> tuple:
        """Equal for slices that may be the same image."""
        values = self.header.values
        geometry = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        return (
            values.text("SOPInstanceUID"),
            (self.header.rows, self.header.columns),
            *map(values.numbers, geometry),
        )


@dataclass(frozen=True)
class CTFile:
    """What a file holds, read once.

    Attributes:
        path: the file.
        values: of its header, as far as it can be read.
        slices: those that may be of the head.
        fault: why there are none; empty if there are.
        excluded: whether the file is whole, but of what nobody looks for: a localizer, a knee.
    """

    path: Path
    values: Attributes = field(default_factory=Attributes)
    slices: tuple[CTSlice, ...] = ()
    fault: str = ""
    excluded: bool = False

    @property
    def identity(self) -> Identity:
        return Identity.of(self.values)

    @property
    def may_be_slice(self) -> bool:
        """Whether the header says that there is a slice that may be of the head."""
        return not self.excluded and not find_other_kind(self.values)


@dataclass(frozen=True)
class Finding:
    """What a person should know of a series.

    Attributes:
        text: with ``{}`` for the name of each slice.
        slices: which these are, indices into ``CTSeries.files``.
    """

    text: str
    slices: tuple[int, ...] = ()

    def words(self, names: Sequence[str]) -> str:
        """The text, with these names of the series' slices."""
        first, *rest = self.text.split("{}", len(self.slices))
        return first + "".join(names[i] + part for i, part in zip(self.slices, rest, strict=True))


@dataclass(frozen=True)
class CTSeries:
    """The slices of one CT series in anatomical order.

    Attributes:
        files: the file of each slice, ascending along the slice normal (row x column direction):
            from the feet to the head for an ordinary axial series.
        series_uid, study_uid, patient_id: as in the files; empty where a file does not say.
        spacing_mm: distance of neighbouring slices along the normal (the median, or the slice
            thickness of a single slice), of rows, and of columns; NaN where the files do not say.
        frames: the frame of each slice in its file, 0-based; None in a file of a single slice.
        positions_mm: of each slice along the normal; all NaN where a file does not say.
        findings: missing slices, several at one position, pixels that are not square, another
            orientation than the usual, broken attributes, doubtful identities.
        n_missing: slices that seem to be missing between those that are there.
        is_axial: False for coronal and sagittal series.
        patient: what tells the patient from others, see ``group_patients``.
    """

    files: tuple[Path, ...]
    series_uid: str
    study_uid: str
    patient_id: str
    spacing_mm: tuple[float, float, float]
    frames: tuple[int | None, ...]
    positions_mm: tuple[float, ...]
    findings: tuple[Finding, ...] = ()
    n_missing: int = 0
    is_axial: bool = True
    patient: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """The findings in words, with file names, which may tell whose they are."""
        names = [
            path.name if frame is None else f"{path.name} frame {frame + 1}"
            for path, frame in zip(self.files, self.frames)
        ]
        return tuple(finding.words(names) for finding in self.findings)


def read_series(
    folder: str | os.PathLike, *, any_body_part: bool = False
) -> tuple[list[CTSeries], list[tuple[Path, str]]]:
    """Find the CT series in a folder and its subfolders.

    Slices are grouped by patient, study and Series Instance UID, and sorted by Image Position
    projected on the slice normal (C.7.6.2.1.1), never by file name or Instance Number. A series
    that holds several orientations, or slices without a position beside others, gives one
    ``CTSeries`` each. Only headers are read, but for images that may be one. Hidden files are left
    out, and links out of the folder not followed.

    Args:
        folder: the folder to search.
        any_body_part: whatever Body Part Examined says.

    Returns:
        ``(series, skipped)``: the series ordered by patient, study and series UID; and pairs of
        path and reason for every other file, ordered by path: not DICOM, not CT, no head,
        localizers, reports, repeats, unreadable.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: ``folder`` is a file.
    """
    skipped: list[tuple[Path, str]] = []
    files = [read_file(path, any_body_part=any_body_part) for path in walk(Path(folder), skipped)]
    skipped += [(file.path, file.fault) for file in files if file.fault]
    files = [file for file in files if not file.fault]
    patients, warnings = group_patients([file.identity for file in files])
    series, repeats = group_series(files, patients, warnings)
    for path, first in repeats.items():
        skipped.append((path, f"repeats the image {first.relative_to(folder)}."))
    return series, sorted(skipped)


def read_file(path: str | os.PathLike, *, any_body_part: bool = False) -> CTFile:
    """Read the headers in a file; what is wrong with it is in the result, nothing is raised.

    Args:
        path: of any file.
        any_body_part: whatever Body Part Examined says.
    """
    path = Path(path)
    seen: list[Attributes] = []
    try:
        with naming(path), open(path, "rb") as file:
            headers = read_headers(file, seen)
    except (ValueError, FileNotFoundError) as error:
        values = seen[0] if seen else Attributes()
        return CTFile(path, values, fault=str(error).removeprefix(f"{path}: "))
    values, fault = headers[0].values, ""
    slices = tuple(CTSlice(path, header) for header in headers if header.is_slice)
    part = values.text("BodyPartExamined")
    if not slices:
        kind = values.text("ImageType").upper()
        what = "localizer (scout)" if "LOCALIZER" in kind else "report or screen"
        fault = f"is a {what}, not a slice."
    elif not any_body_part and not may_be_head(part):
        fault = f"{label('BodyPartExamined')} is {printable(part)}, expected a head."
    return CTFile(path, values, () if fault else slices, fault, excluded=bool(fault))


def group_series(
    files: Sequence[CTFile], patients: Sequence[str], warnings: Mapping[str, str] = {}
) -> tuple[list[CTSeries], dict[Path, Path]]:
    """Group the slices of files, and put them in order.

    One SOP Instance UID is no proof of one image: files that share it and differ in their pixels or
    in their place are different images. Those that differ in neither are one, which is kept once.

    Args:
        files: N files without a fault.
        patients: N keys that tell patients apart, see ``group_patients``.
        warnings: of ``group_patients``, by key.

    Returns:
        The series, ordered by patient, study and series UID; and for each file that repeats another
        of its series that file.
    """
    groups: dict[tuple, list[CTFile]] = defaultdict(list)
    for file, patient in zip(files, patients, strict=True):
        uid = file.identity.series_uid or os.fspath(file.path.parent)
        groups[patient, file.identity.study_uid, uid].append(file)
    repeats = {path: first for group in groups.values() for path, first in _repeats(group)}
    used = Counter(f.identity.sop_uid for f in files if f.path not in repeats)
    series = []
    for (patient, _, _), group in groups.items():
        group = [file for file in group if file.path not in repeats]
        general = [Finding(warnings[patient])] if patient in warnings else []
        shared = {f.identity.sop_uid for f in group if used[f.identity.sop_uid] > 1} - {""}
        if shared:
            count, uids = sum(used[uid] for uid in shared), f"{len(shared)} SOP Instance UIDs"
            uids = "one SOP Instance UID" if len(shared) == 1 else uids
            general.append(Finding(f"{count} files share {uids}"))
        parts = _split([s for file in group for s in file.slices])
        series += [_sort_series(part, patient, general) for part in parts]
    series.sort(key=lambda s: (s.patient_id, s.study_uid, s.series_uid))
    return series, repeats


def read_place(path: str | os.PathLike) -> tuple[str, float]:
    """Where the slice of a file lies.

    Returns:
        What tells its series from all others (Patient ID, Study and Series Instance UID, for not
        all who take identities out of files keep UIDs unique), and the position along the slice
        normal in mm; empty and NaN where the file does not say.

    Raises:
        FileNotFoundError, ValueError: as ``read_hu``.
    """
    with naming(path), open(path, "rb") as file:
        entry = CTSlice(Path(path), read_headers(file)[0])
    keys = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
    patient, study, series = map(entry.header.values.text, keys)
    return "\n".join((patient, study, series)) if series else "", entry.position_mm


def read_spacing(path: str | os.PathLike) -> tuple[float, float]:
    """Distance of rows and of columns of a slice (of the first frame), mm; NaN where the file does
    not say. Errors as ``read_hu``."""
    with naming(path), open(path, "rb") as file:
        return read_headers(file)[0].spacing_mm


def read_plane(path: str | os.PathLike) -> np.ndarray | None:
    """Where the pixels of a slice lie in the patient (C.7.6.2.1.1).

    Returns:
        (3, 4), mm to the patient's left, to the back and to the head: the steps from a pixel to the
        next in a row, in a column, and through the slice (Slice Thickness along the normal), and
        the middle of the first pixel; None where the file does not say.

    Raises:
        FileNotFoundError, ValueError: as ``read_hu``.
    """
    with naming(path), open(path, "rb") as file:
        entry = CTSlice(Path(path), read_headers(file)[0])
    rows, columns = entry.header.spacing_mm
    if math.isnan(entry.position_mm) or math.isnan(rows) or entry.directions is None:
        return None
    along_row, along_column = entry.directions
    thickness = entry.header.values.number("SliceThickness") or 1.0
    normal = np.cross(along_row, along_column)
    first = np.array(entry.header.values.numbers("ImagePositionPatient"))
    # Rows are so far apart as pixels of a column, and the other way round.
    steps = along_row * columns, along_column * rows, normal * thickness
    return np.stack([*steps, first], axis=1)


def pixel_ratio(spacing_mm: tuple[float, float]) -> float:
    """Height of a slice's pixels over their width: 1 if nearly so, or where it is not known.

    Args:
        spacing_mm: of rows and of columns.
    """
    rows, columns = spacing_mm
    ratio = rows / columns if rows > 0 else 1.0
    return ratio if abs(ratio - 1) > 0.01 else 1.0


def neighbours(positions_mm: Sequence[float], reach: int = 1) -> np.ndarray:
    """The slices before and after each slice of a series, for channels of context.

    A slice further away than one and a half times the usual distance of this series' slices is no
    neighbour; nor is there one beyond the ends. The nearest slice in its place stands in.

    Args:
        positions_mm: of N slices along the normal, in any order.
        reach: neighbours on either side, C.

    Returns:
        int (N, 2 C + 1), indices into ``positions_mm``; column C is the slice itself.
    """
    positions = np.asarray(positions_mm, dtype=float)
    order = np.argsort(positions, kind="stable")
    gaps = np.diff(positions[order])
    usual = np.median(gaps[gaps > _SAME_MM]) if (gaps > _SAME_MM).any() else 0.0
    table = np.empty((len(order), 2 * reach + 1), dtype=int)
    for place, index in enumerate(order):
        table[index, reach] = index
        for step in (-1, 1):
            at = place
            for column in range(1, reach + 1):
                after = at + step
                if 0 <= after < len(order) and gaps[min(at, after)] <= 1.5 * usual:
                    at = after
                table[index, reach + step * column] = order[at]
    return table


def evenly_spaced(positions_mm: Sequence[float], count: int) -> np.ndarray:
    """Slices at even distances over a series, for a scan of a fixed number of slices.

    The length of the series is cut into ``count`` equal parts; the slice that lies nearest to the
    middle of each is taken, so one slice may be taken more than once, or none.

    Args:
        positions_mm: of N slices along the normal, in any order, N at least 1.
        count: D, at least 1.

    Returns:
        int (D,), indices into ``positions_mm``, ascending along the normal.
    """
    positions = np.asarray(positions_mm, dtype=float)
    low, high = positions.min(), positions.max()
    middles = low + (np.arange(count) + 0.5) * (high - low) / count
    return np.abs(positions - middles[:, None]).argmin(axis=1)


def _repeats(files: Sequence[CTFile]) -> Iterator[tuple[Path, Path]]:
    """Pairs of a file and the first one that holds the same images."""
    alike: dict[tuple, list[CTFile]] = defaultdict(list)
    for file in files:
        alike[tuple(s.place for s in file.slices)].append(file)
    for group in alike.values():
        first: dict[str, Path] = {}
        for file in group if len(group) > 1 else ():
            original = first.setdefault(_digest(file), file.path)
            if original != file.path:
                yield file.path, original


def _digest(file: CTFile) -> str:
    """Of the HU of all slices; of the file, where they cannot be decoded."""
    digest = hashlib.sha256()
    try:
        for entry in file.slices:
            digest.update(read_hu(file.path, entry.frame).tobytes())
    except (ValueError, FileNotFoundError):
        try:
            return sha256(file.path)
        except OSError:
            return os.fspath(file.path)
    return digest.hexdigest()


def _split(slices: Iterable[CTSlice]) -> list[list[CTSlice]]:
    """Slices of one orientation each, with a position or without."""
    groups: list[list[CTSlice]] = []
    for entry in slices:
        for group in groups:
            if _are_parallel(entry, group[0]):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _are_parallel(a: CTSlice, b: CTSlice) -> bool:
    if math.isnan(a.position_mm) != math.isnan(b.position_mm) or a.is_axial != b.is_axial:
        return False
    if a.directions is None or b.directions is None:
        return a.directions is b.directions
    return np.allclose(a.directions, b.directions, atol=1e-3)


def _sort_series(slices: list[CTSlice], patient: str, general: Sequence[Finding]) -> CTSeries:
    heights = np.array([s.position_mm for s in slices])
    order = np.argsort(heights, kind="stable")  # equal heights stay in the order of their paths
    slices, heights = [slices[i] for i in order], heights[order]
    first = slices[0].header
    gaps = np.diff(heights)
    thickness = first.values.number("SliceThickness")
    gap = math.nan if thickness is None else thickness
    gap = float(np.median(gaps[gaps > _SAME_MM])) if (gaps > _SAME_MM).any() else gap
    thick = [s.header.values.number("SliceThickness") or math.nan for s in slices]
    missing = list(find_gaps(heights.tolist(), thick))
    return CTSeries(
        files=tuple(s.path for s in slices),
        series_uid=first.values.text("SeriesInstanceUID"),
        study_uid=first.values.text("StudyInstanceUID"),
        patient_id=first.values.text("PatientID"),
        spacing_mm=(gap, *first.spacing_mm),
        frames=tuple(s.frame for s in slices),
        positions_mm=tuple(heights.tolist()),
        findings=(
            *_look(slices),
            *(finding for finding, _ in missing),
            *_same_place(heights),
            *general,
        ),
        n_missing=sum(count for _, count in missing),
        is_axial=slices[0].is_axial,
        patient=patient,
    )


def _look(slices: Sequence[CTSlice]) -> Iterator[Finding]:
    """What is odd about slices, but for where they lie."""
    first = slices[0]
    spacings = {s.header.spacing_mm for s in slices if not math.isnan(s.header.spacing_mm[0])}
    rows, columns = first.header.spacing_mm
    if abs(rows - columns) > 0.01 * max(rows, columns):
        yield Finding(
            f"pixels are not square: {rows:g} mm between rows, {columns:g} mm between columns"
        )
    if len(spacings) > 1:
        yield Finding("slices differ in Pixel Spacing")
    if math.isnan(first.position_mm):
        yield Finding(
            f"{_count(len(slices))} of no known position, so their order, and what is missing"
            " between them, is unknown"
        )
    if not first.is_axial:
        yield Finding("slices are not axial")
    # Rows to the patient's left and columns to the back, as a reader expects axial slices.
    elif first.directions is not None and (
        first.directions[0][0] < 0.5 or first.directions[1][1] < 0.5
    ):
        yield Finding(
            "rows and columns do not run to the patient's left and back, as in usual axial slices"
        )
    faults = Counter(pair for s in slices for pair in s.header.values.faults.items())
    for (keyword, fault), count in faults.items():
        yield Finding(f"{_count(count)}: {label(keyword)} {fault}")


def _count(slices: int) -> str:
    return f"{slices} slice{'s' * (slices > 1)}"


def _same_place(heights: np.ndarray) -> Iterator[Finding]:
    pairs = np.flatnonzero(np.diff(heights) <= _SAME_MM).tolist()
    if len(pairs) > 3:
        i = pairs[0]
        yield Finding(
            f"{len(pairs)} slices lie at the position of another, {{}} and {{}} for one", (i, i + 1)
        )
    else:
        yield from (Finding("{} and {} lie at one position", (i, i + 1)) for i in pairs)


def find_gaps(
    heights: Sequence[float], thickness: Sequence[float] | None = None
) -> Iterator[tuple[Finding, int]]:
    """Gaps between the slices of a series, and how many slices each would hold.

    Args:
        heights: N positions along the slice normal, mm, ascending.
        thickness: N of the slices, mm, NaN where it is not known; None if of none.
    """
    if thickness is None:
        thickness = [math.nan] * len(heights)
    ends = np.flatnonzero(np.diff(heights) > _SAME_MM).tolist()
    gaps = np.diff(heights)[ends]
    if not ends:
        return
    usual = float(np.median(gaps))
    # Runs of equal gaps: the spacing may change within a series, from base to vertex.
    edges = np.flatnonzero(np.abs(np.diff(gaps)) > 0.1 * np.minimum(gaps[1:], gaps[:-1])) + 1
    for run in np.split(np.arange(len(gaps)), edges):
        gap = gaps[run].mean()
        beside = [gaps[k] for k in (run[0] - 1, run[-1] + 1) if 0 <= k < len(gaps)]
        thick = np.nanmax(np.array(thickness[ends[run[0]] : ends[run[-1]] + 2]), initial=0)
        if beside and gap > 1.6 * max(beside) and (len(run) == 1 or len(beside) == 2):
            expected = max(beside)
        elif thick and gap > 1.6 * max(thick, usual):
            expected = usual
        elif thick and gap > 1.6 * thick:
            yield (
                Finding(
                    f"{len(run) + 1} slices of {thick:.1f} mm lie {gap:.1f} mm apart, so what is"
                    " between them is not seen: {} to {}",
                    (ends[run[0]], ends[run[-1]] + 1),
                ),
                (round(gap / thick) - 1) * len(run),
            )
            continue
        else:
            continue
        for k in run:
            count = round(gaps[k] / expected) - 1
            text = (
                f"{count} slice(s) seem to be missing between {{}} and {{}}: {gaps[k]:.1f} mm"
                f" apart, beside them {expected:.1f} mm"
            )
            yield Finding(text, (ends[k], ends[k] + 1)), count
