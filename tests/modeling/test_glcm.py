"""Co-occurrence images: counts by hand, grey levels, and where in a slice they are from."""

import importlib.util

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from ich_det2.modeling.glcm import GLCMNet, cooccurrence, grey_levels

REGION = np.array([[1, 2, 2], [0, 1, 2]], dtype=np.uint8)


def test_pairs_count_in_both_orders_and_without_black():
    # To the right: 1 2, 2 2, 1 2, and 0 1, which is left out; in both orders (1, 2) twice, (2, 1)
    # twice, (2, 2) twice. Above each other: 2 1, 2 2, and 1 0, which is left out; in both orders
    # (1, 2), (2, 1), (2, 2) twice.
    right, above = cooccurrence(REGION, (1,), (0, np.pi / 2), levels=2)
    np.testing.assert_allclose(right, [[0, 2 / 6], [2 / 6, 2 / 6]], rtol=1e-6)
    np.testing.assert_allclose(above, [[0, 1 / 4], [1 / 4, 2 / 4]], rtol=1e-6)


def test_offsets_are_by_distance_then_by_angle():
    images = cooccurrence(REGION, (1, 2), (0, np.pi / 2), levels=2)
    # Two to the right: 1 2, and 0 2, which is left out. Two above each other: none.
    np.testing.assert_allclose(images[2], [[0, 0.5], [0.5, 0]])
    assert images.shape == (4, 2, 2) and not images[3].any()


def test_black_is_air_alone_and_white_the_last_level():
    grey = torch.tensor([0, 0.4, 1, 8, 9, 127.5, 255])
    # (8 - 0.5) x 32 / 255 = 0.94, (9 - 0.5) x 32 / 255 = 1.07, (127.5 - 0.5) x 32 / 255 = 15.94.
    assert grey_levels(grey).tolist() == [0, 0, 1, 1, 2, 16, 32]


@pytest.fixture
def slices():
    """A slice that is black but for one tile, of 100 and 200 by turns, and a black one."""
    x = torch.zeros(2, 3, 64, 64)
    x[0, :, 16:32, 48:64] = 100
    x[0, :, 16:32, 48:64:2] = 200
    return x


def test_each_tile_has_its_images(slices):
    network = GLCMNet(64, pixel_mean=[50.0] * 3, pixel_std=[10.0] * 3)
    images = network.cooccurrence_images((slices - 50) / 10)
    assert images.shape == (2, 16, 8, 32, 32)
    # The second row of tiles, the last one.
    assert images.flatten(2).any(dim=2).nonzero().tolist() == [[0, 7]]
    # Columns of 100, level ceil(12.5), and 200, level ceil(25.03), by turns: neighbours to the
    # right, and 3 to the right, differ, and those above each other do not.
    a, b = 13 - 1, 26 - 1
    for k in (0, 4):
        assert images[0, 7, k, [a, b, a, b], [b, a, a, b]].square().tolist() == pytest.approx(
            [0.5, 0.5, 0, 0]
        )
        assert images[0, 7, k + 2, [a, b], [a, b]].square().tolist() == pytest.approx([0.5, 0.5])


def test_the_texture_alone_changes_the_logit(slices):
    torch.manual_seed(0)
    network = GLCMNet(64, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3).eval()
    with torch.no_grad():
        network.output.weight[:, : network.num_features] = 0  # blind to the slice itself
        one, black = network(slices)
        moved, _ = network(slices.roll(-16, dims=3))  # a tile to the left: pooled over all
    assert one != black and one == pytest.approx(moved.item())


def test_it_is_not_traced(slices):
    with pytest.raises(ValueError, match="counts with scikit-image, which no graph holds"):
        torch.jit.trace(GLCMNet(64).eval(), slices)


def test_the_config_says_how_images_are_normalized(tiny_cfg):
    cfg = tiny_cfg("MODEL.PIXEL_MEAN", "[9.0, 8.0, 7.0]", config="classifier_glcm.yaml")
    assert build_model(cfg).network.pixel_mean.flatten().tolist() == [9, 8, 7]


def test_without_scikit_image_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs scikit-image.*pip install 'ich_det2\[systems\]'"):
        GLCMNet(64)
