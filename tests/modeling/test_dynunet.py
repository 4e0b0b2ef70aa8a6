"""nnU-Net-like segmentation: the plan by hand, the network's size, what is learnt and found."""

import importlib.util

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from ich_det2.modeling.dynunet import DynUNetSegmenter, Plan, label_map, plan_network


def test_the_plan_of_a_ct_slice_is_nnunets():
    # 512, 256, 128, 64, 32, 16, 8, 4: seven halvings.
    plan = plan_network((512, 512), (0.45, 0.45))
    assert plan.strides == [[1, 1]] + 7 * [[2, 2]] and plan.kernels == 8 * [[3, 3]]
    assert plan.filters == [32, 64, 128, 256, 512, 512, 512, 512]


def test_a_longer_axis_is_halved_further():
    # 256 x 60, 128 x 30, 64 x 15, 32 x 8, 16 x 4, 8 x 4; a single axis of 8 is below 3 x 4.
    plan = plan_network((256, 60), (1, 1), base_filters=8, max_filters=32)
    assert plan.strides == [[1, 1]] + 4 * [[2, 2]] + [[2, 1]]
    assert plan.filters == [8, 16, 32, 32, 32, 32]


def test_a_coarse_axis_waits_until_the_others_are_as_coarse():
    # 5 mm beside 0.5, 1 and 2 mm; beside 4 mm both are halved: 40, 20, 10, 5.
    plan = plan_network((40, 320), (5, 0.5))
    assert plan.strides == [[1, 1]] + 3 * [[1, 2]] + 3 * [[2, 2]]
    assert plan.kernels == 3 * [[1, 3]] + 4 * [[3, 3]]


def test_a_small_image_gives_no_network():
    assert len(plan_network((16, 16), (1, 1)).strides) == 3  # 16, 8, 4
    with pytest.raises(ValueError, match="images of 15 x 9 pixels give a U-Net of 2 stages"):
        plan_network((15, 9), (1, 1))  # 8 x 5; 8 alone is below 12


PLAN = plan_network((32, 32), (1, 1), base_filters=4)


def make(**kwargs):
    torch.manual_seed(0)
    values = {"plan": PLAN, "num_classes": 2, "pixel_mean": [127.5] * 3, "pixel_std": [127.5] * 3}
    return DynUNetSegmenter(**(values | kwargs))


def test_the_number_of_parameters_is_the_layers_own():
    # A block: two convolutions of 3 x 3 without bias, each with a norm of two per channel.
    def block(channels, filters):
        return 9 * filters * (channels + filters) + 4 * filters

    a, b, c, d = PLAN.filters
    assert (a, b, c, d) == (4, 8, 16, 32)
    down = block(3, a) + block(a, b) + block(b, c) + block(c, d)
    # Up: a transposed convolution of 2 x 2, then a block on it beside what was kept.
    up = sum(4 * low * high + block(2 * high, high) for low, high in ((d, c), (c, b), (b, a)))
    # One to the types and the background of the full size, one of half of it, each with a bias.
    outputs = 3 * (a + 1) + 3 * (b + 1)
    assert sum(p.numel() for p in make().parameters()) == down + up + outputs


def slice_of(masks, classes, *, known=None, label=None, side=32):
    """A mapped slice, dark but for the lesions, which are bright."""
    image = torch.full((3, side, side), 60.0)
    instances = Instances((side, side), gt_boxes=Boxes(torch.zeros(len(masks), 4)))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if len(masks):
        tensor = torch.zeros(len(masks), side, side, dtype=torch.bool)
        for mask, (x0, y0, x1, y1), c in zip(tensor, masks, classes):
            mask[y0:y1, x0:x1] = True
            image[:, y0:y1, x0:x1] = 160.0 + 90 * c
        instances.gt_masks = BitMasks(tensor)
        instances.gt_has_mask = torch.tensor(known or [True] * len(masks))
    label = int(len(masks) > 0) if label is None else label
    return {"image": image, "instances": instances, "image_label": label}


BLEEDS = slice_of([(4, 4, 12, 12), (18, 16, 28, 26)], [0, 1])


def test_of_two_masks_the_smaller_has_the_pixel():
    bleeds = slice_of([(0, 0, 2, 2), (1, 0, 4, 4)], [1, 0], side=4)["instances"]
    labels = label_map(bleeds, (5, 4))
    assert labels.tolist() == [[2, 2, 1, 1]] * 2 + [[0, 1, 1, 1]] * 2 + [[0] * 4]


def loss_of(*slices):
    model = make()
    losses = model(list(slices))
    assert list(losses) == ["loss_seg"]
    losses["loss_seg"].backward()
    return losses["loss_seg"].item(), model


def test_the_loss_is_dice_and_cross_entropy_of_each_output():
    """Of logits 0 each of three classes has 1/3: by hand."""
    model = make()
    logits = torch.zeros(1, 3, 3, 32, 32)
    # Types of 64 and 100 pixels of 1024: Dice 1 - 2 (n / 3) / (1024 / 3 + n), without background.
    dice = sum(1 - 2 * n / 3 / (1024 / 3 + n) for n in (64, 100)) / 2
    loss = model.loss(logits, [BLEEDS])
    assert loss.item() == pytest.approx(dice + torch.tensor(3.0).log().item(), rel=1e-5)
    # Background that is sure in the first output alone, of weight 1 of 1 + 1/2 + 1/4.
    logits[:, 0, 0] = 50.0
    sure = 1 + 50 * 164 / 1024  # Dice 1; 50 for each of the 164 pixels that bleed
    both = (sure + 0.75 * loss.item()) / 1.75
    assert model.loss(logits, [BLEEDS]).item() == pytest.approx(both, rel=1e-4)


