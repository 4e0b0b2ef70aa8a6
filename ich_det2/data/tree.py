"""The VOC tree of a data set: the only code that opens its lists, tables, annotations and folders.

    ROOT/DICOM/*            slices as DICOM, or
    ROOT/JPEGImages/*       as PNG or JPEG, windowed already
    ROOT/Annotations/*.xml  VOC boxes, one file for each slice, without objects for a healthy one
    ROOT/ImageSets/Main/*.txt   lists of image ids, one a line
    ROOT/SegmentationObject/*.png   perhaps masks: value i is the XML's i-th object, 255 nobody's
    ROOT/SegmentationClass/*.png    or else of all bleeds of a slice in one: 0 background
    ROOT/patients.csv       image,patient[,study,series,position_mm]
    ROOT/labels.csv         image,label of slices whose label does not come from boxes

An image's id is its file's name without suffix. Where names of images meet (lists, tables, files),
they are compared in one form of Unicode, and a name with a suffix is that of the image without it;
a name that still fits no image is an error or counted in a warning, never passed over.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from ..files import is_hidden, write_atomically
from .dicom import (
    is_dicom,
    patient_keys,
    read_identity,
    read_place,
    read_series,
    read_size,
)
from .masks import VOID, masks_of_labels, share_among_boxes
from .pictures import PICTURE_SUFFIXES, is_picture, picture_size, read_mask_picture
from .voc import VocAnnotation, read_voc

IMAGE_FOLDERS = ("DICOM", "JPEGImages")
"""Folders of images, the first preferred."""

ANNOTATIONS = "Annotations"
OBJECT_MASKS, CLASS_MASKS = MASK_FOLDERS = ("SegmentationObject", "SegmentationClass")
LISTS = os.path.join("ImageSets", "Main")
PATIENTS, LABELS, SLICES = "patients.csv", "labels.csv", "slices.csv"
PATIENT_FIELDS = ("image", "patient", "study", "series", "position_mm")
SPLITS = ("train", "val", "test")

logger = logging.getLogger(__name__)


class VocTree:
    """A VOC tree on disk, read when asked and then kept.

    Attributes:
        root: its folder.
    """

    def __init__(self, root: str | os.PathLike):
        """
        Args:
            root: the folder.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; expected a VOC tree.")

    @classmethod
    def of(cls, path: str | os.PathLike, known: dict[Path, VocTree]) -> VocTree | None:
        """The tree that an image file is in; None if its folder is not one of images.

        Args:
            path: of the image.
            known: keeps the trees from call to call.
        """
        folder = Path(path).absolute().parent
        if folder.name not in IMAGE_FOLDERS:
            return None
        return known.setdefault(folder.parent, cls(folder.parent))

    # ---- images --------------------------------------------------------------------------------

    @cached_property
    def images(self) -> dict[str, Path]:
        """File by image id, ordered by id; an image in both folders is its DICOM file.

        Raises:
            FileNotFoundError: there is no image.
            ValueError: two files of one id, or a name that a list of ids cannot hold.
        """
        images: dict[str, Path] = {}
        for folder, is_image in zip(IMAGE_FOLDERS, (_is_slice, is_picture), strict=True):
            here: dict[str, Path] = {}
            for path in sorted((self.root / folder).glob("*")):
                if is_hidden(path) or not is_image(path):
                    continue
                known = ("", ".dcm") if folder == IMAGE_FOLDERS[0] else PICTURE_SUFFIXES
                image = plain(path.stem if path.suffix.lower() in known else path.name)
                if image.split() != [image] or not image.isprintable():
                    raise ValueError(
                        f"{path}: has a space or an unprintable character in its name; rename the"
                        " file."
                    )
                if here.setdefault(image, path) != path:
                    raise ValueError(
                        f"{path}: has the id '{image}' of {here[image].name} beside it; rename one."
                    )
            images = here | images
        if not images:
            raise FileNotFoundError(
                f"{self.root}: no images; expected DICOM/*.dcm or JPEGImages/*.jpg."
            )
        return dict(sorted(images.items()))

    def size(self, image: str) -> tuple[int, int]:
        """(H, W) of an image in pixels, from its header.

        Raises:
            FileNotFoundError, ValueError: naming the file.
        """
        return image_size(self.images[image])

    def annotation(self, image: str) -> VocAnnotation:
        """What an image's XML says.

        Raises:
            FileNotFoundError: there is none; a healthy slice needs one too.
            ValueError: naming the file, if it cannot be read or names another image.
        """
        path = self._annotations.get(image)
        if path is None:
            raise FileNotFoundError(
                f"{self.root / ANNOTATIONS / image}.xml: the image {image} has no annotation; a"
                " healthy slice needs one too, without objects."
            )
        annotation = read_voc(path)
        named = annotation.filename
        if named is not None and image not in (plain(named), plain(Path(named).stem)):
            raise ValueError(
                f"{path} names the image '{named}', expected '{image}' with an image's suffix; the"
                " annotation belongs to another image or was renamed."
            )
        return annotation

    @cached_property
    def _annotations(self) -> dict[str, Path]:
        return self._by_stem(ANNOTATIONS, ".xml")

    def _by_stem(self, folder: str, suffix: str) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted((self.root / folder).glob("*")):
            if path.suffix.lower() == suffix and not is_hidden(path):
                found.setdefault(plain(path.stem), path)
        return found

    def masks(self, image: str) -> list[np.ndarray | None]:
        """The mask of each object of an image's XML, in its order.

        ``SegmentationObject/`` has each object's pixels. Where there is but ``SegmentationClass/``
        an object has the pixels in its box and what is connected with them, see
        ``masks.share_among_boxes``; what is in no box is nobody's.

        Returns:
            bool (H, W) for each object; None where its mask is not known.

        Raises:
            FileNotFoundError, ValueError: as :meth:`annotation`; or a mask cannot be read, is of
                another size than the image, has a value that names no object, or nothing but void.
                The message names the file.
        """
        annotation = self.annotation(image)
        boxes = [obj.box for obj in annotation.objects]
        folder = next((f for f in MASK_FOLDERS if image in self._masks[f]), None)
        if folder is None:
            return [None] * len(boxes)
        path = self._masks[folder][image]
        labels = read_mask_picture(path)
        if labels.shape != self.size(image):
            (height, width), (own, across) = self.size(image), labels.shape
            raise ValueError(
                f"{path} is {across} x {own} pixels, its image {width} x {height}; the mask is of"
                " another image."
            )
        values = np.setdiff1d(labels, (0, VOID))
        if folder == CLASS_MASKS:
            if not len(values) and labels.any():
                raise ValueError(
                    f"{path} has no value but {VOID}, which is VOC's for void; write bleeds as 1."
                )
            bleed = (labels > 0) & (labels != VOID)
            masks = share_among_boxes(bleed, boxes)
            if strays := int(bleed.sum()) - sum(int(m.sum()) for m in masks if m is not None):
                warn_once(f"{path}: {strays} of its {bleed.sum()} pixels lie in no box, unused.")
            return masks
        if len(values) and not 0 < values[0] <= values[-1] <= len(boxes):
            wrong = next(v for v in values if not 0 < v <= len(boxes))
            raise ValueError(
                f"{path} has the value {wrong}, but {annotation.path.name} has {len(boxes)}"
                f" objects; expected 1 to {len(boxes)}, 0 for background and {VOID} for void."
            )
        return masks_of_labels(labels, len(boxes))

    @cached_property
    def _masks(self) -> dict[str, dict[str, Path]]:
        """Files of masks by folder and image id."""
        found = {folder: self._by_stem(folder, ".png") for folder in MASK_FOLDERS}
        for folder, masks in found.items():
            strays = sorted(masks.keys() - self.images.keys())
            if strays and len(strays) == len(masks):
                raise ValueError(
                    f"{self.root / folder}: no mask has the name of an image, '{strays[0]}.png' for"
                    " one; name masks as their images."
                )
            if strays:
                warn_once(
                    f"{self.root / folder}: {len(strays)} masks are of no image,"
                    f" '{strays[0]}.png' for one; they are not used."
                )
        return found

    @cached_property
    def types(self) -> dict[str, frozenset[str]]:
        """The names of the objects that each image shows; empty for a healthy slice.

        Raises:
            FileNotFoundError, ValueError: as :meth:`annotation`.
        """
        return {i: frozenset(o.name for o in self.annotation(i).objects) for i in self.images}

    @cached_property
    def findings(self) -> dict[str, frozenset[str]]:
        """As :attr:`types`, but ``labels.csv`` has the last word on whether a slice bleeds.

        A bleeding slice without boxes shows "hemorrhage", a healthy one nothing.

        Raises:
            FileNotFoundError, ValueError: as :meth:`annotation` and :attr:`labels`.
        """
        unboxed = frozenset({"hemorrhage"})
        return {
            image: (types or unboxed) if self.labels.get(image, bool(types)) else frozenset()
            for image, types in self.types.items()
        }

    # ---- lists ---------------------------------------------------------------------------------

    @cached_property
    def lists(self) -> list[str]:
        """Names of the lists in ``ImageSets/Main``; train, val and test first."""
        names = [p.stem for p in (self.root / LISTS).glob("*.txt") if not is_hidden(p)]
        return sorted(names, key=lambda n: (SPLITS.index(n) if n in SPLITS else 3, n))

    def list_path(self, name: str) -> Path:
        """Where the list of a name is."""
        return self.root / LISTS / f"{name}.txt"

    def read_list(self, name: str) -> list[str]:
        """The image ids of a list, in its order.

        A line is an id, and perhaps one of VOC's flags -1, 0, 1 behind it.

        Raises:
            FileNotFoundError: there is no such list.
            ValueError: it is empty, is no text, or names what is no image, or an image twice.
        """
        path = self.list_path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, there is no such list; make the splits by `python"
                f" datasets/make_splits.py {self.root}`."
            )
        ids: dict[str, int] = {}
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            words = line.split()
            if not words:
                continue
            if len(words) > 2 or words[1:] and words[1] not in ("-1", "0", "1"):
                raise ValueError(
                    f"{path}, line {number}: is '{line.strip()[:60]}', expected an image id."
                )
            if Path(words[0]).name != words[0] or "\\" in words[0]:
                raise ValueError(
                    f"{path} names '{words[0]}', expected a file's stem without folder."
                )
            image = self.find(words[0])
            if image is None:
                raise FileNotFoundError(
                    f"{self.root}: '{words[0]}' of {LISTS}/{name}.txt, line {number}, is no image:"
                    f" {words[0]}.xml has no image, there is no such image as DICOM/{words[0]}.dcm"
                    f" or JPEGImages/{words[0]}.jpg, .jpeg or .png."
                )
            if ids.setdefault(image, number) != number:
                raise ValueError(f"{path} names '{image}' more than once.")
        if not ids:
            raise ValueError(
                f"{path} is empty, so the split '{name}' has no images; make the splits anew by"
                f" `python datasets/make_splits.py {self.root} --force`."
            )
        return list(ids)

    def write_lists(
        self,
        lists: Mapping[str, Sequence[str]],
        *,
        patients: Mapping[str, tuple[str, str]] | None = None,
        force: bool = False,
    ) -> None:
        """Writes lists of image ids and, if given, ``patients.csv``: all of them or none.

        Args:
            lists: image ids by name.
            patients: patient and study by image id.
            force: replace lists that are there and hold other ids.

        Raises:
            ValueError: a list would be replaced.
        """
        texts = {self.list_path(name): "\n".join([*ids, ""]) for name, ids in lists.items()}
        for path, text in texts.items():
            if path.exists() and not force:
                words = [line.split()[:1] for line in read_text(path).splitlines()]
                if sorted(filter(None, words)) != sorted([i] for i in text.split()):
                    raise ValueError(f"{path}: holds another split; replace it with --force.")
        (self.root / LISTS).mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for path, text in texts.items():
                file = stack.enter_context(write_atomically(path))
                file.write(text)
                file.flush()  # a full disk shows here, before the first file takes its place
            if patients is not None:
                file = stack.enter_context(write_atomically(self.root / PATIENTS))
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(PATIENT_FIELDS[:3])
                rows.writerows((image, *value) for image, value in sorted(patients.items()))
                file.flush()
        self.__dict__.pop("lists", None)
        if patients is not None:
            self.__dict__.pop("_rows", None)
            self.__dict__.pop("patients", None)

    def link(self, folder: Path) -> VocTree:
        """A tree of links to this one's images, annotations and tables, for lists of its own.

        Raises:
            ValueError: the folder holds something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ANNOTATIONS, *IMAGE_FOLDERS, *MASK_FOLDERS, PATIENTS, LABELS):
            link, source = folder / name, (self.root / name).resolve()
            if link.is_symlink() and link.resolve() == source:
                continue
            if link.is_symlink() or link.exists():
                what = f"leads to {link.resolve()}" if link.is_symlink() else "is no link"
                raise ValueError(f"{link}: {what}, expected a link to {source}; remove {folder}.")
            if source.exists():
                link.symlink_to(source)
        return VocTree(folder)

    def find(self, name: str) -> str | None:
        """The id of the image that a name in a list or table means; None if there is none."""
        name = plain(name.strip())
        if name in self.images:
            return name
        path = PurePosixPath(name.replace("\\", "/"))
        for candidate in (path.name, path.stem):
            suffix = path.suffix.lower() in (".dcm", *PICTURE_SUFFIXES)
            if candidate in self.images and (candidate == path.name or suffix):
                return candidate
        return None

    # ---- tables --------------------------------------------------------------------------------

    @property
    def has_patients(self) -> bool:
        """Whether there is a ``patients.csv``."""
        return (self.root / PATIENTS).exists()

    @cached_property
    def patients(self) -> dict[str, tuple[str, str]]:
        """(patient, study) by image id, as ``patients.csv`` says; without a study the patient
        stands for it. Empty if there is no such file; images that it does not name are counted in
        a warning.

        Raises:
            ValueError: no text, no header image,patient, a row without image or patient, an image
                with two patients or studies, or a row of an image that is not there while other
                images have none. The message names the file and the line.
        """
        path, patients = self.root / PATIENTS, {}
        for image, (number, row) in self._rows.items():
            if not row["patient"]:
                raise ValueError(
                    f"{path}, line {number}: the patient is empty; fill it or drop the line."
                )
            patients[image] = row["patient"], row.get("study") or row["patient"]
        if self.has_patients and (lacking := sorted(self.images.keys() - patients.keys())):
            warn_once(
                f"{path}: lacks {len(lacking)} of {len(self.images)} images, '{lacking[0]}' for"
                " one; their DICOM headers say whose they are, or each counts as a patient."
            )
        return patients

    @cached_property
    def places(self) -> dict[str, tuple[str, float]]:
        """Series and position along the slice normal in mm by image id, as ``patients.csv`` says.

        A series is known by its patient, study and series, as far as the columns are filled, since
        two patients may each have a series 1; so slices without a series are one of their study,
        or else of their patient. NaN for a position that is not given. Empty without the file.

        Raises:
            ValueError: as :attr:`patients`, or a position is no number.
        """
        places = {}
        for image, (number, row) in self._rows.items():
            text = row.get("position_mm", "")
            try:
                position = float(text or "nan")
            except ValueError:
                position = math.inf
            if math.isinf(position):
                raise ValueError(
                    f"{self.root / PATIENTS}, line {number}: position_mm is '{text[:40]}', expected"
                    " a number of millimetres."
                )
            names = (row.get(key, "") for key in ("patient", "study", "series"))
            places[image] = "\n".join(names), position
        return places

    @cached_property
    def _rows(self) -> dict[str, tuple[int, dict[str, str]]]:
        return self._join(PATIENTS, ("image", "patient"), PATIENT_FIELDS[1:])

    @cached_property
    def labels(self) -> dict[str, int]:
        """Labels that do not come from boxes by image id, as ``labels.csv`` says; 1 for a
        hemorrhage. Empty without the file.

        Raises:
            ValueError: no header image,label, a label that is neither 0 nor 1, an image with two
                labels, or a row of an image that is not there while other images have none. The
                message names file and line.
        """
        return self._labels(LABELS, "label")

    @cached_property
    def slice_labels(self) -> dict[str, int]:
        """As :attr:`labels`, or else what ``slices.csv`` (image,hemorrhage) says."""
        return self.labels or self._labels(SLICES, "hemorrhage")

    def _labels(self, name: str, column: str) -> dict[str, int]:
        labels = {}
        for image, (number, row) in self._join(name, ("image", column), (column,)).items():
            if row[column] not in ("0", "1"):
                raise ValueError(
                    f"{self.root / name}, line {number}: the {column} is {row[column]!r}, expected"
                    " 0 or 1."
                )
            labels[image] = int(row[column])
        return labels

    def _join(
        self, name: str, needed: Sequence[str], compared: Sequence[str]
    ) -> dict[str, tuple[int, dict[str, str]]]:
        """Line number and row of a table by image id; rows of one image must not differ."""
        path = self.root / name
        found: dict[str, tuple[int, dict[str, str]]] = {}
        strays = []
        for number, row in read_table(path, needed) if path.exists() else ():
            if not row["image"]:
                raise ValueError(
                    f"{path}, line {number}: the image is empty; fill it or drop the line."
                )
            image = self.find(row["image"])
            if image is None:
                strays.append((number, row["image"]))
                continue
            _, first = found.setdefault(image, (number, row))
            for key in compared:
                if row.get(key, "") != first.get(key, ""):
                    raise ValueError(
                        f"{path}, line {number}: the image {image} has the {key} '{row.get(key)}',"
                        f" but had '{first.get(key)}' before; expected one of each."
                    )
        if strays:
            number, image = strays[0]
            text = f"{path}: {len(strays)} rows are of no image in {self.root}"
            if len(found) < len(self.images):
                raise ValueError(
                    f"{text}, line {number} of '{image}', and {len(self.images) - len(found)}"
                    " images have no row; write image ids as the files' names without suffix."
                )
            warn_once(f"{text}, '{image}' for one; they are not used.")
        return found

    # ---- patients and places from headers ------------------------------------------------------

    def place(self, image: str) -> tuple[str, float]:
        """What tells the series of an image from all others, as identifying as its headers, and
        its position along the slice normal in mm: a DICOM file says it itself, for a picture
        ``patients.csv`` does; empty and NaN where neither does."""
        path = self.images[image]
        if is_picture(path):
            return self.places.get(image, ("", math.nan))
        return read_place(path)

    def header(self, image: str) -> tuple[str, str, str]:
        """Patient, study and image by the DICOM header, see ``dicom.read_identity``; empty for a
        picture."""
        path = self.images[image]
        return ("", "", "") if is_picture(path) else read_identity(path)

    @cached_property
    def header_patients(self) -> dict[str, str]:
        """What stands for the patient of each DICOM image in its header, by image id, see
        ``dicom.patient_keys``; as identifying as the headers. Images that do not say are left out.

        Raises:
            FileNotFoundError, ValueError: naming a file that cannot be read.
        """
        slices = {image: path for image, path in self.images.items() if not is_picture(path)}
        keys, warnings = patient_keys(slices.values())
        for warning in warnings:
            warn_once(f"{self.root}: {warning}.")
        return {image: keys[path] for image, path in slices.items() if keys[path]}

    def series(self) -> list[tuple[list[str], Sequence[str]]]:
        """The image ids of each series, and what is odd in its headers: gaps, orientation, pixels.

        Series of DICOM files are those of their headers, pictures those of ``patients.csv``.
        """
        found: list[tuple[list[str], Sequence[str]]] = []
        ids = {path: image for image, path in self.images.items()}
        if (folder := self.root / IMAGE_FOLDERS[0]).is_dir():
            for s in read_series(folder)[0]:
                found.append(([ids[path] for path in s.files if path in ids], s.notes))
        known = {image for members, _ in found for image in members}
        listed: dict[str, list[str]] = {}
        for image in sorted(self.places.keys() - known):
            listed.setdefault(self.places[image][0], []).append(image)
        return [(members, notes) for members, notes in found if members] + [
            (members, ()) for members in listed.values()
        ]


@cache  # a data set is read several times
def warn_once(message: str) -> None:
    """Logs a warning that was not logged before."""
    logger.warning(message)


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of a slice or picture in pixels, from its header.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    return picture_size(path) if is_picture(path) else read_size(path)


def plain(name: str) -> str:
    """A name in the one form of Unicode in which names are compared (NFC)."""
    return unicodedata.normalize("NFC", name)


def fit_id(name: str) -> str:
    """A file's name as an image id: what is no letter, digit, '_', '-' or '.' becomes '_'."""
    return re.sub(r"[^\w.-]", "_", plain(name)).lstrip(".") or "_"


