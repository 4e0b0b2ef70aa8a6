"""What a report says of the model."""

import pytest

from ich_det2.engine.report import _model


@pytest.mark.parametrize(
    ("config", "opts", "said", "unsaid"),
    [
        ("csfrcnn_effnet_lite0.yaml", (), "CostSensitiveROIHeads, alpha 5.0, R 3.0", "beside"),
        ("csfrcnn_effnet_lite0.yaml", (), "alpha of the second stage 3.0; anchors", "beside"),
        ("frcnn_effnet_lite0.yaml", (), "RPN, StandardROIHeads; anchors", "alpha"),
        ("frcnn_r50.yaml", ("MODEL.META_ARCHITECTURE", "RetinaNet"), "RetinaNet, build", "RPN"),
        ("classifier_lenet.yaml", (), "ImageClassifier, LeNet", "alpha"),
        ("classifier_cnn3d.yaml", (), "with 24 slices of the whole scan", "beside"),
        ("threshold.yaml", (), "'THRESHOLD_HU': 20.0", "anchors"),
    ],
)
def test_settings_that_no_part_reads_are_not_told_as_used(tiny_cfg, config, opts, said, unsaid):
    text = _model(tiny_cfg(*opts, config=config))
    assert said in text and unsaid not in text
