"""Synthetic patients: what is drawn, what is visible of it, and its boxes."""

import itertools

import numpy as np
import pytest

from ich_det2.phantom.bleeds import TYPES, Bleed
from ich_det2.phantom.patient import MIN_LESION_MM2, NUM_SLICES, find_lesions, make_patient


@pytest.fixture(scope="module")
def patients():
    """One patient of each type, and a healthy one under None."""
    made = {name: make_patient(np.random.default_rng(11), types=[name], size=128) for name in TYPES}
    made[None] = make_patient(np.random.default_rng(11), size=128)
    return made


@pytest.mark.parametrize("name", TYPES)
def test_type_is_visible_and_boxes_are_tight(patients, name):
    patient = patients[name]
    assert {lesion.name for lesions in patient.lesions for lesion in lesions} == {name}
    assert any(not lesions for lesions in patient.lesions)
    for hu, labels, lesions in zip(patient.hu, patient.labels, patient.lesions):
        assert labels.max() == len(lesions)
        for index, lesion in enumerate(lesions):
            rows, columns = np.nonzero(labels == index + 1)
            assert lesion.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            area = rows.size * patient.pixel_mm**2
            assert lesion.area_mm2 == pytest.approx(area, rel=1e-4)
            assert area >= MIN_LESION_MM2
            # the mean of the noise over a few pixels stays below 4 HU
            assert 42 < np.mean(hu[labels == index + 1]) < 100


def test_types_have_their_own_shape(patients):
    def largest(name):
        patient = patients[name]
        return max(itertools.chain(*patient.lesions), key=lambda lesion: lesion.area_mm2)

    def fill(lesion, pixel_mm):
        x0, y0, x1, y1 = lesion.box
        return lesion.area_mm2 / ((x1 - x0) * (y1 - y0) * pixel_mm**2)

    shares = {n: fill(largest(n), patients[n].pixel_mm) for n in ("IPH", "SDH", "SAH")}
    assert shares["IPH"] > 0.5  # a filled blob
    assert shares["SDH"] < 0.4 and shares["SAH"] < 0.6  # a thin shell, a net of sulci


def test_plausible_hu(patients):
    patient = patients[None]
    middle = patient.hu[NUM_SLICES // 2]
    size = middle.shape[0]
    brain = middle[size // 2 - 30 : size // 2 + 30, size // 2 - 30 : size // 2 + 30]
    assert 20 < np.median(brain) < 42
    corner = middle[: size // 10, : size // 10]
    assert abs(np.median(corner) + 1000) < 15
    assert 900 < np.percentile(middle[middle > 300], 90) < 1600
    fat = (middle > -110) & (middle < -40)
    assert fat.sum() > 50
    assert 2 < corner.std() < 8


def test_healthy_patient_has_no_lesion_but_bright_distractors(patients):
    patient = patients[None]
    assert not any(patient.lesions) and not patient.labels.any()
    assert ((patient.hu > 55) & (patient.hu < 90)).mean() > 0.001


def test_neighbouring_slices_agree(patients):
    bone = patients[None].hu > 300
    head = bone[4:10]  # above the skull base
    overlap = (head[1:] & head[:-1]).sum((1, 2)) / head[1:].sum((1, 2))
    assert overlap.min() > 0.3


def test_unknown_type():
    with pytest.raises(ValueError, match=r"got \['ABC'\], expected"):
        make_patient(np.random.default_rng(0), types=["ABC"], size=64)


def test_seed_and_patient_matter():
    def make(seed, patient):
        rng = np.random.default_rng(np.random.SeedSequence([seed, patient]))
        return make_patient(rng, size=64, num_slices=2).hu

    assert np.array_equal(make(0, 1), make(0, 1))
    assert not np.array_equal(make(0, 1), make(1, 1))
    assert not np.array_equal(make(0, 1), make(0, 2))


def test_small_bleed_leaves_image_and_annotation():
    """Two blots of one bleed, 20 HU above brain; the one of 3 x 3 mm must go entirely."""
    bleed = Bleed("IPH", 60.0, distance=lambda fields: None)
    added = np.zeros((1, 64, 64), np.float32)
    added[0, 10:20, 10:20] = 20
    added[0, 40:43, 40:43] = 20
    added[0, 43, 40:43] = 4  # its faint edge
    kept, lesions, labels = find_lesions([bleed], np.full((64, 64), 35.0, np.float32), added, 1.0)
    assert [lesion.box for lesion in lesions] == [(10, 10, 20, 20)]
    assert lesions[0].area_mm2 == 100
    assert kept[0, 10:20, 10:20].min() == 20 and kept.sum() == 100 * 20
    assert labels.sum() == 100
