"""Files from disk to the slices that a model is to look at: which there are, whose, in what order.

Each file's header is read once. The steps of :func:`find_slices` follow one another: collect files,
tell patients apart, group into series, leave out what is not axial, tell whose what is lost may be,
number and name.
"""

import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.multival import MultiValue

from ..data.context import last_number
from ..data.dicom import (
    CTFile,
    CTSeries,
    Identity,
    evenly_spaced,
    find_gaps,
    group_patients,
    group_series,
    is_dicom,
    is_placeholder,
    neighbours,
    patient_key,
    printable,
    read_file,
)
from ..data.dicom.identity import words
from ..data.pictures import PICTURE_SUFFIXES, is_picture, picture_size
from ..data.tree import VocTree
from ..files import is_hidden, walk

REMOVED = "[removed]"
"""Stands in reasons for what would tell whose they are."""

# Those of names that are replaced; another may be a part of an identity.
_SUFFIXES = (".dcm", *PICTURE_SUFFIXES, ".ima")
_LETTERS = str.maketrans({"ø": "o", "æ": "ae", "œ": "oe", "ł": "l", "đ": "d", "ı": "i"})
_trees: dict[Path, VocTree] = {}


@dataclass(frozen=True)
class Slice:
    """A slice to diagnose.

    Attributes:
        path: where it is.
        file: its name in results: its path under the given folder, unless that tells whose it is.
        patient, series: pseudonyms, "patient-001" and "series-01" (of that patient).
        index: 0-based; along the slice normal in a DICOM series, else by file name.
        given: named by the user, not found in a folder.
        identity: whose it is, as in the header or in ``patients.csv``.
        frame: 0-based, in a file of several; else None.
        context_files: file and frame of the slices before, this one and those after; empty if it is
            not known where the slice lies.
        position_mm: along the slice normal; NaN if it is not known.
        scan_files: file and frame of slices at even distances over the series, if they are asked
            for; empty as ``context_files``.
    """

    path: Path
    file: str
    patient: str
    series: str
    index: int
    given: bool = False
    identity: Identity = field(default_factory=Identity, repr=False)
    frame: int | None = None
    context_files: tuple[tuple[str, int | None], ...] = ()
    position_mm: float = math.nan
    scan_files: tuple[tuple[str, int | None], ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A file that is not diagnosed.

    Attributes:
        file: as in :class:`Slice`.
        reason: in words.
        lost: whether it is, or may be, a slice that a reader would have to look at.
        patients: pseudonyms of those who may have lost it.
        path, identity: as in :class:`Slice`.
    """

    file: str
    reason: str
    lost: bool = False
    patients: tuple[str, ...] = ()
    path: Path | None = field(default=None, repr=False)
    identity: Identity = field(default_factory=Identity, repr=False)


@dataclass(frozen=True)
class Noticed:
    """What a person should know of a patient's files.

    Attributes:
        notes: in words, without identities.
        n_missing: slices that seem to be missing.
    """

    notes: tuple[str, ...] = ()
    n_missing: int = 0


class Found(NamedTuple):
    """What there is to diagnose: slices by patient, series and position; files that are not; and
    what was noticed, by patient."""

    slices: list[Slice]
    skipped: list[Skipped]
    noticed: dict[str, Noticed]


@dataclass(eq=False)
class _Source:
    """A file on its way to slices or to a :class:`Skipped`.

    Attributes:
        path: the file.
        folder: the given folder in which it was found; None for a given file.
        kind: "dicom" for all but pictures and, "unread", links and folders that are not followed.
        file: its header, of which only DICOM has more than an empty one.
        fault: why it is skipped; empty if it is not.
        repeats: the source of the same image, where that is the reason.
        given: named by the user.
        identity: of the header, the patient by ``patients.csv`` if that does not say.
        patient: what tells its patient from others; None where there is no telling.
        place: series and position in mm by ``patients.csv``.
        lost, concerned: whether a bleed could hide in what was skipped, and of whom it would be.
    """

    path: Path
    folder: Path | None
    kind: str
    file: CTFile
    fault: str = ""
    repeats: "_Source | None" = None
    given: bool = False
    lost: bool | None = None
    concerned: frozenset[tuple] = frozenset()

    def __post_init__(self):
        self.listed, self.place, tree = _listed(self.path)
        header = self.file.identity
        self.identity = replace(header, patient_id=header.patient_id or self.listed)
        self.patient: tuple | None = None
        if self.listed:
            self.patient = ("listed", tree, self.listed)
        elif self.kind == "picture":
            self.patient = ("file", os.fspath(self.path))

    @property
    def is_blank(self) -> bool:
        """Whether there is no telling what it is, nor whose."""
        return self.kind != "picture" and not any(self.file.values.values())

    @property
    def suffix(self) -> str:
        # The end of a UID, as of a file exported by a PACS, is no suffix.
        return "" if self.path.suffix[1:].isdigit() else self.path.suffix.lower()

    @property
    def name(self) -> str:
        """Its path under the given folder. Names of files need not be text."""
        name = self.path.relative_to(self.folder).as_posix() if self.folder else self.path.name
        return printable(os.fsencode(name).decode("utf-8", "replace"))

    @property
    def order(self) -> tuple:
        own, itself = self.identity, _natural(os.fspath(self.path))
        return _natural(self.listed or own.patient_id), own.study_uid, own.series_uid, itself


def find_slices(
    inputs: Sequence[str | os.PathLike],
    *,
    identify: bool = False,
    any_body_part: bool = False,
    context: int = 1,
    scan: int = 0,
    by_name: bool = False,
) -> Found:
    """Finds the CT slices in files and folders; reads headers, and pixels only of images that may
    be one.

    A patient is who ``patients.csv`` of a VOC tree says, or else whom ``data.dicom.group_patients``
    tells apart, or else the folder; of a picture the file itself.

    Args:
        inputs: DICOM files, PNG or JPEG files, and folders of them.
        identify: keep names and IDs of patients and UIDs in names of files and in texts.
        any_body_part: whatever Body Part Examined says.
        context: neighbours on either side in ``context_files``.
        scan: slices in ``scan_files``.
        by_name: as in ``data.context.find_context``.

    Raises:
        FileNotFoundError, ValueError: one sentence that names a given file that cannot be read, or
            saying that there is no slice.
    """
    _trees.clear()
    sources = _collect([Path(path) for path in inputs], any_body_part)
    warnings = _tell_patients_apart(sources, identify)
    series = _select_axial(_group(sources), sources, warnings)
    if not series:
        raise ValueError(_nothing_found(inputs, [s for s in sources if s.fault]))
    _attribute_losses(sources)
    patients = _number_patients(sources)
    slices = _number_slices(series, sources, patients, context, scan, by_name)
    remove = None if identify else _remover(sources)
    slices, skipped = _rename(slices, sources, patients, remove)
    noticed = _describe(series, slices, sources, patients, warnings)
    return Found(list(slices.values()), skipped, noticed)


def _collect(inputs: Sequence[Path], any_body_part: bool) -> list[_Source]:
    """Each file once, though several inputs may hold it."""
    sources: dict[Path, _Source] = {}
    for folder in (path for path in inputs if path.is_dir()):
        unread: list[tuple[Path, str]] = []
        for path in walk(folder, unread):
            if path.resolve() not in sources:
                sources[path.resolve()] = _open(path, folder, any_body_part)
        for path, reason in unread:
            sources[path.absolute()] = _Source(path, folder, "unread", CTFile(path), reason)
    for path in (path for path in inputs if not path.is_dir()):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder; check the path.")
        source = sources.setdefault(path.resolve(), _open(path, None, any_body_part))
        source.given = True
        if source.fault and is_hidden(path):  # a list of files may name those, too
            source.kind, source.lost = "unread", False
        elif source.fault and not source.file.excluded:
            raise ValueError(f"{path}: {source.fault}")
    return list(sources.values())


def _open(path: Path, folder: Path | None, any_body_part: bool) -> _Source:
    if is_picture(path):
        return _Source(path, folder, "picture", CTFile(path), _picture_fault(path))
    file = read_file(path, any_body_part=any_body_part)
    return _Source(path, folder, "dicom", file, file.fault)


def _tell_patients_apart(sources: Sequence[_Source], identify: bool) -> dict[tuple, list[str]]:
    """Sets the sources' patients; returns warnings by patient."""
    unlisted = [s for s in sources if s.patient is None and s.file.may_be_slice and not s.is_blank]
    known = [s for s in unlisted if patient_key(s.identity)]
    keys, told = group_patients([s.identity for s in known], identify=identify)
    for source, key in zip(known, keys, strict=True):
        source.patient = ("header", key)
    warnings = defaultdict(list, {("header", key): [text] for key, text in told.items()})
    for source in unlisted:
        if source.patient is None:
            person = source.identity.birth_date, source.identity.sex
            person = (*sorted(words(source.identity.name)), *person)
            source.patient = ("folder", os.fspath(source.path.parent), *person)
            warnings[source.patient] = [
                "no Patient ID, Study or Series Instance UID tells whose the slices are: those of"
                " one folder are taken for one patient"
            ]
    return warnings


def _group(sources: Sequence[_Source]) -> list[CTSeries]:
    """The series of DICOM files; pictures are one series a folder, if no list says better."""
    dicom = {s.path: s for s in sources if s.kind == "dicom" and not s.fault}
    series, repeats = group_series(
        [s.file for s in dicom.values()], [s.patient for s in dicom.values()]
    )
    for path, first in repeats.items():
        dicom[path].repeats, dicom[path].fault = dicom[first], "repeats the image {}."
    pictures = defaultdict(list)
    for s in sorted(sources, key=lambda s: _natural(s.name)):
        if s.kind == "picture" and not s.fault:
            name, position = s.place
            key = (s.patient, os.fspath(s.path.parent), name, math.isnan(position))
            pictures[key].append((s.path, position))
    for (patient, _, name, _), slices in sorted(pictures.items()):
        # Pictures may be named in any order.
        files, positions = zip(*sorted(slices, key=lambda entry: entry[1]))
        missing = [] if np.isnan(positions).any() else list(find_gaps(positions))
        series.append(
            CTSeries(
                files=files,
                series_uid=name,
                study_uid="",
                patient_id="",
                spacing_mm=(math.nan,) * 3,
                frames=(None,) * len(files),
                positions_mm=positions,
                findings=tuple(finding for finding, _ in missing),
                n_missing=sum(count for _, count in missing),
                patient=patient,
            )
        )
    return sorted(series, key=lambda s: (s.study_uid, s.series_uid))


def _select_axial(
    series: Sequence[CTSeries], sources: Sequence[_Source], warnings: dict[tuple, list[str]]
) -> list[CTSeries]:
    """The axial series; another is lost where its study has no axial one in its place."""
    axial = [s for s in series if s.is_axial]
    studies = {(s.patient, s.study_uid) for s in axial}
    used = {path for s in axial for path in s.files}
    for s in series:
        if s.is_axial:
            continue
        alone, unused = (s.patient, s.study_uid) not in studies, {*s.files} - used
        for source in sources:
            if source.path in unused:
                source.fault, source.lost = "is not axial, expected axial slices.", alone
        note = f"{len(s.files)} slice(s) that are not axial are left out"
        warnings[s.patient].append(note + ", and there are no others of their study" * alone)
    return axial


def _attribute_losses(sources: Sequence[_Source]) -> None:
    """Marks which of the skipped are, or may be, slices that a bleed could hide in, and whose."""
    used = [s for s in sources if not s.fault]
    images = {(s.patient, _image(s)) for s in used}
    kinds = {(s.path.parent, s.suffix) for s in used}
    whose: dict[Path, set[tuple]] = defaultdict(set)
    for source in used:
        for parent in source.path.parents:
            whose[parent].add(source.patient)
            if source.folder in (parent, None):
                break
    roots = {s.folder.resolve() for s in sources if s.folder}
    for s in sources:
        if s.lost is not None:
            pass
        elif not s.fault or s.repeats or s.file.excluded or (s.patient, _image(s)) in images:
            s.lost = False  # the same slice is there whole, or nobody would look for one
        elif s.kind == "unread":
            # A link into a folder that is searched anyway loses nothing.
            # (Path.resolve raises where a link leads to itself.)
            target = Path(os.path.realpath(s.path))
            within = any(target.is_relative_to(root) for root in roots)
            s.lost = not (within and s.path.is_symlink()) and (
                not s.path.is_file() or (s.path.parent, s.suffix) in kinds
            )
        elif s.is_blank:
            alike = (s.path.parent, s.suffix) in kinds or s.suffix == ".dcm"
            s.lost = alike or is_dicom(s.path)
        else:
            s.lost = s.kind == "picture" or s.file.may_be_slice
        if s.lost:
            s.concerned = frozenset([s.patient] if s.patient else _nearby(s, whose))


def _image(source: _Source) -> tuple | Path:
    """Equal for files that hold the same slice; one of them may be damaged."""
    values = source.file.values
    uid, position = values.text("SOPInstanceUID"), values.numbers("ImagePositionPatient")
    return (uid, position) if uid and position else source.path


def _nearby(source: _Source, whose: dict[Path, set[tuple]]) -> set[tuple]:
    """The patients of the nearest folder with slices, if there is no telling otherwise."""
    for parent in source.path.parents:
        if parent in whose:
            near = whose[parent]
            return near if len(near) == 1 or parent == source.path.parent else set()
        if parent == source.folder:
            break
    return set()


def _number_patients(sources: Sequence[_Source]) -> dict[tuple, str]:
    """Pseudonyms by patient, in the order of Patient ID, study, series and path."""
    order: dict[tuple, tuple] = {}
    for s in sources:
        if not s.fault:
            order[s.patient] = min(order.get(s.patient, s.order), s.order)
    for s in sources:
        for patient in s.concerned:
            order.setdefault(patient, s.order)
    return {key: f"patient-{i:03d}" for i, key in enumerate(sorted(order, key=order.get), start=1)}


def _number_slices(
    series: Sequence[CTSeries],
    sources: Sequence[_Source],
    patients: dict[tuple, str],
    context: int,
    scan: int,
    by_name: bool,
) -> dict[tuple[Path, int | None], Slice]:
    """The slices by file and frame, still named as their files are."""
    slices, count, source = {}, Counter(), {s.path: s for s in sources}
    for s in sorted(series, key=lambda s: [*patients].index(s.patient)):
        count[s.patient] += 1
        entries = list(zip(s.files, s.frames))
        positions = s.positions_mm
        if by_name and np.isnan(positions).all():
            positions = [last_number(path.stem) for path in s.files]
        beside, places, of_scan = [[]] * len(entries), [math.nan] * len(entries), ()
        if not np.isnan(positions).any():
            # Pictures may be named in any order.
            entries = [entries[i] for i in np.argsort(positions, kind="stable")]
            places = sorted(positions)
            beside = neighbours(places, context)
            of_scan = evenly_spaced(places, scan) if scan else ()
        scan_files = tuple((os.fspath(entries[i][0]), entries[i][1]) for i in of_scan)
        for index, (path, frame) in enumerate(entries):
            slices[path, frame] = Slice(
                path=path,
                file=source[path].name + ("" if frame is None else f"#{frame + 1}"),
                patient=patients[s.patient],
                series=f"series-{count[s.patient]:02d}",
                index=index,
                given=source[path].given,
                identity=source[path].identity,
                frame=frame,
                context_files=tuple(
                    (os.fspath(entries[i][0]), entries[i][1]) for i in beside[index]
                ),
                position_mm=places[index],
                scan_files=scan_files,
            )
    return slices


def _rename(
    slices: dict[tuple[Path, int | None], Slice],
    sources: Sequence[_Source],
    patients: dict[tuple, str],
    remove: Callable[[str], str] | None,
) -> tuple[dict[tuple[Path, int | None], Slice], list[Skipped]]:
    """Slices and skipped files under names that are unique and tell nobody's identity.

    Args:
        remove: takes identities out of texts; None to keep them.
    """
    skipped = sorted((s for s in sources if s.fault), key=lambda s: _natural(s.name))
    count = Counter([*(entry.file for entry in slices.values()), *(s.name for s in skipped)])

    def choose(name: str, pseudonym: str, path: Path) -> str:
        if remove is None or remove(name) == name and count[name] == 1:
            return name
        return pseudonym + (path.suffix if path.suffix.lower() in _SUFFIXES else "")

    slices = {
        key: replace(s, file=choose(s.file, f"{s.patient}/{s.series}/{s.index:03d}", s.path))
        for key, s in slices.items()
    }
    names = {path: entry.file.split("#")[0] for (path, _), entry in reversed(slices.items())}
    return slices, [
        Skipped(
            file=choose(s.name, f"skipped-{i:03d}", s.path),
            reason=_explain(s, names, remove),
            lost=bool(s.lost),
            patients=tuple(patients[key] for key in patients if key in s.concerned),
            path=s.path,
            identity=s.identity,
        )
        for i, s in enumerate(skipped, start=1)
    ]


def _explain(source: _Source, names: dict[Path, str], remove: Callable[[str], str] | None) -> str:
    if source.repeats is not None:
        return source.fault.format(names.get(source.repeats.path, "of another file"))
    return remove(source.fault) if remove else source.fault


def _describe(
    series: Sequence[CTSeries],
    slices: dict[tuple[Path, int | None], Slice],
    sources: Sequence[_Source],
    patients: dict[tuple, str],
    warnings: dict[tuple, list[str]],
) -> dict[str, Noticed]:
    """What was noticed, by patient."""
    notes = {key: [*warnings.get(key, ())] for key in patients}
    missing = Counter()
    for key, count in Counter(s.patient for s in sources if s.repeats).items():
        notes.get(key, []).append(f"{count} file(s) that repeat others are left out")
    for s in series:
        own = [slices[entry] for entry in zip(s.files, s.frames)]
        names = [entry.file for entry in own]
        notes[s.patient] += [f"{own[0].series}: {finding.words(names)}" for finding in s.findings]
        missing[s.patient] += s.n_missing
    return {name: Noticed(tuple(notes[key]), missing[key]) for key, name in patients.items()}


def _picture_fault(path: Path) -> str:
    """Why the header of a PNG or JPEG is refused; empty if it is not."""
    try:
        picture_size(path)
    except (ValueError, OSError) as error:
        return _reason(error, path)
    return ""


def _listed(path: Path) -> tuple[str, tuple[str, float], str]:
    """Patient and place by ``patients.csv`` of the VOC tree that an image is in, and the tree."""
    tree = VocTree.of(path, _trees)
    image = tree.find(path.name) if tree and tree.patients else None
    if tree is None or image not in tree.patients:
        return "", ("", math.nan), ""
    return tree.patients[image][0], tree.places[image], os.fspath(tree.root)


def _remover(sources: Iterable[_Source]) -> Callable[[str], str]:
    """A function that takes identities out of names of files and of reasons.

    Exports name files after the SOP Instance UID, and folders after the patient, whom they may
    spell otherwise than the header does: without accents, points and leading zeros.
    """
    own = set()
    # Of the images of one header's identity in one folder, one is read again.
    images = {}
    for s in sources:
        folder, identity = s.name.rpartition("/")[0], replace(s.identity, sop_uid="")
        images[folder, identity, s.file.values.text("AccessionNumber")] = s
    for (_, identity, accession), s in images.items():
        names, ids = _other_identities(s) if s.kind == "dicom" and not s.is_blank else ([], [])
        for name in (identity.name, *names):
            parts = [part for part in re.split(r"[\^=,\s]+", name) if part]
            own |= {"".join(parts), "".join(parts[::-1]), *parts, *words(name)}
        own |= {identity.patient_id, accession, *ids, *_spellings(identity.birth_date)}
    own = {word for word in own if len(word) > 1 and not is_placeholder(word)}
    # In any case, what is longer first; short ones as whole words alone. A UID is digits with four
    # points or more.
    patterns = [r"\d+(?:\.\d+){4,}"]
    for word in sorted(own, key=len, reverse=True):
        known = re.escape(word)
        patterns.append(known if len(word) > 3 else rf"(?<![^\W_]){known}(?![^\W_])")
    pattern = re.compile("|".join(patterns), re.IGNORECASE)
    plain = {"".join(words(_fold(word))) for word in own}
    plain |= {word.lstrip("0") for word in plain if len(word.lstrip("0")) > 3}
    short = {word for word in plain if 1 < len(word) <= 3}
    long = re.compile("|".join(re.escape(word) for word in plain if len(word) > 3) or r"(?!)")

    def tells(text: str) -> bool:
        found = words(_fold(text))
        return not short.isdisjoint(found) or bool(long.search("".join(found)))

    def remove(text: str) -> str:
        text = pattern.sub(REMOVED, text)
        if not tells(text.replace(REMOVED, " ")):
            return text
        told = [REMOVED if tells(word.replace(REMOVED, " ")) else word for word in text.split(" ")]
        return " ".join(told) if REMOVED in told else REMOVED

    return remove


def _fold(text: str) -> str:
    """Makes one spelling of several: Mueller and Muller of Müller."""
    text = unicodedata.normalize("NFKD", text.casefold())
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub("([aou])e", r"\1", text.translate(_LETTERS))


def _spellings(date: str) -> set[str]:
    """The digits of a date in all orders, with two or four of the year."""
    digits = re.sub(r"\D", "", date)
    if len(digits) != 8:
        return {date}
    year, month, day = digits[:4], digits[4:6], digits[6:]
    orders = set()
    for y in (year, year[2:]):
        for m, d in ((month, day), (month.lstrip("0"), day.lstrip("0"))):
            orders |= {y + m + d, d + m + y, m + d + y}
    return {date} | {order for order in orders if len(order) >= 6}


def _other_identities(source: _Source) -> tuple[list[str], list[str]]:
    """Other names and IDs that the header has of the patient."""
    names, ids = ("OtherPatientNames", "PatientBirthName"), ("OtherPatientIDs",)
    wanted = [*names, *ids, "OtherPatientIDsSequence", "SpecificCharacterSet"]

    def texts(keywords: Sequence[str], of: pydicom.Dataset) -> list[str]:
        values = [of.get(keyword) or "" for keyword in keywords]
        return [
            str(v)
            for value in values
            for v in (value if isinstance(value, MultiValue) else [value])
        ]

    try:
        header = pydicom.dcmread(
            source.path, stop_before_pixels=True, force=True, specific_tags=wanted
        )
        others = header.get("OtherPatientIDsSequence") or ()
        return texts(names, header), texts(ids, header) + [
            text for item in others for text in texts(["PatientID"], item)
        ]
    except Exception:  # whatever pydicom raises on damage
        return [], []


def _nothing_found(inputs: Sequence[str | os.PathLike], skipped: Sequence[_Source]) -> str:
    where = ", ".join(str(path) for path in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
    if not skipped:
        return f"{where}: holds no file; expected CT slices (DICOM, PNG or JPEG)."
    first = min(skipped, key=lambda s: (not s.lost, _natural(s.name)))
    return (
        f"{where}: none of {len(skipped)} files is a readable CT slice; the first, "
        f"{first.name}, {first.fault.rstrip('.')}."
    )


def _natural(text: str) -> tuple:
    """Sorts "slice_9" before "slice_10"."""
    return tuple((int(x), "") if x.isdigit() else (-1, x) for x in re.split(r"([0-9]+)", text))


def _reason(error: Exception, path: Path, *neighbours: Path) -> str:
    """An error's first line without the path of a file, which says where a user's data are."""
    text = (str(error).splitlines() or [type(error).__name__])[0].strip()
    text = text.removeprefix(f"{path}: ").removeprefix(f"{path} ")
    for known in (path, *neighbours):
        name = path.name if known == path else "a neighbouring slice"
        text = text.replace(os.fspath(known.absolute()), name).replace(os.fspath(known), name)
    return text
