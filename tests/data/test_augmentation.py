"""Shift and scale, drawn anew or fixed as in the paper."""

import numpy as np
import pytest
from detectron2.data import transforms as T
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.data.augmentation import (
    RandomShiftScale,
    build_augmentation,
    expand_dataset,
    shift_scale_transform,
)

DICTS = [{"image_id": name, "file_name": f"{name}.png", "image_label": 0} for name in "abcde"]
LIMITS = {"shift": 0.1, "scale": 0.2}


def moved(point, size, *args):
    return shift_scale_transform(size, *args).apply_coords(np.array([point], dtype=float))[0]


# ---- shift_scale_transform ---------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("args", [(0, 0, 1), (0.1, -0.05, 1.2), (-0.07, 0.02, 0.85)])
def test_pixels_are_those_of_detectron2s_transform(args, channels):
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 255, (6, 8, channels)), np.ones((10, 10, 1))).astype(np.uint8)
    ours = shift_scale_transform(image.shape[:2], *args)
    stock = T.ExtentTransform(ours.src_rect, ours.output_size).apply_image(image)
    moved = ours.apply_image(image)
    assert moved.dtype == np.uint8 and moved.shape == image.shape
    # Where all four pixels around a point lie in the image.
    inside = ours.apply_image(np.full_like(image, 255)) == 255
    difference = np.abs(moved.astype(int) - stock.reshape(moved.shape))[inside]
    assert inside.mean() > 0.6 and difference.max() <= 8 and difference.mean() < 1


def test_no_shift_and_no_scale_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 1), dtype=np.uint8)
    transform = shift_scale_transform((48, 64), 0, 0, 1)
    assert np.array_equal(transform.apply_image(image), image)
    assert transform.apply_coords(np.array([[3.0, 7.0]])).tolist() == [[3, 7]]


def test_three_channels_go_the_same_way_as_one():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    transform = shift_scale_transform((48, 64), 0.1, -0.05, 1.3)
    for i in range(3):
        alone = transform.apply_image(image[:, :, i : i + 1])
        assert np.array_equal(transform.apply_image(image)[:, :, i], alone[:, :, 0])


def test_hand_worked_points():
    # 64 x 48, centre (32, 24).
    assert moved((32, 24), (48, 64), 0.25, -0.5, 1) == pytest.approx((48, 0))
    assert moved((42, 14), (48, 64), 0, 0, 2) == pytest.approx((52, 4))
    # Scaled about the centre, then moved by 0.25 * 64 = 16.
    assert moved((42, 14), (48, 64), 0.25, 0, 2) == pytest.approx((68, 4))


def test_what_comes_in_is_air():
    image = np.full((48, 64, 1), 200, dtype=np.uint8)
    out = shift_scale_transform((48, 64), 0.5, 0, 1).apply_image(image)[:, :, 0]
    assert (out[:, :31] == 0).all() and (out[:, 33:] == 200).all()


@given(
    x=st.floats(-0.5, 0.5),
    y=st.floats(-0.5, 0.5),
    scale=st.floats(0.5, 2),
    point=st.tuples(st.floats(0, 64), st.floats(0, 48)),
)
def test_any_point_is_scaled_about_the_centre_and_then_moved(x, y, scale, point):
    expected = (
        32 + (point[0] - 32) * scale + x * 64,
        24 + (point[1] - 24) * scale + y * 48,
    )
    assert moved(point, (48, 64), x, y, scale) == pytest.approx(expected, abs=1e-3)


# ---- RandomShiftScale, build_augmentation ------------------------------------------------------


def test_draws_stay_within_their_limits_and_fill_them():
    np.random.seed(0)
    augmentation = RandomShiftScale(0.1, 0.25)
    scales, shifts = [], []
    for _ in range(500):
        x0, y0, x1, y1 = augmentation.get_transform(np.zeros((100, 100, 1))).src_rect
        scale = 100 / (x1 - x0)
        scales.append(scale)
        shifts += [(0.5 - (a + b) / 200) * scale for a, b in ((x0, x1), (y0, y1))]
    assert 1 / 1.25 - 1e-9 <= min(scales) < 0.82 and 1.22 < max(scales) <= 1.25 + 1e-9
    assert -0.1 - 1e-9 <= min(shifts) < -0.095 and 0.095 < max(shifts) <= 0.1 + 1e-9
    # Log-uniform: as often smaller as larger.
    assert abs(np.mean(np.array(scales) > 1) - 0.5) < 0.07


