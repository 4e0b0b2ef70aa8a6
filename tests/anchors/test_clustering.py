"""Anchors from boxes: hand-worked centres, and the IoU they can reach."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ich_det2.anchors import (
    AnchorPairs,
    Anchors,
    anchor_recall,
    best_iou,
    cluster_anchors,
    cluster_pairs,
)
from ich_det2.anchors.clustering import MAX_DISTINCT


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


def test_equal_boxes_count_as_often_as_they_are_there():
    # Areas 100, 100, 100, 900: mean 300. Ratios 1, 1, 1, 9: mean 3.
    sizes, ratios = cluster_anchors([[10, 10]] * 3 + [[10, 90]], 1, 1)
    assert sizes == pytest.approx((300**0.5,)) and ratios == pytest.approx((3,))


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
        cluster_pairs(boxes)
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


def test_no_pair_is_an_error():
    with pytest.raises(ValueError, match="at least 1 pair, got 0"):
        cluster_pairs([[10, 10]], 0)


def test_many_distinct_boxes_keep_the_centres_of_all():
    # More than are clustered one by one: groups stand for their neighbours.
    boxes = lognormal_boxes(3 * MAX_DISTINCT)
    sizes, ratios = cluster_anchors(boxes)
    for values, centres in (
        (boxes.prod(axis=1), np.square(sizes)),
        (boxes[:, 1] / boxes[:, 0], ratios),
    ):
        nearest = np.abs(values[:, None] - np.asarray(centres)).argmin(axis=1)
        means = [values[nearest == i].mean() for i in range(3)]
        assert means == pytest.approx(list(centres), rel=2e-3)


# ---- cluster_pairs -----------------------------------------------------------------------------


def test_pairs_are_the_medians_of_widths_and_of_heights():
    # One cluster: widths 10, 10, 12, 20, 20 and heights 12, 15, 15, 15, 20 have the medians 12 and
    # 15, which no box has. (Without the weight of the box that is there twice: 10 and 15.)
    boxes = [[10, 15], [10, 12], [20, 15], [20, 15], [12, 20]]
    assert cluster_pairs(boxes, 1) == AnchorPairs(((12.0, 15.0),))
    # Two: flat ones of widths 30, 40, 80 (heights 10), tall ones, twice 10 x 50 and 20 x 50.
    boxes = [[30, 10], [10, 50], [80, 10], [20, 50], [40, 10], [10, 50]]
    pairs = cluster_pairs(boxes, 2)
    assert pairs == AnchorPairs(((40.0, 10.0), (10.0, 50.0)))  # areas 400, 500
    # IoU: 300/400, 1, 400/800 and 1, 1, 500/1000.
    assert best_iou(boxes, pairs) == pytest.approx([3 / 4, 1, 1 / 2, 1 / 2, 1, 1])


def test_pairs_express_what_sizes_times_ratios_cannot():
    # Small ones flat, large ones tall: the product of two sizes and two ratios wastes two anchors.
    boxes = [[20, 10]] * 3 + [[30, 60]] * 2
    assert cluster_pairs(boxes, 2) == AnchorPairs(((20.0, 10.0), (30.0, 60.0)))
    assert best_iou(boxes, cluster_pairs(boxes, 2)).tolist() == [1] * 5
    assert best_iou(boxes, cluster_anchors(boxes, 2, 1)).max() < 1


@pytest.mark.parametrize("seed", range(5))
def test_kinds_that_lie_apart_get_a_pair_each(seed):
    # Most single starts put two pairs into one kind and miss another.
    sides = (10, 40, 160)
    kinds = np.array([(w, h) for w in sides for h in sides])
    boxes = np.repeat(kinds, 20, axis=0) * np.random.default_rng(seed).uniform(0.8, 1.25, (180, 2))
    pairs = cluster_pairs(boxes, 9, seed=seed).wh()
    nearest = np.abs(np.log(kinds[:, None] / pairs)).max(axis=2).min(axis=1)
    assert (nearest < np.log(1.25)).all()


@pytest.mark.parametrize("num_pairs", [1, 2, 9])
def test_equal_boxes_give_one_pair(num_pairs):
    assert cluster_pairs([[10, 40]], num_pairs) == AnchorPairs(((10.0, 40.0),))
    assert cluster_pairs([[10, 40]] * 7, num_pairs) == AnchorPairs(((10.0, 40.0),))


def test_fewer_distinct_boxes_than_pairs():
    boxes = [[20, 40], [10, 10], [40, 20], [10, 10]]
    pairs = cluster_pairs(boxes, 9).pairs
    assert pairs == ((10.0, 10.0), (20.0, 40.0), (40.0, 20.0))  # by area, then by width


@given(boxes=boxes_wh, num_pairs=st.integers(1, 6))
def test_pairs_ascend_within_the_boxes(boxes, num_pairs):
    pairs = cluster_pairs(boxes, num_pairs).wh()
    assert 1 <= len(pairs) <= min(num_pairs, len(np.unique(boxes, axis=0)))
    assert (np.diff(pairs.prod(axis=1)) >= 0).all()
    # A median is one of the values.
    assert np.isin(pairs[:, 0], boxes[:, 0]).all() and np.isin(pairs[:, 1], boxes[:, 1]).all()


@given(boxes=boxes_wh, num=st.integers(1, 4), seed=st.integers(0, 9))
def test_the_order_of_the_boxes_does_not_matter(boxes, num, seed):
    shuffled = np.random.default_rng(seed).permutation(boxes)
    assert cluster_pairs(shuffled, num) == cluster_pairs(boxes, num)
    assert cluster_anchors(shuffled, num, num) == cluster_anchors(boxes, num, num)


def test_the_order_does_not_matter_for_many_boxes():
    boxes = lognormal_boxes(3 * MAX_DISTINCT)
    assert cluster_pairs(boxes[::-1], 4) == cluster_pairs(boxes, 4)
    assert cluster_anchors(boxes[::-1]) == cluster_anchors(boxes)


def test_every_box_twice_gives_the_same_pairs():
    boxes = lognormal_boxes(500)
    assert cluster_pairs(np.repeat(boxes, 2, axis=0)) == cluster_pairs(boxes)


def test_a_single_outlier_does_not_move_the_pair():
    # The median of three boxes alike and one other, wherever it lies.
    assert cluster_pairs([[10, 10]] * 3 + [[500, 300]], 1) == AnchorPairs(((10.0, 10.0),))


@pytest.mark.parametrize("seed", range(5))
def test_on_correlated_boxes_pairs_fit_better_than_sizes_times_ratios(seed):
    # Small boxes are flat and large ones tall, so most of sizes times ratios meets no box.
    rng = np.random.default_rng(seed)
    log_size, noise = rng.normal(3, 0.6, 2000), rng.normal(0, 0.15, (2000, 2))
    log_ratio = 1.2 * (log_size - 3)
    boxes = np.exp(np.stack([log_size - log_ratio / 2, log_size + log_ratio / 2], axis=1) + noise)
    joint = best_iou(boxes, cluster_pairs(boxes, 9)).mean()
    for space in ("linear", "log"):
        assert joint > best_iou(boxes, cluster_anchors(boxes, ratio_space=space)).mean() + 0.05


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


def test_pairs_and_their_sizes_and_ratios_fit_alike():
    # 10 x 10 and 5 x 20 are size 10 with the ratios 1 and 4.
    boxes, square = [[10, 10], [20, 10], [5, 5], [5, 20]], Anchors((10.0,), (1.0, 4.0))
    pairs = AnchorPairs(((10.0, 10.0), (5.0, 20.0)))
    assert square.wh().tolist() == pairs.wh().tolist()
    assert best_iou(boxes, pairs).tolist() == best_iou(boxes, square).tolist()
    assert anchor_recall(boxes, pairs, 0.51) == 2 / 4


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
