"""Overlays: what is drawn where, and that it hides nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.evaluation.visualize import (
    CANDIDATE,
    POSITIVE,
    _probability,
    _threshold,
    draw_overlay,
)


def draw(boxes=(), scores=(), *, size=(650, 650), threshold=0.5, grey=90, channels=1):
    image = np.full((*size, channels), grey, np.uint8)
    return draw_overlay(
        image,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(scores, dtype=float),
        ["hemorrhage"] * len(scores),
        threshold=threshold,
        score=max(scores, default=0.0),
        caption="patient-001   series-01   slice 7",
    )


def has(picture, colour):
    return (picture == colour).all(axis=-1)


@pytest.mark.parametrize(
    "size, factor", [((650, 700), 1), ((600, 600), 1), ((512, 512), 2), ((256, 256), 3)]
)
def test_size(size, factor):
    picture = draw(size=size)
    assert picture.dtype == np.uint8
    assert picture.shape[1] == size[1] * factor
    assert picture.shape[0] > size[0] * factor  # the strip
    assert (picture[: size[0] * factor] == 90).all()  # without boxes the slice is untouched


def test_box_lies_around_its_pixels_and_hides_none_of_them():
    picture = draw([(200, 300, 260, 340)], [0.93])
    assert (picture[300:340, 200:260] == 90).all()
    line = has(picture[:650], POSITIVE)
    assert line[300:340, 199].all() and line[300:340, 260].all()
    assert line[299, 200:260].all() and line[340, 200:260].all()


def test_box_is_enlarged_with_a_small_slice():
    picture = draw([(100, 150, 130, 170)], [0.93], size=(512, 512))
    assert (picture[300:340, 200:260] == 90).all()
    assert has(picture, POSITIVE)[300:340, 199].all()


@pytest.mark.parametrize("score, colour", [(0.5, POSITIVE), (0.49, CANDIDATE), (0.25, CANDIDATE)])
def test_colour_by_threshold(score, colour):
    picture = draw([(200, 300, 260, 340)], [score])[:650]
    assert has(picture, colour)[300:340, 199].all()


def test_below_half_the_threshold_there_is_no_box():
    assert (draw([(200, 300, 260, 340)], [0.24])[:650] == 90).all()


def test_label_stays_in_the_picture_and_off_the_box():
    for box in [(0, 0, 40, 40), (610, 610, 650, 650), (0, 0, 650, 650), (630, 0, 650, 20)]:
        picture = draw([box], [0.93])
        assert picture.shape[1] == 650
        assert has(picture[:650], POSITIVE).any()
    picture = draw([(0, 0, 40, 40)], [0.93])
    assert (picture[3:38, 3:38] == 90).all()


def test_verdict_is_in_the_strip():
    assert has(draw([(1, 2, 30, 40)], [0.5])[650:], POSITIVE).any()
    assert not has(draw([(1, 2, 30, 40)], [0.49])[650:], POSITIVE).any()


def test_a_narrow_slice_keeps_the_whole_caption():
    picture = draw(size=(700, 60))
    assert picture.shape[1] > 200


def test_the_first_window_is_shown():
    image = np.zeros((650, 650, 3), np.uint8)
    image[..., 0], image[..., 1] = 70, 200
    picture = draw_overlay(
        image, np.zeros((0, 4)), np.zeros(0), [], threshold=0.5, score=0.0, caption=""
    )
    assert (picture[:650] == 70).all()


def test_rounding_does_not_contradict_the_verdict():
    from ich_det2.evaluation.visualize import _probability

    assert _probability(0.93, 0.5) == "0.93"
    assert _probability(0.4999, 0.5) == "0.4999"
    assert _probability(0.4999999, 0.5) == "0.4999999"
    assert _probability(0.5, 0.5) == "0.50"


@pytest.mark.parametrize(
    ("score", "threshold", "texts"),
    [
        (0.8, 0.295879, ("0.80", "0.296")),
        (0.2957, 0.295879, ("0.2957", "0.296")),
        (0.498, 0.5, ("0.498", "0.5")),
        (0.001, 0.000321, ("0.001", "0.000321")),
    ],
)
def test_score_and_threshold_in_as_many_digits_as_tell_them_apart(score, threshold, texts):
    assert (_probability(score, threshold), _threshold(threshold)) == texts


@given(st.floats(0, 1), st.floats(0.001, 1))
def test_the_texts_of_score_and_threshold_agree_with_the_verdict(score, threshold):
    shown = _probability(score, threshold)
    if abs(score - threshold) > 1e-3:
        assert (float(shown) >= float(_threshold(threshold))) == (score >= threshold)


@pytest.mark.parametrize("score, colour", [(0.9, POSITIVE), (0.3, CANDIDATE)])
def test_a_mask_is_drawn_as_its_outline(score, colour):
    mask = np.zeros((300, 300), bool)
    mask[100:140, 50:90] = True
    image = np.full((300, 300, 1), 90, np.uint8)
    picture = draw_overlay(
        image, np.array([[40, 90, 100, 150]]), np.array([score]), ["box"],
        threshold=0.5, score=score, caption="", masks=[mask],
    )  # fmt: skip
    line = has(picture[:600], colour)
    # Twice as large: the mask's own pixels 200 to 279 and 100 to 179, within the frame.
    assert line[200, 100:180].all() and line[279, 100:180].all()
    assert line[200:280, 100].all() and line[200:280, 179].all()
    assert (picture[204:276, 104:176] == 90).all() and (picture[185:198, 85:195] == 90).all()
