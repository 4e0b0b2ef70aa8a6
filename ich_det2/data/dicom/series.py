"""CT series: the slices of a folder, grouped and in anatomical order.

Sections "C.x" are of DICOM PS3.3.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...files import walk
from .elements import Refusal, label
from .header import Header, naming, number, numbers, read_headers, text

HEAD_PARTS = ("HEAD", "BRAIN", "SKULL", "CRANI", "FACE", "ORBIT", "SINUS", "NECK", "WHOLEBODY")
"""A Body Part Examined that names none of these is no head (PS3.16, annex L). CT angiographies of
head and neck are kept; a file that does not say is taken for a head."""

_SAME_MM = 1e-2
"""Slices nearer to each other than this lie at one position."""


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
        positions_mm: of each slice along the normal; NaN where the file does not say.
        tilt_deg: angle between the slice normal and the patient's long axis, 0 to 90.
        notes: what a person should know: missing slices, several at one position, pixels that are
            not square, another orientation than the usual. File names, no identities.
    """

    files: tuple[Path, ...]
    series_uid: str
    study_uid: str
    patient_id: str
    spacing_mm: tuple[float, float, float]
    frames: tuple[int | None, ...] = ()
    positions_mm: tuple[float, ...] = ()
    tilt_deg: float = math.nan
    notes: tuple[str, ...] = ()


def read_series(
    folder: str | os.PathLike,
) -> tuple[list[CTSeries], list[tuple[Path, str]]]:
    """Find the CT series in a folder and its subfolders, reading headers only.

    Slices are grouped by Series Instance UID and sorted by Image Position projected on the slice
    normal (C.7.6.2.1.1), never by file name or Instance Number. A series that holds several
    orientations gives one ``CTSeries`` each. Links that lead out of the folder are not followed.

    Args:
        folder: the folder to search.

    Returns:
        ``(series, skipped)``: the series ordered by patient, study and series UID; and pairs of
        path and reason for every other file, ordered by path: not DICOM, not CT, no head,
        localizers, reports, duplicates, slices without a position in a series of several files,
        unreadable.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: ``folder`` is a file.
    """
    folder = Path(folder)
    skipped: list[tuple[Path, str]] = []
    by_uid: dict[str, list[_Slice]] = {}
    seen: dict[str, Path] = {}
    for path in walk(folder, skipped):
        try:
            entries = _read_slices(path)
            sop_uid = entries[0].sop_uid
            first = seen.setdefault(sop_uid, path) if sop_uid else path
            if first != path:
                raise Refusal(f"repeats the image {first.relative_to(folder)} (SOP Instance UID).")
        except (ValueError, FileNotFoundError) as error:
            skipped.append((path, str(error).removeprefix(f"{path}: ")))
        else:
            by_uid.setdefault(entries[0].series_uid, []).extend(entries)

    series = []
    for slices in by_uid.values():
        if len(slices) > 1:
            reason = f"has no position or orientation to place it among {len(slices)} slices."
            lost = dict.fromkeys(s.path for s in slices if s.position is None)
            skipped += [(path, reason) for path in lost]
            slices = [s for s in slices if s.position is not None]
        series += [_sort_series(group) for group in _split_orientations(slices)]
    series.sort(key=lambda s: (s.patient_id, s.study_uid, s.series_uid))
    return series, sorted(skipped)


def may_be_head(body_part: str) -> bool:
    """Whether a Body Part Examined (0018,0015) names the head, or nothing."""
    letters = re.sub(r"[^A-Z]", "", body_part.upper())
    return not letters or any(word in letters for word in HEAD_PARTS)


def sort_frames(path: str | os.PathLike) -> list[tuple[int | None, float]]:
    """The slices of a file along the slice normal.

    Returns:
        Pairs of the 0-based frame, None in a file of a single slice, and the position in mm, NaN
        where the file does not say.

    Raises:
        FileNotFoundError, ValueError: as ``read_hu``.
    """
    with naming(path), open(path, "rb") as file:
        slices = [_slice(Path(path), header) for header in read_headers(file)[0]]
    if any(s.position is None for s in slices):
        return [(s.frame, math.nan) for s in slices]
    series = map(_sort_series, _split_orientations(slices))
    return [pair for s in series for pair in zip(s.frames, s.positions_mm)]


def read_place(path: str | os.PathLike) -> tuple[str, float]:
    """Where the slice of a file lies.

    Returns:
        Series Instance UID, and the position along the slice normal in mm; empty and NaN where
        the file does not say.

    Raises:
        FileNotFoundError, ValueError: as ``read_hu``.
    """
    with naming(path), open(path, "rb") as file:
        entry = _slice(Path(path), read_headers(file)[0][0])
    if entry.position is None:
        return entry.series_uid, math.nan
    return entry.series_uid, float(entry.position @ np.cross(*entry.directions))


def read_spacing(path: str | os.PathLike) -> tuple[float, float]:
    """Distance of rows and of columns of a slice (of the first frame), mm; NaN where the file does
    not say. Errors as ``read_hu``."""
    with naming(path), open(path, "rb") as file:
        return read_headers(file)[0][0].spacing_mm


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


