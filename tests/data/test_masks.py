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
    mask = np.zeros((6, 9), bool)
    mask[:4, :6], mask[:2, 6:8], mask[5, 8] = True, True, True
    # 4 x 6 and 2 x 3 pixels, which meet in columns 4 and 5 of rows 0 and 1; one of no pixel's
    # middle, and one that the mask misses.
    boxes = [(0, 0, 6, 4), (4, 0, 7, 2), (7.6, 0, 8, 0.4), (0, 5, 3, 6)]
    first, second, *others = share_among_boxes(mask, boxes)
    # Column 7 of rows 0 and 1 is in no box, and connected with the first most of all.
    assert (first.sum(), second.sum()) == (24 - 4 + 2, 6) and others == [None, None]
    assert not (first & second).any() and first[:2, 7].all()
    # The pixel in the corner touches nothing in a box.
    assert np.array_equal(first | second, mask & (np.arange(6) < 5)[:, None])


@pytest.mark.parametrize("box", [(-3, -3, 2.6, 2.6), (0, 0, 3, 3), (0, 0, 4.4, 3.4)])
def test_boxes_end_at_the_middle_of_a_pixel_and_at_the_border(box):
    mask = np.zeros((5, 5), bool)
    mask[::2, ::2] = True  # that do not touch
    (share,) = share_among_boxes(mask, [box])
    assert share.sum() == 4 and share[[0, 0, 2, 2], [0, 2, 0, 2]].all()
