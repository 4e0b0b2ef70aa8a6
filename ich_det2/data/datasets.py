"""VOC trees of head CT as Detectron2 datasets."""

import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image, UnidentifiedImageError

from .context import find_context
from .dicom import read_identity, read_size
from .splits import find_images, read_labels, read_patients
from .tree_writer import pseudonym
from .voc import VocAnnotation, read_voc

SPLITS = ("train", "val", "test")

logger = logging.getLogger(__name__)


def register_ich_voc(
    name: str,
    root: str | Path,
    split: str,
    classes: Sequence[str] = ("hemorrhage",),
    *,
    context: int = 0,
    by_name: bool = False,
) -> None:
    """Registers a split of a VOC tree; nothing is read until the dataset is asked for.

    Args:
        name: in Detectron2's ``DatasetCatalog``; an earlier registration is replaced.
        root: folder with ``Annotations/*.xml``, ``DICOM/*.dcm`` or ``JPEGImages/*``,
            ``ImageSets/Main/<split>.txt`` and, if at hand, ``patients.csv``.
        split: name of the list in ``ImageSets/Main``.
        classes, context, by_name: see :func:`load_ich_voc`.
    """
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(
        name, lambda: load_ich_voc(root, split, classes, context=context, by_name=by_name)
    )
    MetadataCatalog.get(name).set(
        thing_classes=list(classes), ich_root=str(root), split=split, evaluator_type="ich"
    )


def register_ich_datasets(
    root: str | Path,
    classes: Sequence[str] = ("hemorrhage",),
    *,
    context: int = 0,
    by_name: bool = False,
) -> None:
    """Registers ``ich_train``, ``ich_val`` and ``ich_test`` of a VOC tree."""
    for split in SPLITS:
        register_ich_voc(f"ich_{split}", root, split, classes, context=context, by_name=by_name)


def load_ich_voc(
    root: str | Path,
    split: str,
    classes: Sequence[str] = ("hemorrhage",),
    *,
    context: int = 0,
    by_name: bool = False,
) -> list[dict]:
    """Reads a split of a VOC tree.

    Args:
        root: see :func:`register_ich_voc`.
        split: name of the list in ``ImageSets/Main``.
        classes: one name takes every object as that class, whatever its name in the XML; several
            names keep the types, and an object of another name is an error.
        context: neighbours on either side, which become channels (INPUT.CONTEXT_SLICES) or a
            sequence (INPUT.SEQUENCE_SLICES).
        by_name: see :func:`find_context`.

    Returns:
        Dataset dicts in the list's order: ``file_name``, ``image_id`` (the file's stem),
        ``patient_id``, ``study_id``, ``height``, ``width``, ``annotations`` (empty for a healthy
        slice; boxes XYXY_ABS, 0-based pixel edges), ``image_label`` (what
        ``labels.csv`` says, else 1 if there is a box); with
        context ``context_files``, pairs of file name and None, see :func:`find_context`.

    Raises:
        FileNotFoundError: if the root, the list, or an image or annotation is not there.
        ValueError: if the list is empty or a file's content is wrong.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"DATASETS.ICH_ROOT '{root}' is not a folder; give the folder that holds Annotations/"
            " and ImageSets/, or make the phantom by `python datasets/prepare_phantom.py"
            f" --output {root}`."
        )
    image_ids = _read_image_ids(root, split)
    patients, images = read_patients(root), find_images(root)
    labels = read_labels(root)
    beside = find_context(root, images, context, by_name=by_name) if context else {}
    dicts = []
    for image_id in image_ids:
        xml = root / "Annotations" / f"{image_id}.xml"
        if not xml.is_file():
            raise FileNotFoundError(
                f"{root}: '{image_id}' of ImageSets/Main/{split}.txt has no Annotations/"
                f"{image_id}.xml; a healthy slice needs one too, without objects."
            )
        annotation = read_voc(xml)
        image = _find_image(root, images, image_id, annotation)
        width, height = annotation.width, annotation.height
        if width is None or height is None:
            width, height = _image_size(image)
        if image_id in patients:
            patient, study = patients[image_id]
        else:
            patient, study = _header_patient(image, image_id)
        annotations = [
            {
                "bbox": list(obj.box),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": _category(obj.name, classes, xml),
                "type": obj.name,
                "iscrowd": 0,
            }
            for obj in annotation.objects
        ]
        dicts.append(
            {
                "file_name": str(image),
                "image_id": image_id,
                "patient_id": patient,
                "study_id": study,
                "height": height,
                "width": width,
                "annotations": annotations,
                "image_label": labels.get(image_id, int(len(annotations) > 0)),
            }
        )
        if context:
            dicts[-1]["context_files"] = [(str(images[i]), None) for i in beside[image_id]]
    if dicts and not patients and all(d["patient_id"] == d["image_id"] for d in dicts):
        logger.warning(
            "%s has no patients.csv: each image counts as a patient of its own in the diagnosis.",
            root,
        )
    return dicts


def check_images(dicts: Sequence[dict]) -> None:
    """Checks that each image of a dataset can be opened and has the size its dict says.

    Only headers are read and lengths compared, so that a bad file is named before hours of
    training and not within them.

    Raises:
        ValueError: naming the first file that is broken or of another size.
    """
    for d in dicts:
        path = Path(d["file_name"])
        width, height = _image_size(path)
        if (width, height) != (d["width"], d["height"]):
            raise ValueError(
                f"{path} is {width} x {height} pixels, but its annotation says {d['width']} x"
                f" {d['height']}; the boxes were drawn on another image."
            )


def _read_image_ids(root: Path, split: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; make the splits by `python datasets/make_splits.py {root}`."
        )
    ids = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not ids:
        raise ValueError(
            f"{path} is empty, so the split '{split}' has no images; make the splits anew by"
            f" `python datasets/make_splits.py {root} --force`."
        )
    for image_id in ids:
        if Path(image_id).name != image_id or "\\" in image_id:
            raise ValueError(f"{path} names '{image_id}', expected a file's stem without folder.")
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"{path} names '{twice}' more than once.")
    return ids


def _find_image(
    root: Path, images: dict[str, Path], image_id: str, annotation: VocAnnotation
) -> Path:
    """The image of an id; the name in its XML must be of the same stem."""
    if annotation.filename is not None and Path(annotation.filename).stem != image_id:
        raise ValueError(
            f"{annotation.path} names the image '{annotation.filename}', expected '{image_id}' with"
            " an image's suffix; the annotation belongs to another image or was renamed."
        )
    if image_id not in images:
        raise FileNotFoundError(
            f"{annotation.path} has no image: there is no DICOM/{image_id}.dcm and no JPEGImages/"
            f"{image_id}.jpg, .jpeg or .png in {root}."
        )
    return images[image_id]


def _image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    if path.suffix.lower() == ".dcm":
        height, width = read_size(path)
        return width, height
    try:
        with Image.open(path) as image:
            return image.size
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error


def _header_patient(path: Path, image_id: str) -> tuple[str, str]:
    """Pseudonyms of patient and study out of a DICOM header; the image itself without one."""
    if path.suffix.lower() != ".dcm":
        return image_id, image_id
    patient, study, _ = read_identity(path)
    return pseudonym("patient", patient or study or image_id), pseudonym(
        "study", study or patient or image_id
    )


def _category(name: str, classes: Sequence[str], xml: Path) -> int:
    if len(classes) == 1:
        return 0
    if name not in classes:
        raise ValueError(
            f"{xml} has an object '{name}', expected one of DATASETS.ICH_CLASSES {list(classes)}."
        )
    return list(classes).index(name)
