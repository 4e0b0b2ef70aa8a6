"""Predictions in memory: which images boxes are judged on."""

import numpy as np

from ich_det2.evaluation.analysis import Settings, analyse
from ich_det2.evaluation.predictions import Predictions


def test_a_box_on_a_bleeding_image_without_true_boxes_is_no_false_alarm():
    box, true = np.array([[0.6, 0.0, 0.0, 10.0, 10.0]]), np.array([[0.0, 0.0, 10.0, 10.0]])
    none, false = np.zeros((0, 4)), np.array([[0.9, 40.0, 40.0, 10.0, 10.0]])

    def predictions(labels, boxes, truth):
        ids = [f"i{n}" for n in range(len(labels))]
        scores = np.array([b[:, 0].max(initial=0) for b in boxes])
        types = [["IPH"] * len(t) for t in truth]
        return Predictions(ids, ids, ids, np.array(labels), scores, boxes, truth, types)

    alone = predictions([1, 0], [box, box[:0]], [true, none])
    settings = Settings([0.5], 0.5, n_resamples=20)
    unboxed = predictions([1, 0, 1], [box, box[:0], false], [true, none, none])
    healthy = predictions([1, 0, 0], [box, box[:0], false], [true, none, none])
    assert unboxed.judged == [0, 1] and healthy.judged == [0, 1, 2]
    assert unboxed.lesion_scores == alone.lesion_scores
    assert unboxed.lesion_scores["voc_ap50"] == 1 > healthy.lesion_scores["voc_ap50"]
    froc = [analyse(p, settings)["lesions"]["froc"]["image_iou"] for p in (unboxed, alone)]
    assert froc[0] == froc[1]
    # Where every image bleeds and none has a box, nothing is defined.
    nothing = predictions([1], [false], [none])
    assert nothing.judged == [] and np.isnan(nothing.lesion_scores["voc_ap50"])
