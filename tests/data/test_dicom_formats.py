"""CT DICOM of every kind: compressions, several frames, real files, and headers that lie."""

import resource
from pathlib import Path

import numpy as np
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_rescale
from pydicom.uid import (
    JPEG2000,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from ich_det2.data.dicom import AIR_HU, check_dicom, read_hu, read_series
from ich_det2.data.dicom.header import stream_size

REAL = Path(__file__).parents[2] / "../shared/data/dicom"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on files bad on purpose


def pydicom_ct_files():
    """Every file among pydicom's own that says it is CT."""
    folder = Path(pydicom.__file__).parent / "data/test_files"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        except Exception:
            continue
        if ds.get("Modality") == "CT":
            yield path


def reference(path):
    """HU as pydicom computes them, and where there is padding."""
    ds = pydicom.dcmread(path)
    stored = ds.pixel_array
    padding = ds.get("PixelPaddingValue")
    return apply_rescale(stored, ds), stored == padding if padding is not None else stored != stored


# ---- real files ------------------------------------------------------------------------------


def test_every_ct_file_of_pydicom_reads_as_pydicom_does_or_is_refused():
    read, refused = 0, 0
    for path in pydicom_ct_files():
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if "Rows" not in header:
            with pytest.raises(ValueError, match=r"ends without Pixel Data \(7FE0,0010\)"):
                read_hu(path)
            refused += 1
            continue
        hu = read_hu(path)
        expected, padding = reference(path)
        assert hu.shape == (header.Rows, header.Columns), path
        assert np.array_equal(hu[~padding], expected[~padding]), path
        assert (hu[padding] == AIR_HU).all(), path
        read += 1
    assert read >= 14 and refused >= 40


@needs_real
def test_every_real_file_has_a_head_of_hounsfield_units():
    files = sorted(REAL.rglob("*.dcm"))
    assert len(files) == 12
    for path in files:
        hu = read_hu(path)
        assert hu.shape == (512, 512)
        assert hu.min() >= -1100 and 1000 < hu.max() < 4000, path  # air, teeth or dense bone
        expected, padding = reference(path)
        assert np.array_equal(hu[~padding], expected[~padding])
        inside = hu[(hu > 0) & (hu < 80)]
        assert 20 < np.median(inside) < 45, path  # brain
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        assert ds.PatientPosition == "HFS"
    series, skipped = read_series(REAL)
    # The uncompressed and the compressed slice are one image; LICENSE and CSV are no DICOM.
    assert sorted(len(s.files) for s in series) == [1, 10]
    assert {p.suffix for p, _ in skipped} == {"", ".csv", ".dcm"} and len(skipped) == 3
    for s in series:
        assert not any("left and back" in note for note in s.notes)


@needs_real
def test_real_series_as_one_multi_frame_file(tmp_path):
    """highdicom turns the tilted series into a Legacy Converted Enhanced CT image."""
    (series,), _ = read_series(REAL / "ge_tilted_series")
    shuffled = [series.files[i] for i in np.random.default_rng(0).permutation(10)]
    image = LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(p) for p in shuffled], generate_uid(), 1, generate_uid(), 1
    )
    path = tmp_path / "enhanced.dcm"
    image.save_as(path)
    (found,), skipped = read_series(tmp_path)
    assert skipped == [] and found.files == (path,) * 10
    assert found.spacing_mm == pytest.approx(series.spacing_mm)
    assert found.positions_mm == pytest.approx(series.positions_mm)
    for frame, source in zip(found.frames, series.files, strict=True):
        assert np.array_equal(read_hu(path, frame), read_hu(source))


# ---- compressions ------------------------------------------------------------------------------


def head(shape=(64, 48), low=0, high=4096):
    """Stored values with edges and noise."""
    values = np.random.default_rng(0).integers(low, high, shape)
    values[4:12, 3:9] = low + (high - low) // 2
    return values


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1], ids=lambda s: s.name
)
def test_lossless_compressions(tmp_path, write_ct, compress, syntax, signed):
    values = head() - (1024 if signed else 0)
    path = write_ct(tmp_path / "a.dcm", values - 1024.0)
    ds = pydicom.dcmread(path)
    ds.PixelRepresentation, ds.PixelData = int(signed), values.astype("<i2").tobytes()
    compress(ds, syntax)
    ds.save_as(path)
    check_dicom(path)
    assert np.array_equal(read_hu(path), values - 1024)


