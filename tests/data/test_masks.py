"""Masks of objects: numbered in a picture, shared among boxes, and as run lengths."""

import json

import numpy as np
import pytest

from ich_det2.data.masks import (
    decode_mask,
    encode_mask,
    labels_of_masks,
    masks_of_labels,
    share_among_boxes,
)


def test_run_lengths_read_back_and_fit_json():
    mask = np.random.default_rng(0).random((5, 7)) > 0.5
    rle = json.loads(json.dumps(encode_mask(mask)))
    assert rle["size"] == [5, 7]
    back = decode_mask(rle)
    assert back.dtype == bool and np.array_equal(back, mask)


def test_of_two_objects_the_smaller_has_the_pixel():
    large, small = np.zeros((2, 4, 4), bool)
    large[:3, :3], small[2:, 2:] = True, True  # 9 and 4 pixels, (2, 2) in both
    labels = labels_of_masks([large, None, small], (4, 4))
    assert labels.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 3, 3], [0, 0, 3, 3]]
    first, second, third = masks_of_labels(labels, 3)
    assert first.sum() == 8 and second is None and np.array_equal(third, small)


def test_void_is_nobodys():
    first, second = masks_of_labels(np.array([[0, 1, 255]]), 2)
    assert first.tolist() == [[False, True, False]] and second is None


def test_a_mask_is_shared_among_its_boxes_and_no_pixel_counts_twice():
    mask = np.ones((4, 8), bool)
    # 4 x 6 and 2 x 3 pixels, which meet in columns 4 and 5 of rows 0 and 1; then one beside them
    # that overlaps none, and one of no pixel's middle.
    boxes = [(0, 0, 6, 4), (4, 0, 7, 2), (7, 3, 8, 4), (7.6, 0, 8, 0.4)]
    shares = share_among_boxes(mask, boxes)
    assert [None if s is None else int(s.sum()) for s in shares] == [24 - 4, 6, 1, None]
    assert sum(s.astype(int) for s in shares[:3]).max() == 1
    # A mask that misses a box says nothing of what is in it.
    assert share_among_boxes(np.zeros((4, 8), bool), boxes[:1]) == [None]


@pytest.mark.parametrize("box", [(-3, -3, 2, 2), (0, 0, 2.2, 1.9)])
def test_boxes_end_at_the_middle_of_a_pixel_and_at_the_border(box):
    (share,) = share_among_boxes(np.ones((4, 4), bool), [box])
    assert share.sum() == 4 and share[:2, :2].all()
