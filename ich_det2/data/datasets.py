"""VOC trees of head CT as Detectron2 datasets."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from .context import find_context, find_places, find_scans
from .crop import find_tree_crops
from .dicom import check_dicom
from .masks import encode_mask
from .pictures import check_picture, is_picture
from .tree import SPLITS, VocTree, image_size
from .tree_writer import pseudonym

logger = logging.getLogger(__name__)


def register_ich_voc(
    name: str,
    root: str | Path,
    split: str,
    classes: Sequence[str] = ("hemorrhage",),
    *,
    context: int = 0,
    scan: int = 0,
    by_name: bool = False,
    head_crop: bool = False,
    masks: bool = False,
) -> None:
    """Registers a split of a VOC tree; nothing is read until the dataset is asked for.

    Args:
        name: in Detectron2's ``DatasetCatalog``; an earlier registration is replaced.
        root: folder with ``Annotations/*.xml``, ``DICOM/*.dcm`` or ``JPEGImages/*``,
            ``ImageSets/Main/<split>.txt`` and, if at hand, ``patients.csv``.
        split: name of the list in ``ImageSets/Main``.
        classes, context, scan, by_name, head_crop, masks: see :func:`load_ich_voc`.
    """
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(
        name,
        lambda: load_ich_voc(
            root,
            split,
            classes,
            context=context,
            scan=scan,
            by_name=by_name,
            head_crop=head_crop,
            masks=masks,
        ),
    )
    MetadataCatalog.get(name).set(thing_classes=list(classes), split=split)


def register_ich_datasets(
    root: str | Path,
    classes: Sequence[str] = ("hemorrhage",),
    **settings,
) -> None:
    """Registers ``ich_<list>`` for each list in ``ImageSets/Main`` of a VOC tree, by
    :func:`register_ich_voc`, which the settings are arguments of.

    ``ich_train``, ``ich_val`` and ``ich_test`` are registered even where they, or the tree, are
    missing: who asks for one of them is told so.
    """
    lists = VocTree(root).lists if Path(root).is_dir() else ()
    for split in dict.fromkeys((*SPLITS, *lists)):
        register_ich_voc(f"ich_{split}", root, split, classes, **settings)


def load_ich_voc(
    root: str | Path,
    split: str,
    classes: Sequence[str] = ("hemorrhage",),
    *,
    context: int = 0,
    scan: int = 0,
    by_name: bool = False,
    head_crop: bool = False,
    masks: bool = False,
) -> list[dict]:
    """Reads a split of a VOC tree.

    Args:
        root: see :func:`register_ich_voc`.
        split: name of the list in ``ImageSets/Main``.
        classes: one name takes every object as that class, whatever its name in the XML; several
            names keep the types, and an object of another name is an error.
        context: neighbours on either side, which become channels (INPUT.CONTEXT_SLICES) or a
            sequence (INPUT.SEQUENCE_SLICES).
        scan: slices of the scan that each slice is shown as a part of (INPUT.SCAN_SLICES).
        by_name: see :func:`find_context`.
        head_crop: see :func:`find_tree_crops` (INPUT.HEAD_CROP).
        masks: also read ``SegmentationObject/`` or ``SegmentationClass/``, see
            :meth:`VocTree.masks` (INPUT.MASK_FORMAT).

    Returns:
        Dataset dicts in the list's order: ``file_name``, ``image_id`` (the file's stem),
        ``patient_id``, ``study_id``, ``height``, ``width``, ``annotations`` (empty for a healthy
        slice; boxes XYXY_ABS, 0-based pixel edges; with masks "segmentation", run lengths as
        Detectron2's bitmask format, where the mask is known), ``image_label`` (what
        ``labels.csv`` says, else 1 if there is a box); where the place is known ``series`` and
        ``position_mm``, see :func:`find_places`; with context ``context_files``, pairs of file name
        and None, see :func:`find_context`; with scan ``scan_files``, such pairs, see
        :func:`find_scans`; with head_crop ``crop``, where there is a head:
        (x0, y0, x1, y1), pixel edges of the whole slice.

    Raises:
        FileNotFoundError: if the root, the list, or an image or annotation is not there.
        ValueError: if the list is empty or a file's content is wrong.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"DATASETS.ICH_ROOT '{root}' is not a folder; give the folder that holds Annotations/"
            " and ImageSets/, or make the phantom by `python datasets/prepare_phantom.py"
            f" --output {root}`."
        )
    tree = VocTree(root)
    image_ids = tree.read_list(split)
    beside = find_context(tree, context, by_name=by_name) if context else {}
    scans = find_scans(tree, image_ids, scan, by_name=by_name) if scan else {}
    places = find_places(tree, image_ids, by_name=by_name)
    crops = find_tree_crops(tree, image_ids) if head_crop else {}
    dicts = []
    for image_id in image_ids:
        try:
            annotation = tree.annotation(image_id)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{tree.root}: '{image_id}' of ImageSets/Main/{split}.txt has no Annotations/"
                f"{image_id}.xml; a healthy slice needs one too, without objects."
            ) from error
        width, height = annotation.width, annotation.height
        if width is None or height is None:
            height, width = tree.size(image_id)
        patient, study = _patient(tree, image_id)
        annotations = [
            {
                "bbox": list(obj.box),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": _category(obj.name, classes, annotation.path),
                "type": obj.name,
                "iscrowd": 0,
            }
            for obj in annotation.objects
        ]
        if annotations and tree.labels.get(image_id) == 0:
            raise ValueError(
                f"{annotation.path} has {len(annotations)} boxes of hemorrhage, but labels.csv of"
                f" {tree.root} says 0, no hemorrhage, of '{image_id}'; one of them is wrong: mend"
                " the label or remove the boxes."
            )
        for entry, mask in zip(annotations, tree.masks(image_id) if masks and annotations else ()):
            if mask is not None:
                entry["segmentation"] = encode_mask(mask)
        dicts.append(
            {
                "file_name": str(tree.images[image_id]),
                "image_id": image_id,
                "patient_id": patient,
                "study_id": study,
                "height": height,
                "width": width,
                "annotations": annotations,
                "image_label": tree.labels.get(image_id, int(len(annotations) > 0)),
            }
        )
        if image_id in places:
            dicts[-1]["series"], dicts[-1]["position_mm"] = places[image_id]
        if context:
            dicts[-1]["context_files"] = [(str(tree.images[i]), None) for i in beside[image_id]]
        if scan:
            dicts[-1]["scan_files"] = [(str(tree.images[i]), None) for i in scans[image_id]]
        if image_id in crops:
            dicts[-1]["crop"] = crops[image_id]
    _count_cut(dicts)
    if not tree.patients and all(d["patient_id"] == d["image_id"] for d in dicts):
        logger.warning(
            "%s has no patients.csv: each image counts as a patient of its own in the diagnosis.",
            root,
        )
    return dicts


def check_images(dicts: Sequence[dict]) -> None:
    """Checks that each image of a dataset can be read and has the size its dict says.

    A picture is read as in training; of a DICOM file the header is read and lengths compared. So a
    bad file is named before hours of training and not within them.

    Raises:
        FileNotFoundError, ValueError: naming the first file that is broken or of another size.
    """
    with ThreadPoolExecutor() as pool:
        for d, (height, width) in zip(dicts, pool.map(_checked_size, dicts)):
            if (width, height) != (d["width"], d["height"]):
                raise ValueError(
                    f"{d['file_name']} is {width} x {height} pixels, but its annotation says"
                    f" {d['width']} x {d['height']}; the boxes were drawn on another image."
                )


def fingerprints(names: Iterable[str]) -> dict[str, dict]:
    """What is in datasets now, for a record with which it can be compared later.

    Args:
        names: of datasets; those that are not in Detectron2's ``DatasetCatalog`` are left out.

    Returns:
        :func:`fingerprint` by name.

    Raises:
        FileNotFoundError, ValueError: of a dataset that cannot be read.
    """
    known = DatasetCatalog.list()
    return {n: fingerprint(DatasetCatalog.get(n)) for n in dict.fromkeys(names) if n in known}


def fingerprint(dicts: Sequence[dict]) -> dict[str, int | str]:
    """What tells a dataset from the same one after a change: of its slices, their order, their
    truth, patients and places, or of a file. An image counts by its file's name and size, wherever
    its folder is; its pixels are not read. The settings with which it is read play no part.

    Args:
        dicts: Detectron2's dataset dicts.

    Returns:
        "images" and "boxes", their numbers, "sha256" of what is known of all, and "masks", that of
        the masks where these were read.
    """
    all_known, all_masks, boxes = hashlib.sha256(), hashlib.sha256(), 0
    masked = False
    for d in dicts:
        path = Path(d["file_name"])
        known = {key: value for key, value in d.items() if key not in _OF_SETTINGS}
        known["file"] = path.name, path.stat().st_size if path.is_file() else None
        if "series" in known:  # its own name; patient and study are known beside
            known["series"] = str(known["series"]).rstrip("\n").rpartition("\n")[2]
        known["annotations"], masks = [], []
        for annotation in d.get("annotations", ()):
            name = "type" if "type" in annotation else "category_id"
            known["annotations"].append([annotation["bbox"], annotation[name]])
            masks.append(annotation.get("segmentation"))
        boxes += len(masks)
        masked |= any(masks)
        for digest, value in ((all_known, known), (all_masks, masks)):
            digest.update(json.dumps(value, sort_keys=True, default=_as_json).encode() + b"\n")
    found = {"images": len(dicts), "boxes": boxes, "sha256": all_known.hexdigest()}
    return found | ({"masks": all_masks.hexdigest()} if masked else {})


# Of a dataset dict, what follows from files and settings, and what a fingerprint has otherwise.
_OF_SETTINGS = frozenset(("file_name", "annotations", "crop", "context_files", "scan_files"))


def _as_json(value):
    """What JSON has no form for: bytes of run lengths, NumPy's arrays and numbers."""
    return value.decode("latin-1") if isinstance(value, bytes) else value.tolist()


def _count_cut(dicts: Sequence[dict]) -> None:
    """Warns of boxes that crops take away: in training those bleeds would count as background."""
    cut = []
    for d in (d for d in dicts if "crop" in d):
        left, top, right, bottom = d["crop"]
        for x0, y0, x1, y1 in (a["bbox"] for a in d["annotations"]):
            if not (left <= (x0 + x1) / 2 <= right and top <= (y0 + y1) / 2 <= bottom):
                cut.append(d["file_name"])
    if cut:
        logger.warning(
            "INPUT.HEAD_CROP: the middle of %d boxes lies outside of the head that was found, the"
            " first of %s; look at these boxes, or switch the crop off.",
            len(cut),
            cut[0],
        )


def _checked_size(dataset_dict: dict) -> tuple[int, int]:
    path = Path(dataset_dict["file_name"])
    if is_picture(path):
        return check_picture(path)
    check_dicom(path)
    return image_size(path)


def _patient(tree: VocTree, image_id: str) -> tuple[str, str]:
    """Patient and study: by ``patients.csv``; else pseudonyms out of the DICOM header; else the
    image itself."""
    if image_id in tree.patients:
        return tree.patients[image_id]
    patient = tree.header_patients.get(image_id)
    if patient is None:
        return image_id, image_id
    return pseudonym("patient", patient), pseudonym("study", tree.header(image_id)[1] or patient)


def _category(name: str, classes: Sequence[str], xml: Path) -> int:
    if len(classes) == 1:
        return 0
    if name not in classes:
        raise ValueError(
            f"{xml} has an object '{name}', expected one of DATASETS.ICH_CLASSES {list(classes)}."
        )
    return list(classes).index(name)