def test_healthy_slices_teach_background_and_every_layer_learns():
    loss, model = loss_of(BLEEDS, slice_of([], []))
    alone, _ = loss_of(BLEEDS)
    assert loss != alone
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "unknown",
    [slice_of([(4, 4, 12, 12)] * 2, [0, 1], known=[True, False]), slice_of([], [], label=1)],
    ids=["a box without mask", "a label alone"],
)
def test_a_slice_that_bleeds_without_known_masks_teaches_nothing(unknown):
    loss, model = loss_of(unknown)
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    beside, _ = loss_of(BLEEDS, unknown)
    alone, _ = loss_of(BLEEDS)
    assert beside == pytest.approx(alone, rel=1e-6)


class Sure(torch.nn.Module):
    """In the place of the network: type 0 where it is bright, type 1 where it is brightest."""

    def forward(self, x):
        grey = x[:, 0] * 127.5 + 127.5
        steps = [torch.full_like(grey, 110), grey, 2 * grey - 200]
        return 0.1 * torch.stack(steps, dim=1)


def found_on(model, *slices):
    model.eval()
    with torch.no_grad():
        return model(list(slices))


def test_lesions_are_on_the_original_slice():
    """A slice of 64 x 48 pixels, shown as 32 x 32: boxes are doubled, and 1.5 times as high."""
    model = make()
    model.network = Sure()
    (found,) = found_on(model, BLEEDS | {"height": 48, "width": 64})
    instances = found["instances"]
    assert instances.image_size == (48, 64) and instances.pred_classes.tolist() == [1, 0]
    boxes = torch.tensor([[36.0, 24, 56, 39], [8, 6, 24, 18]])
    assert (instances.pred_boxes.tensor - boxes).abs().max() <= 1  # the edges are blurred
    assert instances.pred_masks.shape == (2, 48, 64) and instances.pred_masks.dtype == torch.bool
    ys, xs = instances.pred_masks[1].nonzero(as_tuple=True)
    corners = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert [int(v) for v in corners] == instances.pred_boxes.tensor[1].tolist()
    # Logits 11, 25 and 30 in the one; 11, 16 and 12 in the other.
    inside = [30 - 25, 16 - 12]
    for mask, score, logit in zip(instances.pred_masks, instances.scores, inside):
        least = 0.8 * torch.tensor(float(logit)).sigmoid()
        assert least < score <= 1 and mask.any()
    assert found["image_score"].shape == () and found["image_score"] > 0.99


def test_specks_and_the_many_are_left_out():
    model = make(min_pixels=5)
    model.network = Sure()
    dots = [(2 * i, 8 * j, 2 * i + 1, 8 * j + 4) for i in range(16) for j in range(4)]
    (found,) = found_on(model, slice_of(dots, [1] * 64))
    assert len(found["instances"]) == 0
    model.min_pixels, model.detections_per_image = 4, 10
    (found,) = found_on(model, slice_of(dots, [1] * 64))
    assert len(found["instances"]) == 10


def test_a_slice_of_any_size_is_segmented_and_alone_as_in_a_batch():
    """Also one of the network's whole stride, which leaves one pixel at its bottom."""
    model = make()
    assert model.size_divisibility == 8
    slices = [{"image": 255 * torch.rand(3, *size)} for size in ((8, 8), (30, 41))]
    for x in slices:
        (found,) = found_on(model, x)
        assert found["instances"].image_size == tuple(x["image"].shape[1:])
        assert 0 < found["image_score"] < 1
    first, second = found_on(model, slices[1], slices[1])
    assert first["image_score"] == pytest.approx(found["image_score"].item(), rel=1e-5)
    assert torch.equal(first["image_score"], second["image_score"])


@pytest.mark.parametrize("reach", [0, 2])
def test_a_config_builds_it_with_neighbours_as_channels(tiny_cfg, reach):
    grey = [127.5] * (2 * reach + 1 if reach else 3)
    values = ("MODEL.PIXEL_MEAN", grey, "MODEL.PIXEL_STD", grey, "INPUT.CONTEXT_SLICES", reach)
    cfg = tiny_cfg(*values, config="dynunet.yaml")
    with pytest.raises(ValueError, match="tools/train_net.py plans them where all are"):
        build_model(cfg)
    cfg.MODEL.DYNUNET.update(zip(("KERNELS", "STRIDES", "FILTERS"), PLAN))
    model = build_model(cfg)
    assert type(model) is DynUNetSegmenter
    (found,) = found_on(model, {"image": 255 * torch.rand(len(grey), 32, 32)})
    assert "image_score" in found


@pytest.mark.parametrize(
    "wrong", [{"filters": [4, 8, 16]}, {"strides": [[2, 2]] * 4}, {"kernels": [[3]] * 4}]
)
def test_a_plan_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="MODEL.DYNUNET has KERNELS"):
        make(plan=Plan(**(PLAN._asdict() | wrong)))


@pytest.mark.parametrize("wrong", [{"mask_thresh": 1.0}, {"min_pixels": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="MASK_THRESH_TEST is"):
        make(**wrong)


def test_it_is_not_traced(monkeypatch):
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    with pytest.raises(ValueError, match="finds lesions with SciPy, which no graph holds"):
        found_on(make(), BLEEDS)


def test_without_monai_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs MONAI, .* pip install 'ich_det2\[systems\]'"):
        make()