# ---- several frames ----------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless])
def test_frames_have_their_own_position_and_rescale(write_enhanced, syntax):
    stored = np.stack([head((64, 40), high=2000 + i) for i in range(3)])
    path = write_enhanced(stored, [10, -5, 2], intercepts=[-1024, 0, 7], syntax=syntax)
    check_dicom(path, 2)
    for frame, intercept in enumerate([-1024, 0, 7]):
        assert np.array_equal(read_hu(path, frame), stored[frame] * 2 + intercept)
    (series,), skipped = read_series(path.parent)
    assert skipped == []
    assert series.frames == (1, 2, 0) and series.positions_mm == (-5, 2, 10)
    assert series.spacing_mm == (7.5, 0.5, 0.5)


def test_frames_are_named_and_counted(write_enhanced):
    stored = np.zeros((2, 4, 4))
    path = write_enhanced(stored, [0, 5], intercepts=[0, 0])
    with pytest.raises(ValueError, match="holds 2 frames, expected one; name a frame"):
        read_hu(path)
    with pytest.raises(ValueError, match="there is no frame 2"):
        read_hu(path, 2)
    path = write_enhanced(stored, [0, 5], intercepts=[0, 0], NumberOfFrames=3)
    with pytest.raises(ValueError, match=r"Per-Frame .* has 2 items, expected 3"):
        read_hu(path, 0)


# ---- headers that lie --------------------------------------------------------------------------


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("frames", [1, 1000])
@pytest.mark.parametrize("side", [65535, 4096])
def test_gigantic_headers_are_refused_before_allocation(write_enhanced, side, frames):
    path = write_enhanced(np.zeros((1, 4, 4)), [0], intercepts=[0])
    ds = pydicom.dcmread(path)
    ds.Rows = ds.Columns = side
    ds.NumberOfFrames = frames
    ds.PerFrameFunctionalGroupsSequence = list(ds.PerFrameFunctionalGroupsSequence) * frames
    ds.save_as(path)
    before = peak_mib()
    message = "Rows .* is 65535, expected 1 to 4096" if side > 4096 else "is truncated"
    with pytest.raises(ValueError, match=message):
        read_hu(path, 0)
    assert peak_mib() - before < 30


def test_streams_that_claim_another_size_are_not_decoded(tmp_path, write_ct, monkeypatch):
    path = write_ct(tmp_path / "a.dcm", np.zeros((64, 64)))
    ds = pydicom.dcmread(path)
    ds.compress(JPEG2000Lossless)
    ds.save_as(path)
    whole = path.read_bytes()
    at = whole.index(b"\xff\x4f\xff\x51") + 8
    path.write_bytes(whole[:at] + b"\0\0\xff\xff" * 2 + whole[at + 8 :])
    monkeypatch.setattr("ich_det2.data.dicom.pixels.get_decoder", None)  # never called
    for function in (check_dicom, read_hu):
        with pytest.raises(
            ValueError, match="image of 65535 x 65535 pixels, its header says 64 x 64"
        ):
            function(path)


def test_stream_sizes(jpeg_lossless):
    assert stream_size(jpeg_lossless(np.zeros((3, 5), np.uint16))) == (3, 5)
    # An application segment before the frame header.
    stream = jpeg_lossless(np.zeros((3, 5), np.uint16))
    assert stream_size(stream[:2] + b"\xff\xe0\x00\x04ab" + stream[2:]) == (3, 5)
    assert stream_size(b"\x01\0\0\0") is None and stream_size(b"\xff\xd8\xff") is None


def test_lossy_file_of_pydicom():
    path = get_testdata_file("693_J2KI.dcm", download=False)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == JPEG2000
    assert read_hu(path).shape == (512, 512)
