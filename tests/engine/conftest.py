"""A tree with all three splits, as the engine needs it."""

import pytest

BLEED = [("IPH", (11, 13, 30, 28))]
SPLITS = {"train": ("a", "b", "c", "d"), "val": ("e", "f"), "test": ("g", "h")}


@pytest.fixture
def full_tree(voc_tree):
    """Factory of a VOC tree: 4 training, 2 validation and 2 test slices, every other bleeds."""

    def make(kind="png"):
        for split, ids in SPLITS.items():
            images = {i: BLEED if n % 2 == 0 else [] for n, i in enumerate(ids)}
            root = voc_tree(images, split=split, kind=kind)
        patients = [f"{i},p-{i}" for ids in SPLITS.values() for i in ids]
        (root / "patients.csv").write_text("\n".join(["image,patient", *patients]) + "\n")
        return root

    return make
