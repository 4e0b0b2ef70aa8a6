"""Lesions found against false positives: by hand, and against a count from scratch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.evaluation.froc import (
    CPM_RATES,
    DUPLICATE,
    FALSE_POSITIVE,
    froc_curve,
    match_detections,
)


def boxes(rows, columns=5):
    return np.array(rows, dtype=float).reshape(-1, columns)


# Three images of two patients: images 0 and 1 are of patient 0. Image 2 has no lesion.
TRUE = [boxes([(0, 0, 10, 10), (20, 0, 10, 10)], 4), boxes([(0, 0, 10, 10)], 4), boxes([], 4)]
PREDICTED = [
    boxes(
        [
            (0.9, 0, 0, 10, 10),  # finds the first lesion
            (0.8, 1, 0, 10, 10),  # the same again: a duplicate
            (0.4, 20, 0, 10, 10),  # finds the second
            (0.7, 50, 50, 10, 10),  # a false positive
        ]
    ),
    boxes([(0.7, 2, 2, 10, 10)]),  # IoU 64 / 136 = 0.47; centre (7, 7) within
    boxes([(0.6, 5, 5, 10, 10), (0.4, 0, 0, 5, 5)]),  # false positives
]


def brute_force(predicted, true, threshold, *, iou_threshold, n_scans):
    """False positives a scan and sensitivity at one threshold, from nothing but the definition."""

    def iou(a, b):
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        return inter / (a[2] * a[3] + b[2] * b[3] - inter)

    false = found = 0
    for rows, lesions in zip(predicted, true):
        free = [tuple(b) for b in lesions]
        for row in sorted((tuple(r) for r in rows if r[0] >= threshold), key=lambda r: -r[0]):
            near = [b for b in lesions if iou(row[1:], b) >= iou_threshold]
            open_ = sorted((b for b in free if iou(row[1:], b) >= iou_threshold),
                           key=lambda b: -iou(row[1:], b))  # fmt: skip
            if open_:
                free.remove(open_[0])
                found += 1
            elif not near:
                false += 1
    return false / n_scans, found / sum(map(len, true))


def test_hand_worked_curve_at_image_level():
    matches = match_detections(PREDICTED, TRUE, hit="iou", iou_threshold=0.5)
    assert matches.score.tolist() == [0.9, 0.8, 0.7, 0.7, 0.6, 0.4, 0.4]
    found = dict(zip(zip(matches.image.tolist(), matches.score.tolist()), matches.lesion.tolist()))
    assert found[0, 0.9] == 0 and found[0, 0.8] == DUPLICATE and found[0, 0.4] == 1
    assert found[0, 0.7] == found[1, 0.7] == found[2, 0.6] == FALSE_POSITIVE
    curve = froc_curve(matches)
    # Both 0.7 enter together, and so do both 0.4; three images, three lesions.
    assert curve.thresholds.tolist() == [np.inf, 0.9, 0.8, 0.7, 0.6, 0.4]
    assert curve.false_positives.tolist() == [0, 0, 0, 2 / 3, 3 / 3, 4 / 3]
    assert curve.sensitivity.tolist() == [0, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3]
    # Up to 1 false positive: 1/3 (threshold 0.6); 2 and more: 2/3.
    assert curve.sensitivity_at().tolist() == [1 / 3] * 4 + [2 / 3] * 3
    assert curve.cpm == pytest.approx((4 / 3 + 6 / 3) / 7)


def test_hand_worked_curve_by_centre_at_patient_level():
    matches = match_detections(PREDICTED, TRUE, hit="centre")
    curve = froc_curve(matches, scans=[0, 0, 1])
    # Image 1's centre (7, 7) lies in its lesion. False positives 0.7, 0.6, 0.4 over two patients.
    assert curve.false_positives.tolist() == [0, 0, 0, 1 / 2, 2 / 2, 3 / 2]
    assert curve.sensitivity.tolist() == [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 3 / 3]


def test_a_prediction_takes_the_lesion_it_fits_best_and_leaves_the_other():
    true = [boxes([(0, 0, 10, 10), (4, 0, 10, 10)], 4)]
    predicted = [boxes([(0.9, 3, 0, 10, 10), (0.8, 1, 0, 10, 10)])]
    matches = match_detections(predicted, true, hit="iou", iou_threshold=0.4)
    assert matches.lesion.tolist() == [1, 0]


# Few places and sizes, so that overlaps, duplicates and ties are the rule.
place = st.sampled_from([0, 2, 4, 10, 12])
side = st.sampled_from([6, 8, 10])
true_box = st.tuples(place, place, side, side)
scored_box = st.tuples(st.sampled_from([0.1, 0.5, 0.6, 0.9]), place, place, side, side)
image = st.tuples(
    st.lists(scored_box, max_size=6, unique_by=lambda b: b[0]),
    st.lists(true_box, max_size=3, unique=True),
)


@given(
    images=st.lists(image, min_size=1, max_size=6),
    iou_threshold=st.sampled_from([0.1, 0.3, 0.5]),
)
def test_curve_equals_a_count_from_scratch_at_every_threshold(images, iou_threshold):
    predicted, true = [boxes(p) for p, _ in images], [boxes(t, 4) for _, t in images]
    matches = match_detections(predicted, true, hit="iou", iou_threshold=iou_threshold)
    curve = froc_curve(matches)
    if not any(map(len, true)):
        assert np.isnan(curve.sensitivity).all()
        return
    for threshold, *ours in zip(curve.thresholds, curve.false_positives, curve.sensitivity):
        expected = brute_force(
            predicted, true, threshold, iou_threshold=iou_threshold, n_scans=len(images)
        )
        assert ours == pytest.approx(expected, abs=1e-12)


@given(images=st.lists(image, min_size=1, max_size=5), data=st.data())
def test_weights_are_repetitions_of_images(images, data):
    weights = data.draw(
        st.lists(st.integers(0, 2), min_size=len(images), max_size=len(images)).filter(any)
    )
    predicted, true = [boxes(p) for p, _ in images], [boxes(t, 4) for _, t in images]
    ours = froc_curve(match_detections(predicted, true), weights=weights)
    repeated = np.repeat(np.arange(len(images)), weights)
    theirs = froc_curve(
        match_detections([predicted[i] for i in repeated], [true[i] for i in repeated])
    )
    np.testing.assert_allclose(ours.sensitivity_at(), theirs.sensitivity_at(), atol=1e-12)


def test_without_predictions_nothing_is_found():
    curve = froc_curve(match_detections([boxes([])] * 2, [boxes([(0, 0, 5, 5)], 4), boxes([], 4)]))
    assert curve.thresholds.tolist() == [np.inf]
    assert curve.sensitivity_at().tolist() == [0] * len(CPM_RATES)


def test_without_lesions_sensitivity_is_undefined_and_false_positives_are_not():
    curve = froc_curve(match_detections([boxes([(0.5, 0, 0, 5, 5)])], [boxes([], 4)]))
    assert np.isnan(curve.sensitivity).all() and curve.false_positives.tolist() == [0, 1]
    assert np.isnan(curve.cpm)


@pytest.mark.parametrize(
    ("predicted", "kwargs", "message"),
    [
        ([boxes([])], {"hit": "mask"}, "hit is 'mask', expected 'iou' or 'centre'"),
        ([boxes([])] * 2, {}, "2 images and true boxes of 1"),
        ([boxes([(np.nan, 0, 0, 5, 5)])], {}, "image 0 holds NaN"),
    ],
)
def test_bad_input_is_an_error(predicted, kwargs, message):
    with pytest.raises(ValueError, match=message):
        match_detections(predicted, [boxes([(0, 0, 5, 5)], 4)], **kwargs)
