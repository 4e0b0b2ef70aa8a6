"""The mask head: stock where all masks are known, and nothing learnt from one that is not."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from ich_det2.modeling import KnownMaskHead

BOXES = [[[4.0, 4.0, 20.0, 20.0], [10.0, 8.0, 30.0, 28.0]], [[2.0, 6.0, 18.0, 30.0]], []]


def make(cls):
    torch.manual_seed(0)
    return cls(ShapeSpec(channels=8, height=7, width=7), num_classes=2, conv_dims=[4, 4])


def proposals(known):
    """Three images of two, one and no foreground proposal; None: it is not said what is known."""
    images = []
    for boxes, which in zip(BOXES, ([0, 1], [2], [])):
        found = Instances((32, 32), proposal_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
        found.gt_classes = torch.tensor([i % 2 for i in which], dtype=torch.int64)
        if boxes:
            masks = torch.zeros(len(boxes), 32, 32, dtype=torch.bool)
            masks[:, 8:16, 8:20] = True
            found.gt_masks = BitMasks(masks)
            if known is not None:
                found.gt_has_mask = torch.tensor([known[i] for i in which])
        images.append(found)
    return images


def loss_of(head, known, keep=(0, 1, 2)):
    torch.manual_seed(1)
    x = torch.rand(3, 8, 7, 7)[list(keep)]
    with EventStorage():
        return head.train()(x, proposals(known))["loss_mask"]


def test_parameters_of_the_shipped_head_worked_by_hand(tiny_cfg):
    head = build_model(tiny_cfg(config="mask_rcnn_effnet_lite0.yaml")).roi_heads.mask_head
    # 3 x 3 from 112 and from 64 to 64 channels with the scales and offsets of their norms;
    # 2 x 2 upwards with an offset; one class.
    convs = 9 * 112 * 64 + 2 * 64 + 9 * 64 * 64 + 2 * 64
    assert sum(p.numel() for p in head.parameters()) == convs + (4 * 64 * 64 + 64) + (64 + 1)
    assert head.layers(torch.rand(3, 112, 14, 14)).shape == (3, 1, 28, 28)


@pytest.mark.parametrize("known", [None, [True] * 3])
def test_with_all_masks_known_it_is_detectron2s(known):
    assert torch.equal(
        loss_of(make(KnownMaskHead), known), loss_of(make(MaskRCNNConvUpsampleHead), None)
    )


def test_a_mask_that_is_not_known_teaches_nothing():
    head = make(KnownMaskHead)
    some = loss_of(head, [True, False, True])
    stock = make(MaskRCNNConvUpsampleHead).train()
    torch.manual_seed(1)
    x = torch.rand(3, 8, 7, 7)
    first, second, empty = proposals(None)
    with EventStorage():
        expected = stock(x[[0, 2]], [first[[0]], second, empty])["loss_mask"]
    assert torch.equal(some, expected) and some != loss_of(head, [True] * 3)


def test_without_a_known_mask_the_loss_is_0_and_every_layer_takes_part():
    head = make(KnownMaskHead)
    loss = loss_of(head, [False] * 3)
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_in_the_test_it_gives_each_box_its_mask():
    head = make(KnownMaskHead).eval()
    found = Instances((32, 32), pred_classes=torch.tensor([1, 0, 1]))
    (out,) = head(torch.rand(3, 8, 7, 7), [found])
    assert out.pred_masks.shape == (3, 1, 14, 14)
    assert ((out.pred_masks >= 0) & (out.pred_masks <= 1)).all()
