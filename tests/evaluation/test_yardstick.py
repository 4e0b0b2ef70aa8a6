"""The yardstick: worked by hand, against COCO's own AP, and by copies of drawn patients."""

import numpy as np
import pytest

from ich_det2.evaluation.boxes import average_precision
from ich_det2.evaluation.predictions import Predictions
from ich_det2.evaluation.yardstick import RECALL, Yardstick, match_boxes, paired_differences


def predictions(rows):
    """Rows (patient, label, boxes (D, 5), true boxes (G, 4), types); scores are the top boxes'."""
    patients, labels, boxes, true, types = zip(*rows)
    boxes = [np.array(b, dtype=float).reshape(-1, 5) for b in boxes]
    return Predictions(
        *([f"{i:03d}" for i in range(len(rows))], list(patients), [""] * len(rows)),
        *(np.array(labels), np.array([b[:, 0].max(initial=0.0) for b in boxes]), boxes),
        [np.array(t, dtype=float).reshape(-1, 4) for t in true],
        [list(t) for t in types],
    )


def drawn_sample(rng, n_patients=8):
    rows = []
    for i in range(4 * n_patients):
        label = int(i // 4 % 2 and rng.random() < 0.6)
        true = np.c_[rng.uniform(0, 50, (2, 2)), rng.uniform(10, 30, (2, 2))] * label
        near = np.c_[rng.random(2), true + rng.normal(0, 3, true.shape)]
        far = np.c_[rng.random(3), rng.uniform(0, 50, (3, 2)), np.full((3, 2), 20.0)]
        rows.append(
            (f"p{i // 4}", label, [*near[: 2 * label], *far], true[: 2 * label], "ab" * label)
        )
    return rows


BOX = (0, 0, 10, 10)
HAND = [
    # The upper 0.4 of a true box: IoU 0.4. A false box scores more than the right one below it.
    ("p", 1, [(0.9, 0, 0, 10, 4)], [BOX], ["IPH"]),
    ("p", 1, [(0.8, 50, 50, 9, 9), (0.7, 0, 0, 20, 20)], [(0, 0, 20, 20)], ["SDH"]),
    # It bleeds but has no boxes: no number of the boxes sees what is found.
    ("q", 1, [(0.95, 0, 0, 10, 10)], [], []),
    ("r", 0, [(0.1, 0, 0, 10, 10)], [], []),
    ("r", 0, [(0.85, 0, 0, 10, 10)], [], []),
]


def test_by_hand():
    stick = Yardstick(predictions(HAND))
    found = stick.metrics()
    # Scores 0.9, 0.8, 0.95 of bleeding slices against 0.1 and 0.85: 5 of 6 pairs.
    assert found["AUC"] == pytest.approx(5 / 6)
    assert found[RECALL] == pytest.approx(2 / 3)
    # All three are found from 0.8 on, where one of two healthy slices is below.
    assert found["specificity @ recall 0.95"] == 0.5
    # Patients: 0.9 and 0.95 against 0.85; means of all, 0.85 and 0.95 against 0.475.
    assert found["patient AUC (any)"] == found["patient AUC (top 3)"] == 1
    # IoU 0.3, by score: right (0.9), wrong (0.85), wrong (0.8), right (0.7), wrong (0.1). Precision
    # is 1 for the 51 recalls to 0.5, then 2 / 4 for 50.
    assert found["AP30"] == pytest.approx((51 + 50 * 0.5) / 101)
    # At 0.5 the first is wrong: 1 of 4, to recall 0.5.
    assert found["AP50"] == pytest.approx(51 * 0.25 / 101)
    assert (found["box recall @ 0.3"], found["box recall @ 0.5"]) == (1, 0.5)
    assert found["top box @ 0.3"] == 0.5


def test_types_and_sizes_by_hand():
    stick = Yardstick(predictions(HAND))
    # Specificity 0.90 of two healthy slices needs both below: the threshold is 0.9.
    iph, sdh = stick.by_type()
    assert (iph["type"], iph["slices"], iph[RECALL], iph["boxes"]) == ("IPH", 1, 1.0, 1)
    assert (sdh[RECALL], sdh["box recall @ 0.5"], iph["box recall @ 0.5"]) == (0.0, 1.0, 0.0)
    # Areas 100 and 400, terciles 200 and 300.
    small, medium, large = stick.by_size()
    assert (small["from"], small["to"], large["from"], large["to"]) == pytest.approx(
        (100, 200, 300, 400)
    )
    assert (small["boxes"], medium["boxes"], large["boxes"]) == (1, 0, 1)
    assert (small["box recall @ 0.3"], small["box recall @ 0.5"]) == (1.0, 0.0)


def test_each_prediction_takes_the_best_free_box():
    # The second prefers the box that the first has, and gets the other; none is left for the third.
    iou = np.array([[0.9, 0.0], [0.8, 0.5], [0.9, 0.9], [0.2, 0.2]])
    assert match_boxes(iou, 0.5).tolist() == [True, True, False, False]
    assert match_boxes(np.zeros((2, 0)), 0.5).tolist() == [False, False]


def test_ap_is_coco_s_and_weights_are_copies_of_patients():
    rows = drawn_sample(np.random.default_rng(0))
    found = predictions(rows)
    stick = Yardstick(found)
    for iou in (0.3, 0.5):
        judged = [i for i, t in enumerate(found.true_boxes) if len(t) or not found.labels[i]]
        boxes, true = ([x[i] for i in judged] for x in (found.boxes, found.true_boxes))
        expected = average_precision(boxes, true, iou_threshold=iou)
        assert stick.metrics()[f"AP{100 * iou:.0f}"] == pytest.approx(expected, abs=1e-12)
    times = np.array([0, 2, 1, 3, 1, 0, 2, 1])
    copies = [
        (f"{row[0]}-{copy}", *row[1:])
        for i, row in enumerate(rows)
        for copy in range(times[i // 4])
    ]
    weighted = stick.metrics(times.repeat(4)[None])
    for name, value in Yardstick(predictions(copies)).metrics().items():
        assert weighted[name][0] == pytest.approx(value, abs=1e-9), name


def test_what_is_undefined_is_nan_and_a_classifier_has_no_boxes():
    healthy = Yardstick(predictions(HAND[3:]))
    assert np.isnan(list(healthy.metrics().values())).all()
    assert healthy.by_type() == healthy.by_size() == []
    found = predictions(HAND)
    alone = Predictions(*(found.image_ids, found.patients, found.files, found.labels, found.scores))
    assert "AP30" not in Yardstick(alone).metrics()
    names = [r["metric"] for r in paired_differences([(Yardstick(found), Yardstick(alone))])]
    assert "AUC" in names and "AP30" not in names


def test_differences_are_the_mean_over_seeds():
    rng = np.random.default_rng(1)
    rows = drawn_sample(rng)
    first = Yardstick(predictions(rows))
    other = Yardstick(predictions([(p, y, b[: 2 * y], *rest) for p, y, b, *rest in rows]))
    for row in paired_differences([(first, first)], n_resamples=100):
        assert (row["difference"], row["low"], row["high"], row["p_value"]) == (0, 0, 0, 1)
    once = paired_differences([(other, first)], n_resamples=200)
    half = paired_differences([(other, first), (first, first)], n_resamples=200)
    for a, b in zip(once, half):
        assert b["difference"] == pytest.approx(a["difference"] / 2)
        assert (b["low"], b["high"]) == pytest.approx((a["low"] / 2, a["high"] / 2))
    # Without its false boxes it tells all slices apart, whoever is drawn: 2 / (200 + 1).
    assert once[0]["metric"] == "AUC" and once[0]["p_value"] == pytest.approx(2 / 201, rel=0.1)