def read_text(path: str | os.PathLike) -> str:
    """A text file in UTF-8, or in UTF-16 as Windows' shells write it; without byte order mark.

    Raises:
        ValueError: naming the file, if it is neither or cannot be read.
    """
    try:
        data = Path(path).read_bytes()
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text; save it in UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}).") from error


def read_table(
    path: str | os.PathLike, needed: Iterable[str], *, fold: Callable[[str], str] = str.lower
) -> list[tuple[int, dict[str, str]]]:
    """Reads a CSV file with a header.

    Args:
        path: of text as ``read_text`` takes it.
        needed: columns that the header must name.
        fold: applied to the header's names.

    Returns:
        Line number and row, by column, of each line that is not empty; values without spaces
        around them.

    Raises:
        ValueError: no such header, or no CSV; names the file and the line.
    """
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
    try:
        rows.fieldnames = [fold((name or "").strip()) for name in rows.fieldnames or ()]
        if not set(needed) <= set(rows.fieldnames):
            raise ValueError(
                f"{path}, line 1: the header is '{','.join(rows.fieldnames)[:80]}', expected"
                f" {','.join(needed)}, separated by commas."
            )
        return [
            (rows.line_num, {key: (value or "").strip() for key, value in row.items() if key})
            for row in rows
        ]
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: is not CSV ({error}).") from error


def _is_slice(path: Path) -> bool:
    """Whether a file of the folder DICOM is one: by its suffix, or else by its content."""
    return path.is_file() and (path.suffix.lower() == ".dcm" or is_dicom(path))
