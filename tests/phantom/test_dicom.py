"""An exam of a synthetic patient, as the readers of this package see it."""

import numpy as np
import pytest

from ich_det2.data.dicom import read_hu, read_identity, read_series
from ich_det2.phantom import make_patient, write_exam
from ich_det2.phantom.dicom import dicom_slice, patient_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two exams of one seed: with and without a bleed."""
    folder = tmp_path_factory.mktemp("exams")
    for kind in (True, False):
        paths = write_exam(folder / "new" / str(kind), size=64, bleeding=kind)
        assert paths == sorted((folder / "new" / str(kind)).iterdir())
    return folder / "new"


def test_exams_are_whole_series_of_different_people(folder):
    series, skipped = read_series(folder)
    assert skipped == [] and [len(s.files) for s in series] == [13, 13]
    people = {read_identity(path)[:2] for s in series for path in s.files}
    assert len(people) == 2
    assert {path.name for s in series for path in s.files} == {
        f"{patient_name(patient)}_{number:03d}.dcm" for patient in (1, 2) for number in range(1, 14)
    }


def test_an_exam_follows_from_its_seed(folder, tmp_path):
    def content(paths):
        return [path.read_bytes() for path in paths]

    again = write_exam(str(tmp_path / "again"), seed=0, size=64)
    assert content(again) == content(sorted((folder / "True").iterdir()))
    other = write_exam(tmp_path / "other", seed=1, size=64)
    assert read_identity(other[0])[:2] != read_identity(again[0])[:2]
    assert not np.array_equal(read_hu(other[5]), read_hu(again[5]))


def test_hu_are_stored_whole_within_twelve_bits():
    phantom = make_patient(np.random.default_rng(0), size=64, num_slices=2)
    phantom.hu[0, 0, :4] = -5000, 5000, 40.4, 40.6
    ds = dicom_slice(phantom, 0, patient=3, seed=0)
    assert list(ds.pixel_array[0, :4] + float(ds.RescaleIntercept)) == [-1024, 3071, 40, 41]
    assert (ds.BitsStored, ds.PixelRepresentation) == (12, 0)