@pytest.mark.parametrize(
    ("opts", "is_train", "expected"),
    [
        ({}, False, [T.ResizeShortestEdge]),
        ({"AUG.SHIFT": 0.1}, False, [T.ResizeShortestEdge]),
        ({"RANDOM_FLIP": "none"}, True, [T.ResizeShortestEdge]),
        ({}, True, [T.ResizeShortestEdge, T.RandomFlip]),
        ({"AUG.SHIFT": 0.1}, True, [RandomShiftScale, T.ResizeShortestEdge, T.RandomFlip]),
        ({"AUG.SCALE": 0.1}, True, [RandomShiftScale, T.ResizeShortestEdge, T.RandomFlip]),
        ({"AUG.ROTATE": 9.0}, True, [T.RandomRotation, T.ResizeShortestEdge, T.RandomFlip]),
        (
            {"AUG.JITTER": 0.1},
            True,
            [T.RandomContrast, T.RandomBrightness, T.ResizeShortestEdge, T.RandomFlip],
        ),
    ],
)
def test_config_chooses_the_augmentations(tiny_cfg, opts, is_train, expected):
    opts = {"RANDOM_FLIP": "horizontal"} | opts
    cfg = tiny_cfg(*(x for key, value in opts.items() for x in (f"INPUT.{key}", value)))
    assert [type(a) for a in build_augmentation(cfg, is_train)] == expected


# ---- expand_dataset ----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 4])
def test_each_image_stands_factor_times_the_first_untouched(factor):
    out = expand_dataset(DICTS, factor, **LIMITS)
    assert len(out) == factor * len(DICTS)
    for i, d in enumerate(DICTS):
        first, *others = out[factor * i : factor * (i + 1)]
        assert first == d and "shift_scale" not in first
        assert len({o["shift_scale"] for o in others}) == factor - 1
        for other in others:
            assert {k: v for k, v in other.items() if k != "shift_scale"} == d


def test_input_is_not_modified():
    before = [dict(d) for d in DICTS]
    expand_dataset(DICTS, 3, **LIMITS)
    assert before == DICTS


@given(seed=st.integers(0, 2**31))
def test_draws_are_within_the_limits(seed):
    for d in expand_dataset(DICTS, 4, **LIMITS, seed=seed):
        x, y, scale = d.get("shift_scale", (0, 0, 1))
        assert abs(x) <= 0.1 and abs(y) <= 0.1 and 1 / 1.2 - 1e-9 <= scale <= 1.2 + 1e-9


def test_same_seed_same_draws_in_any_order():
    by_name = {}
    for order in (DICTS, DICTS[::-1], DICTS[2:4]):
        for d in expand_dataset(order, 4, **LIMITS, seed=3):
            by_name.setdefault(d["image_id"], []).append(d.get("shift_scale"))
    for draws in by_name.values():
        assert all(draws[i : i + 4] == draws[:4] for i in range(0, len(draws), 4))
    assert len({tuple(draws) for draws in by_name.values()}) == 5  # each image its own
    assert expand_dataset(DICTS, 4, **LIMITS, seed=4) != expand_dataset(DICTS, 4, **LIMITS, seed=3)


def test_more_copies_keep_the_first_ones():
    few, many = (expand_dataset(DICTS[:1], n, **LIMITS) for n in (2, 5))
    assert many[:2] == few


@pytest.mark.parametrize("factor", [0, -1])
def test_factor_below_one_is_an_error(factor):
    with pytest.raises(ValueError, match=f"EXPAND must be a whole number >= 1, got {factor}"):
        expand_dataset(DICTS, factor, **LIMITS)
