"""EnsembleRCNN: fused boxes by hand, mirrored slices, members that differ."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import tensor

from ich_det2.modeling.ensemble import fuse_boxes


def boxes_of(*rows):
    return tensor(rows, dtype=torch.float32).reshape(-1, 4)


def test_fused_boxes_by_hand():
    # The first two overlap by 80 / 120; the third is alone; the fourth is of another class.
    boxes = [boxes_of([0, 0, 10, 10], [50, 50, 60, 60]), boxes_of([2, 0, 12, 10], [0, 0, 10, 10])]
    scores = [tensor([0.6, 0.9]), tensor([0.2, 0.1])]
    classes = [tensor([0, 0]), tensor([0, 1])]
    box, score, kind = fuse_boxes(boxes, scores, classes, iou_threshold=0.5)
    torch.testing.assert_close(score, tensor([0.45, 0.4, 0.05]))
    assert kind.tolist() == [0, 0, 1]
    wanted = boxes_of([50, 50, 60, 60], [0.5, 0, 10.5, 10], [0, 0, 10, 10])
    torch.testing.assert_close(box, wanted)


def test_boxes_of_one_result_stay_apart():
    # As Soft-NMS leaves them. The other's box goes to the higher scored of the two.
    boxes = [boxes_of([0, 0, 10, 10], [0, 0, 10, 11]), boxes_of([0, 0, 10, 12])]
    classes = [tensor([0, 0]), tensor([0])]
    box, score, _ = fuse_boxes(boxes, [tensor([0.8, 0.4]), tensor([0.2])], classes)
    torch.testing.assert_close(score, tensor([0.5, 0.2]))
    high = (0.8 * 10 + 0.2 * 12) / 1.0
    torch.testing.assert_close(box, boxes_of([0, 0, 10, high], [0, 0, 10, 11]))


def test_an_ensemble_of_one_is_that_one():
    corner = 30 * torch.rand(20, 2, generator=torch.Generator().manual_seed(0))
    boxes, scores = torch.cat([corner, corner + 20], dim=1), torch.linspace(1, 0, 20)
    classes = torch.zeros(20, dtype=torch.int64)
    for iou_threshold in (0.01, 0.3, 0.9):
        found = fuse_boxes([boxes], [scores], [classes], iou_threshold=iou_threshold)
        torch.testing.assert_close(found, (boxes, scores, classes))


def test_nothing_fused_is_nothing():
    nothing = [boxes_of()], [torch.zeros(0)], [torch.zeros(0, dtype=torch.int64)]
    assert [x.shape for x in fuse_boxes(*nothing)] == [(0, 4), (0,), (0,)]


def test_equal_results_are_left_as_they_are():
    torch.manual_seed(0)
    corner = 100 * torch.rand(20, 2)
    boxes = torch.cat([corner, corner + 5], dim=1)
    scores, classes = torch.rand(20), torch.randint(0, 2, (20,))
    box, score, kind = fuse_boxes([boxes] * 3, [scores] * 3, [classes] * 3, iou_threshold=0.99)
    order = scores.argsort(descending=True)
    torch.testing.assert_close(box, boxes[order])
    torch.testing.assert_close(score, scores[order])
    assert torch.equal(kind, classes[order])


@pytest.fixture
def slices():
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(3, 64, 64, generator=generator)
    return [{"image": image, "height": 128, "width": 96}]


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg).eval()


def test_one_member_is_that_detector(tiny_cfg, slices):
    member = ["MODEL.META_ARCHITECTURE", "DiagnosisRCNN"]
    cfg = tiny_cfg(*member, config="diagnosis_effnet_lite0.yaml")
    single = build(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ENSEMBLE.MEMBERS = "EnsembleRCNN", [member]
    cfg.MODEL.ENSEMBLE.IOU_THRESHOLD = 0.999
    ensemble = build(cfg)
    with torch.no_grad():
        (one,), (fused,) = single(slices), ensemble(slices)
    assert fused["image_score"] == pytest.approx(one["image_score"].item(), abs=1e-6)
    a, b = one["instances"], fused["instances"]
    torch.testing.assert_close(b.pred_boxes.tensor, a.pred_boxes.tensor)
    torch.testing.assert_close(b.scores, a.scores)
    assert b.image_size == a.image_size == (128, 96)


def test_a_mirrored_slice_has_a_mirrored_answer(tiny_cfg, slices):
    member = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
    cfg = tiny_cfg("MODEL.ENSEMBLE.MEMBERS", [member], "MODEL.ENSEMBLE.FLIP", True)
    cfg.MODEL.META_ARCHITECTURE = "EnsembleRCNN"
    ensemble = build(cfg)
    with torch.no_grad():
        (y,) = ensemble(slices)
        (mirrored,) = ensemble([{**slices[0], "image": slices[0]["image"].flip(-1)}])
    boxes = mirrored["instances"].pred_boxes.tensor
    boxes = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], dim=1)
    torch.testing.assert_close(y["image_score"], mirrored["image_score"])
    torch.testing.assert_close(y["instances"].scores, mirrored["instances"].scores)
    torch.testing.assert_close(y["instances"].pred_boxes.tensor, boxes, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.ENSEMBLE.MEMBERS", []], "MEMBERS is"),
        (["MODEL.ENSEMBLE.IOU_THRESHOLD", 1.0], "IOU_THRESHOLD is 1.0"),
        (["MODEL.ENSEMBLE.MEMBERS", [["MODEL.RPN.NMS_THRESH", 0.5]]], "EnsembleRCNN again"),
        (["MODEL.MASK_ON", True], "fuses boxes, not masks"),
    ],
)
def test_what_is_no_ensemble_is_refused(tiny_cfg, opts, message):
    member = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]
    cfg = tiny_cfg("MODEL.ENSEMBLE.MEMBERS", [member], *opts)
    cfg.MODEL.META_ARCHITECTURE = "EnsembleRCNN"
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_it_is_not_trained(tiny_cfg, slices):
    cfg = tiny_cfg("MODEL.ENSEMBLE.MEMBERS", [["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]])
    cfg.MODEL.META_ARCHITECTURE = "EnsembleRCNN"
    with pytest.raises(RuntimeError, match="not trained"):
        build_model(cfg).train()(slices)
