"""Anchors from boxes: hand-worked centres, and the IoU they can reach."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ich_det2.anchors import Anchors, anchor_recall, best_iou, cluster_anchors


def lognormal_boxes(count, seed=0):
    return np.exp(np.random.default_rng(seed).normal(3, 0.7, size=(count, 2)))


boxes_wh = arrays(np.float64, st.tuples(st.integers(1, 30), st.just(2)), elements=st.floats(1, 500))

# ---- cluster_anchors ---------------------------------------------------------------------------


def test_boxes_of_one_kind_are_their_own_anchor():
    # 10 wide, 40 high: area 400, so size 20; ratio h/w 4.
    assert cluster_anchors([[10, 40]] * 5) == Anchors((20.0,), (4.0,))


def test_sizes_are_roots_of_mean_areas_and_ratios_are_mean_h_over_w():
    # Areas 100, 144 | 10000, 12100: centres 122 and 11050. Ratios all 1.
    sizes, ratios = cluster_anchors([[10, 10], [12, 12], [100, 100], [110, 110]], 2, 2)
    assert sizes == pytest.approx((122**0.5, 11050**0.5))
    assert ratios == (1.0,)
    # Areas 200 | 200 | 1800 | 1800; ratios 20/10 = 2, 1/2, 60/30 = 2, 1/2.
    sizes, ratios = cluster_anchors([[10, 20], [20, 10], [30, 60], [60, 30]], 2, 2)
    assert sizes == pytest.approx((200**0.5, 1800**0.5))
    assert ratios == pytest.approx((0.5, 2))


def test_linear_and_log_centres_by_hand():
    # Ratios 1 and 4 in one cluster: mean 2.5; geometric mean 2.
    boxes = [[10, 10], [5, 20]]
    assert cluster_anchors(boxes, 1, 1).aspect_ratios == pytest.approx((2.5,))
    assert cluster_anchors(boxes, 1, 1, ratio_space="log").aspect_ratios == pytest.approx((2,))


def test_centres_are_the_means_of_what_is_nearest_to_them():
    boxes = lognormal_boxes(2000)
    sizes, ratios = cluster_anchors(boxes)
    for values, centres in (
        (boxes.prod(axis=1), np.square(sizes)),
        (boxes[:, 1] / boxes[:, 0], ratios),
    ):
        nearest = np.abs(values[:, None] - np.asarray(centres)).argmin(axis=1)
        means = [values[nearest == i].mean() for i in range(3)]
        assert means == pytest.approx(list(centres), rel=1e-9)


def test_log_space_treats_width_and_height_alike():
    # Three kinds of boxes: flat, square, tall, each of log ratio -+ 0.2 or so.
    rng = np.random.default_rng(0)
    ratio = np.exp(rng.choice([-1.0, 0.0, 1.0], 300) + rng.normal(0, 0.1, 300))
    boxes = 20 * np.stack([ratio**-0.5, ratio**0.5], axis=1)
    turned = boxes[:, ::-1]
    one, other = (cluster_anchors(b, ratio_space="log").aspect_ratios for b in (boxes, turned))
    assert one == pytest.approx(tuple(1 / r for r in other[::-1]), rel=1e-6)
    one, other = (cluster_anchors(b).aspect_ratios for b in (boxes, turned))
    assert one != pytest.approx(tuple(1 / r for r in other[::-1]), rel=1e-3)


@pytest.mark.parametrize("ratio_space", ["linear", "log"])
def test_same_boxes_in_any_order_give_the_same_anchors(ratio_space):
    boxes = lognormal_boxes(500)
    first = cluster_anchors(boxes, ratio_space=ratio_space)
    assert cluster_anchors(boxes, ratio_space=ratio_space) == first
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(boxes)
        assert cluster_anchors(shuffled, ratio_space=ratio_space) == first


@given(boxes=boxes_wh, num_sizes=st.integers(1, 4), num_ratios=st.integers(1, 4))
def test_centres_ascend_within_the_boxes(boxes, num_sizes, num_ratios):
    sizes, ratios = cluster_anchors(boxes, num_sizes, num_ratios)
    areas, of_boxes = boxes.prod(axis=1), boxes[:, 1] / boxes[:, 0]
    assert len(sizes) == min(num_sizes, len(np.unique(areas)))
    assert len(ratios) == min(num_ratios, len(np.unique(of_boxes)))
    assert list(sizes) == sorted(sizes) and list(ratios) == sorted(ratios)
    slack = 1 + 1e-6
    assert areas.min() ** 0.5 / slack <= sizes[0] and sizes[-1] <= areas.max() ** 0.5 * slack
    assert of_boxes.min() / slack <= ratios[0] and ratios[-1] <= of_boxes.max() * slack


def test_fewer_distinct_boxes_than_clusters():
    sizes, ratios = cluster_anchors([[10, 10], [10, 10], [20, 40]], 3, 3)
    assert sizes == pytest.approx((10, 800**0.5)) and ratios == pytest.approx((1, 2))


def test_many_boxes_are_quick():
    boxes = lognormal_boxes(100_000)
    start = time.perf_counter()
    anchors = cluster_anchors(boxes)
    recall = anchor_recall(boxes, anchors, 0.5)
    assert time.perf_counter() - start < 15
    assert len(anchors.sizes) == len(anchors.aspect_ratios) == 3
    assert anchor_recall(boxes, Anchors((20.0,), (1.0,)), 0.5) < recall < 1


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], r"shape \(0,\), expected \(M, 2\)"),
        (np.zeros((0, 2)), r"shape \(0, 2\)"),
        ([[1, 2, 3]], r"shape \(1, 3\)"),
        ([10, 20], r"shape \(2,\)"),
        ([[10, 0]], "not a positive finite number"),
        ([[10, -1]], "not a positive finite number"),
        ([[10, np.nan]], "not a positive finite number"),
        ([[np.inf, 10]], "not a positive finite number"),
    ],
)
def test_bad_boxes_are_errors(boxes, message):
    with pytest.raises(ValueError, match=message):
        cluster_anchors(boxes)
    with pytest.raises(ValueError, match=message):
        best_iou(boxes, Anchors((10.0,), (1.0,)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_sizes": 0}, "at least 1 size and 1 ratio, got 0, 3"),
        ({"num_ratios": 0}, "at least 1 size and 1 ratio, got 3, 0"),
        ({"ratio_space": "sqrt"}, r"ratio_space is 'sqrt', expected one of \('linear', 'log'\)"),
    ],
)
def test_bad_arguments_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        cluster_anchors([[10, 10]], **kwargs)


# ---- best_iou, anchor_recall -------------------------------------------------------------------


def test_hand_worked_iou():
    boxes = [[10, 10], [20, 10], [5, 5], [40, 40], [5, 20]]
    # With 10 x 10: 1; 100 / 200; 25 / 100; 100 / 1600; 50 / (100 + 100 - 50).
    square = Anchors((10.0,), (1.0,))
    assert best_iou(boxes, square) == pytest.approx([1, 1 / 2, 1 / 4, 1 / 16, 1 / 3])
    # Ratio 4 adds 5 x 20, which fits the last; with 5 x 5: 25 / 100, with 20 x 10: 50 / 250.
    both = Anchors((10.0,), (1.0, 4.0))
    assert best_iou(boxes, both) == pytest.approx([1, 1 / 2, 1 / 4, 1 / 16, 1])


def test_recall_counts_boxes_at_the_threshold():
    square = Anchors((10.0,), (1.0,))
    boxes = [[10, 10], [20, 10], [5, 5], [40, 40]]  # IoU 1, 1/2, 1/4, 1/16
    assert [anchor_recall(boxes, square, t) for t in (0, 0.25, 0.5, 0.51, 1)] == [
        1, 3 / 4, 2 / 4, 1 / 4, 1 / 4,
    ]  # fmt: skip


@given(boxes=boxes_wh, scale=st.floats(0.1, 10))
def test_iou_is_invariant_to_scale_and_to_turning_both(boxes, scale):
    anchors = Anchors((8.0, 40.0), (0.5, 1.0, 3.0))
    iou = best_iou(boxes, anchors)
    assert ((iou > 0) & (iou <= 1 + 1e-12)).all()
    scaled = Anchors(tuple(s * scale for s in anchors.sizes), anchors.aspect_ratios)
    assert best_iou(boxes * scale, scaled) == pytest.approx(iou)
    turned = Anchors(anchors.sizes, tuple(1 / r for r in anchors.aspect_ratios))
    assert best_iou(boxes[:, ::-1], turned) == pytest.approx(iou)


@given(boxes=boxes_wh)
def test_more_anchors_never_fit_worse(boxes):
    few, more = Anchors((10.0,), (1.0,)), Anchors((10.0, 30.0), (0.5, 1.0))
    assert (best_iou(boxes, more) >= best_iou(boxes, few)).all()
