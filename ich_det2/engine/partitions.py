"""Who is trained on, selected on and tested on: the patients of the data sets really used."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

ROLES = ("TRAIN", "VAL", "TEST")
"""Keys under DATASETS."""


def names_of(cfg: CfgNode) -> list[str]:
    """The datasets that a config trains, selects and tests on, each once."""
    return list(dict.fromkeys(name for role in ROLES for name in cfg.DATASETS[role]))


def overlaps(
    cfg: CfgNode,
    roles: Sequence[str] = ROLES,
    read: Callable[[str], list[dict]] = DatasetCatalog.get,
) -> Iterator[tuple[str, str, dict[str, tuple[str, str]]]]:
    """Pairs of roles that share patients.

    Yields:
        The two roles, and patient -> its data sets in the one and in the other.
    """
    patients = {role: patients_of(cfg.DATASETS[role], read) for role in roles}
    for first, other in combinations(roles, 2):
        both = patients[first].keys() & patients[other].keys()
        if both:
            yield first, other, {p: (patients[first][p], patients[other][p]) for p in both}


def patients_of(
    datasets: Sequence[str], read: Callable[[str], list[dict]] = DatasetCatalog.get
) -> dict[str, str]:
    """The patients of data sets, and the one that each is in.

    An image of no known patient is a patient of its own.
    """
    return {str(d.get("patient_id", d["file_name"])): name for name in datasets for d in read(name)}


def share_images(first: Sequence[str], other: Sequence[str]) -> bool:
    """Whether an image is in both of two groups of data sets, whatever these are called."""
    if set(first) & set(other):
        return True
    files, others = (
        {d["file_name"] for name in names for d in DatasetCatalog.get(name)}
        for names in (first, other)
    )
    return bool(files & others)