@dataclass(frozen=True)
class _Slice:
    path: Path
    frame: int | None
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    position: np.ndarray | None  # (3,), mm
    directions: np.ndarray | None  # (2, 3): of a row, of a column; unit vectors
    pixel_spacing: tuple[float, float]  # rows, columns; mm
    thickness: float | None  # mm

    @property
    def name(self) -> str:
        """For a person: the file's name, with the frame counted from 1 as in DICOM."""
        return self.path.name if self.frame is None else f"{self.path.name} frame {self.frame + 1}"


def _read_slices(path: Path) -> list[_Slice]:
    with naming(path), open(path, "rb") as file:
        headers = read_headers(file)[0]
        values = headers[0].values
        headers = [h for h in headers if "LOCALIZER" not in text(h.values, "ImageType").upper()]
        if not headers:
            raise Refusal("is a localizer (scout), not a slice.")
        part = text(values, "BodyPartExamined")
        if not may_be_head(part):
            raise Refusal(f"{label('BodyPartExamined')} is {part}, expected a head.")
        if not text(values, "SeriesInstanceUID"):
            raise Refusal(f"has no {label('SeriesInstanceUID')}.")
        return [_slice(path, header) for header in headers]


def _slice(path: Path, header: Header) -> _Slice:
    values = header.values
    position, directions = _read_geometry(header)
    return _Slice(
        path=path,
        frame=header.frame if header.frames > 1 else None,
        sop_uid=text(values, "SOPInstanceUID"),
        series_uid=text(values, "SeriesInstanceUID"),
        study_uid=text(values, "StudyInstanceUID"),
        patient_id=text(values, "PatientID"),
        position=position,
        directions=directions,
        pixel_spacing=header.spacing_mm,
        thickness=number(values, "SliceThickness"),
    )


def _read_geometry(header: Header) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    position = np.array(numbers(header.values, "ImagePositionPatient"))
    directions = np.array(numbers(header.values, "ImageOrientationPatient"))
    if position.size != 3 or directions.size != 6:
        return None, None
    directions = directions.reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if not np.allclose(lengths, 1, atol=0.01) or abs(directions[0] @ directions[1]) > 0.01:
        return None, None
    return position, directions / lengths[:, None]


def _split_orientations(slices: Iterable[_Slice]) -> list[list[_Slice]]:
    groups: list[list[_Slice]] = []
    for entry in slices:
        for group in groups:
            if entry.directions is None or np.allclose(
                entry.directions, group[0].directions, atol=1e-3
            ):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _sort_series(slices: list[_Slice]) -> CTSeries:
    first = slices[0]
    gap = math.nan if first.thickness is None else first.thickness
    heights, tilt = np.full(len(slices), math.nan), math.nan
    if first.directions is not None:
        normal = np.cross(*first.directions)
        heights = np.array([s.position @ normal for s in slices])
        order = np.argsort(heights, kind="stable")  # equal heights stay in the order of their paths
        slices, heights = [slices[i] for i in order], heights[order]
        gaps = np.diff(heights)
        gap = float(np.median(gaps[gaps > _SAME_MM])) if (gaps > _SAME_MM).any() else gap
        tilt = math.degrees(math.acos(min(abs(normal[2]), 1.0)))
    return CTSeries(
        files=tuple(s.path for s in slices),
        series_uid=first.series_uid,
        study_uid=first.study_uid,
        patient_id=first.patient_id,
        spacing_mm=(gap, *first.pixel_spacing),
        frames=tuple(s.frame for s in slices),
        positions_mm=tuple(heights.tolist()),
        tilt_deg=tilt,
        notes=tuple(_notes(slices, heights)),
    )


def _notes(slices: Sequence[_Slice], heights: np.ndarray) -> Iterator[str]:
    """What a person should know of sorted slices at these heights, mm."""
    first = slices[0]
    rows, columns = first.pixel_spacing
    if abs(rows - columns) > 0.01 * max(rows, columns):
        yield f"pixels are not square: {rows:g} mm between rows, {columns:g} mm between columns"
    if len({s.pixel_spacing for s in slices}) > 1:
        yield "slices differ in Pixel Spacing"
    if first.directions is None:
        return
    # Rows to the patient's left and columns to the back, as a reader expects axial slices.
    if first.directions[0][0] < 0.5 or first.directions[1][1] < 0.5:
        yield "rows and columns do not run to the patient's left and back, as in usual axial slices"
    gaps = np.diff(heights)
    for i, gap in enumerate(gaps):
        if gap <= _SAME_MM:
            yield f"{slices[i].name} and {slices[i + 1].name} lie at one position"
            continue
        # The spacing may change within a series, from base to vertex, so a gap is compared with
        # both of its neighbours.
        beside = [g for g in (*gaps[max(i - 1, 0) : i], *gaps[i + 1 : i + 2]) if g > _SAME_MM]
        missing = round(gap / max(beside)) - 1 if beside else 0
        if missing > 0 and gap > 1.6 * max(beside):
            yield (
                f"{missing} slice(s) seem to be missing between {slices[i].name} and "
                f"{slices[i + 1].name}: {gap:.1f} mm apart, beside them {max(beside):.1f} mm"
            )
