"""RADNet: attention and the map's loss by hand, lesion maps of boxes and masks, the sequence."""

import math

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from ich_det2.modeling import ImageClassifier, RADNet


def test_attention_is_a_mean_weighted_by_the_map():
    maps, logits = torch.tensor([[[[2.0, 6.0]]]]), torch.tensor([[[[0.0, math.log(3)]]]])
    # Probabilities 1/2 and 3/4: (2 / 2 + 6 x 3 / 4) / (1 / 2 + 3 / 4 + 1) = 5.5 / 2.25.
    assert RADNet.attend(maps, logits)[0].tolist() == pytest.approx([4, 5.5 / 2.25])
    # Nothing is seen where there is no lesion.
    assert RADNet.attend(maps, logits - 50)[0].tolist() == pytest.approx([4, 0], abs=1e-6)


def test_the_maps_loss_is_of_slices_whose_lesions_are_known():
    logits = torch.zeros(2, 1, 2, 2)
    logits[0, 0, 0, 1] = math.log(3)
    lesions = torch.zeros(2, 4, 4)
    lesions[0, 1, 3], lesions[1] = 1, torch.nan  # a pixel of the cell that scores 3 / 4
    # -log of 3/4, and three times of 1 - 1/2.
    expected = -(math.log(3 / 4) + 3 * math.log(1 / 2)) / 4
    assert RADNet.map_loss(logits, lesions).item() == pytest.approx(expected)
    nothing = logits.clone().requires_grad_()
    loss = RADNet.map_loss(nothing, lesions * torch.nan)
    loss.backward()
    assert loss == 0 and nothing.grad is not None and not nothing.grad.any()


# ---- lesion maps ---------------------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ImageClassifier(
        network=RADNet(32), input_size=32, pixel_mean=[100.0] * 3, pixel_std=[50.0] * 3
    )


def slice_of(boxes, label, size=(64, 32), masks=None, seed=0):
    image = 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))
    found = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4).float()))
    if masks is not None:
        found.gt_masks = masks
    sequence = torch.stack([0.5 * image, image, 0.8 * image])
    return {"image": image, "sequence": sequence, "image_label": label, "instances": found}


def test_boxes_are_scaled_and_padded_as_the_image(model):
    boxes = [[8, 16, 20, 40], [30, 60, 32, 64]]
    lesions = model.lesion_maps([slice_of(boxes, 1), slice_of([], 0)])
    # Of 64 x 32 pixels to 32 x 16, and air to 32 x 32.
    expected = torch.zeros(32, 32)
    expected[8:20, 4:10], expected[30:32, 15:16] = 1, 1
    assert torch.equal(lesions[0], expected) and not lesions[1].any()


def test_a_bleed_at_no_known_place_teaches_no_map(model):
    unknown, healthy = slice_of([], 1), slice_of([], 0)
    without = [{k: v for k, v in x.items() if k != "instances"} for x in (unknown, healthy)]
    for batch in ([unknown, healthy], without):
        lesions = model.lesion_maps(batch)
        assert lesions[0].isnan().all() and not lesions[1].any()
    both, alone = model([unknown, healthy]), model([unknown])
    assert set(both) == {"loss_cls", "loss_map"}
    assert both["loss_map"] > 0 and alone["loss_map"] == 0 < alone["loss_cls"]


def test_masks_take_the_place_of_boxes(model):
    box = [[8, 16, 20, 40]]
    bits = torch.zeros(1, 64, 32, dtype=torch.bool)
    bits[0, 20:30, 10:14] = True
    corners = PolygonMasks([[[10, 20, 14, 20, 14, 30, 10, 30]]])
    expected = torch.zeros(32, 32)
    expected[10:15, 5:7] = 1
    for masks in (BitMasks(bits), corners):
        (lesions,) = model.lesion_maps([slice_of(box, 1, masks=masks)])
        assert torch.equal(lesions, expected)


# ---- the sequence --------------------------------------------------------------------------------


def test_neighbours_and_their_order_matter_to_the_score_but_not_to_the_map(model):
    x = slice_of([[8, 16, 20, 40]], 1)
    moved = x | {"sequence": x["sequence"].flip(0)}
    model.eval()
    with torch.no_grad():
        scores = [y["image_score"].item() for y in model([x, moved, x])]
    assert scores[0] == pytest.approx(scores[2]) and abs(scores[0] - scores[1]) > 1e-6
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    losses = [model([y])["loss_map"].item() for y in (x, moved)]
    assert losses[0] == pytest.approx(losses[1])


def test_it_learns_where_a_lesion_is(model):
    batch = [slice_of([[0, 0, 16, 16]], 1, size=(32, 32), seed=i) for i in range(2)]
    for x in batch:
        x["sequence"][1, :, :16, :16] += 200
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model(batch)["loss_map"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        x = model.preprocess_image(batch)[:, 1]
        maps = model.network.map_head(torch.relu(model.network.blocks(x)))
    assert maps.shape == (2, 1, 2, 2) and (maps.flatten(1).argmax(dim=1) == 0).all()
