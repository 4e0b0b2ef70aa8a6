"""CT DICOM: HU against pydicom's own reading, refusals, series in anatomical order."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from highdicom.pixels import apply_voi_window
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_rescale, apply_windowing
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from ich_det2.data.dicom import (
    AIR_HU,
    apply_window,
    check_dicom,
    elements,
    neighbours,
    read_hu,
    read_identity,
    read_series,
    window_image,
)

REAL = Path(__file__).parents[2] / "../shared/data/dicom"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom on files bad on purpose


def make_ct(stored=None, *, bits=16, signed=True, syntax=ExplicitVRLittleEndian, **attributes):
    """A CT slice of the given stored values; an attribute of None is left out."""
    if stored is None:
        stored = np.arange(12).reshape(3, 4)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality = "CT"
    ds.PatientID = "secret"
    ds.StudyInstanceUID = "1.2"
    ds.SeriesInstanceUID = "1.2.3"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.PixelSpacing = [0.5, 0.4]
    ds.SliceThickness = 5
    ds.BitsAllocated = 16
    ds.BitsStored = bits
    ds.HighBit = bits - 1
    ds.PixelRepresentation = int(signed)
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    words = (stored.astype(np.int64) & 0xFFFF).astype(order + "u2")
    ds.PixelData = words.tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def save(ds, path):
    if ds.file_meta.TransferSyntaxUID.is_encapsulated:
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path, enforce_file_format=True)
    return path


def reference(path):
    """HU as pydicom computes them, float64."""
    ds = pydicom.dcmread(path)
    return apply_rescale(ds.pixel_array, ds)


def refused(path, message):
    """Both read_hu and check_dicom refuse, in one sentence that names the file."""
    for function in (check_dicom, read_hu):
        with pytest.raises(ValueError) as error:
            function(path)
        text = str(error.value)
        assert text.startswith(f"{path}: "), text
        assert message in text
        assert "\n" not in text


# --- read_hu -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [12, 14, 16])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless]
)
def test_hu_equal_pydicom(tmp_path, bits, signed, syntax):
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.random.default_rng(0).integers(low, low + 2**bits, (7, 5))
    values.flat[:2] = low, low + 2**bits - 1
    first = ExplicitVRLittleEndian if syntax.is_encapsulated else syntax
    ds = make_ct(values, bits=bits, signed=signed, syntax=first)
    if syntax.is_encapsulated:
        ds.compress(syntax, generate_instance_uid=False)
    path = save(ds, tmp_path / "a.dcm")
    check_dicom(path)
    hu = read_hu(path)
    assert hu.dtype == np.float32
    assert np.array_equal(hu, values - 1024)
    assert np.array_equal(hu, reference(path))


@pytest.mark.parametrize("signed", [True, False])
def test_unused_high_bits_are_ignored(tmp_path, signed):
    # -3 in 12 bits is 0xFFD; the four bits above it hold an overlay.
    value = -3 if signed else 0xFFD
    words = np.array([[0x0FFD, 0x5FFD, 0xFFFD, 0x8FFD]])
    path = save(make_ct(words, bits=12, signed=signed), tmp_path / "a.dcm")
    assert np.array_equal(read_hu(path), np.full((1, 4), value - 1024))
    assert np.array_equal(read_hu(path), reference(path))


def test_fractional_rescale(tmp_path):
    values = np.random.default_rng(1).integers(-2048, 2048, (16, 16))
    ds = make_ct(values, RescaleSlope="0.48828125", RescaleIntercept="-7.5")
    path = save(ds, tmp_path / "a.dcm")
    assert np.array_equal(read_hu(path), reference(path).astype(np.float32))
    path = save(make_ct(values, RescaleSlope="1.0437"), tmp_path / "b.dcm")
    np.testing.assert_allclose(read_hu(path), reference(path), rtol=0, atol=1e-3)


@pytest.mark.parametrize("vr", ["SS", "US"])
def test_padding_becomes_air_whatever_its_vr(tmp_path, vr):
    ds = make_ct(np.array([[-2000, 0, 1063]]))
    ds.add_new("PixelPaddingValue", vr, -2000 if vr == "SS" else 0x10000 - 2000)
    assert read_hu(save(ds, tmp_path / "a.dcm")).tolist() == [[AIR_HU, -1024, 39]]


@pytest.mark.parametrize("limits", [(-2000, -1500), (-1500, -2000)])
def test_padding_range_includes_both_ends(tmp_path, limits):
    ds = make_ct(np.array([[-2001, -2000, -1700, -1500, -1499]]), RescaleIntercept=0)
    ds.add_new("PixelPaddingValue", "SS", limits[0])
    ds.add_new("PixelPaddingRangeLimit", "SS", limits[1])
    hu = read_hu(save(ds, tmp_path / "a.dcm"))
    assert hu.tolist() == [[-2001, AIR_HU, AIR_HU, AIR_HU, -1499]]


def test_unsigned_padding(tmp_path):
    ds = make_ct(np.array([[0, 63536, 1024]]), signed=False)
    ds.add_new("PixelPaddingValue", "US", 63536)
    assert read_hu(save(ds, tmp_path / "a.dcm")).tolist() == [[-1024, AIR_HU, 0]]


@pytest.mark.parametrize("intercept", [0, -1])
def test_twelve_bits_that_wrapped(tmp_path, intercept):
    # HU -1000, 0, 1000 and 2999 as 12-bit two's complement in a file that says "unsigned".
    stored = np.array([[-1000, 0, 1000, 2999]]) & 0xFFF
    ds = make_ct(stored, bits=12, signed=False, RescaleIntercept=intercept)
    hu = read_hu(save(ds, tmp_path / "a.dcm"))
    assert hu.tolist() == [[-1000 + intercept, intercept, 1000 + intercept, 2999 + intercept]]
    # With the usual intercept the same values are what they say.
    ds = make_ct(stored, bits=12, signed=False, RescaleIntercept=-1024)
    assert read_hu(save(ds, tmp_path / "b.dcm")).tolist() == (stored - 1024).tolist()


def bone_in_padding(padding):
    """A head with one dense voxel of the value that padding has when it is cut to 12 bits."""
    stored = np.full((8, 8), 1064)  # 40 HU
    stored[0], stored[:, 0] = padding, padding
    stored[4, 4] = -2000 & 0xFFF  # 2096 is 1072 HU
    expected = np.full((8, 8), 40.0)
    expected[0], expected[:, 0], expected[4, 4] = AIR_HU, AIR_HU, 1072
    return stored, expected


@pytest.mark.parametrize("declared", [-2000, None])
def test_padding_with_its_sign_in_unsigned_words(tmp_path, declared):
    stored, expected = bone_in_padding(-2000)
    ds = make_ct(stored, bits=12, signed=False)
    if declared is not None:
        ds.add_new("PixelPaddingValue", "SS", declared)
    assert np.array_equal(read_hu(save(ds, tmp_path / "a.dcm")), expected)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_padding_cut_to_twelve_bits(tmp_path, syntax):
    stored, expected = bone_in_padding(-2000 & 0xFFF)
    ds = make_ct(stored, bits=12, signed=False)
    ds.add_new("PixelPaddingValue", "SS", -2000)
    if syntax.is_encapsulated:
        ds.compress(syntax, generate_instance_uid=False)
    assert np.array_equal(read_hu(save(ds, tmp_path / "a.dcm")), expected)


def test_monochrome1_does_not_invert_hu(tmp_path):
    path = save(make_ct(PhotometricInterpretation="MONOCHROME1"), tmp_path / "a.dcm")
    assert np.array_equal(read_hu(path), np.arange(12).reshape(3, 4) - 1024)


def test_result_is_writable_and_trailing_bytes_are_ignored(tmp_path):
    ds = make_ct()
    ds.PixelData += b"\0" * 6
    hu = read_hu(save(ds, tmp_path / "a.dcm"))
    hu += 1
    assert hu[0, 0] == -1023


def test_pydicom_ct_small():
    path = get_testdata_file("CT_small.dcm", download=False)
    padding = pydicom.dcmread(path).PixelPaddingValue
    expected = reference(path)
    expected[pydicom.dcmread(path).pixel_array == padding] = AIR_HU
    check_dicom(path)
    assert np.array_equal(read_hu(path), expected)


@needs_real
def test_real_compressed_and_uncompressed_are_equal():
    plain = REAL / "cq500_693/693_UNCR.dcm"
    hu = read_hu(plain)
    inside = pydicom.dcmread(plain).pixel_array != -2000
    assert hu.shape == (512, 512)
    assert np.array_equal(hu[inside], reference(plain)[inside])
    assert (hu[~inside] == AIR_HU).all() and (~inside).any()
    packed = REAL / "cq500_693/693_J2KR.dcm"
    check_dicom(packed)
    assert np.array_equal(read_hu(packed), hu)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"Modality": "MR"}, "Modality (0008,0060) is MR, expected CT"),
        (
            {"SOPClassUID": SecondaryCaptureImageStorage},
            "SOP Class UID (0008,0016) is Secondary Capture Image Storage, expected CT Image",
        ),
        ({"PixelData": None}, "ends without Pixel Data"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"NumberOfFrames": 2}, "is truncated: its pixel data has 24 bytes, its header says 48"),
        ({"RescaleSlope": None}, "has no Rescale Slope (0028,1053)"),
        ({"RescaleIntercept": None}, "has no Rescale Intercept (0028,1052)"),
        ({"RescaleIntercept": ""}, "has no Rescale Intercept (0028,1052)"),
        ({"RescaleSlope": 0}, "Rescale Slope (0028,1053) is 0"),
        ({"RescaleSlope": [1, 2]}, "Rescale Slope (0028,1053) has 2 values"),
        ({"RescaleType": "Z_EFF"}, "Rescale Type (0028,1054) is Z_EFF, expected HU"),
        ({"Rows": None}, "has no Rows (0028,0010)"),
        ({"Rows": 0}, "Rows (0028,0010) is 0, expected 1 to 4096"),
        ({"Columns": 65535}, "Columns (0028,0011) is 65535"),
        ({"Rows": 4}, "is truncated: its pixel data has 24 bytes, its header says 32"),
        ({"BitsAllocated": 8}, "Bits Allocated (0028,0100) is 8, expected 16"),
        ({"BitsStored": 17}, "Bits Stored (0028,0101) is 17"),
        ({"HighBit": 11}, "High Bit (0028,0102) is 11, expected 15"),
        ({"PixelRepresentation": 2}, "Pixel Representation (0028,0103) is 2"),
    ],
)
def test_refusals_name_attribute_and_value(tmp_path, attributes, message):
    refused(save(make_ct(**attributes), tmp_path / "a.dcm"), message)


def test_number_that_is_none(tmp_path):
    path = save(make_ct(RescaleSlope="1.5"), tmp_path / "a.dcm")
    path.write_bytes(path.read_bytes().replace(b"1.5 ", b"abc "))
    refused(path, "Rescale Slope (0028,1053) cannot be read as a number")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 200, b"\0" * 128 + b"DICX" + b"\0" * 50]
)
def test_not_dicom(tmp_path, content):
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    refused(path, "is not a DICOM file")


def test_missing_file_and_folder(tmp_path):
    for function in (read_hu, check_dicom, read_identity):
        with pytest.raises(FileNotFoundError, match=r"none\.dcm: no such DICOM file"):
            function(tmp_path / "none.dcm")
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_every_cut_is_refused(tmp_path, syntax):
    ds = make_ct(syntax=ImplicitVRLittleEndian if syntax.is_implicit_VR else ExplicitVRLittleEndian)
    if syntax.is_encapsulated:
        ds.compress(syntax)
    whole = save(ds, tmp_path / "whole.dcm").read_bytes()
    path = tmp_path / "cut.dcm"
    # Lengths all over the file: preamble, header, tag of the pixel data,
    # pixel data. A compressed file ends with an end marker whose length of zero says nothing.
    last = len(whole) - (4 if syntax.is_encapsulated else 0)
    for length in range(0, last, 5):
        path.write_bytes(whole[:length])
        refused(path, "")
    path.write_bytes(whole[: last - 1])
    refused(path, "is truncated")


def test_compressed_faults(tmp_path):
    ds = make_ct(syntax=JPEG2000Lossless)
    ds.PixelData = encapsulate([b"12"]).replace(b"\x02\0\0\00012", b"\0\0\0\0")
    refused(save(ds, tmp_path / "empty.dcm"), "empty compressed pixel data")

    ds = make_ct(syntax=MPEG2MPML)
    ds.PixelData = encapsulate([b"1234"])
    refused(save(ds, tmp_path / "film.dcm"), "for which no decoder is installed")

    ds = make_ct(syntax=JPEG2000Lossless)
    ds.PixelData = encapsulate([b"no codestream!"])
    path = save(ds, tmp_path / "noise.dcm")
    check_dicom(path)  # whole as a file; only decoding shows the damage
    with pytest.raises(ValueError, match=r"noise\.dcm: is damaged"):
        read_hu(path)


def test_compressed_image_of_another_size(tmp_path):
    ds = make_ct(np.zeros((4, 4), int))
    ds.compress(RLELossless)
    ds.Rows = 5
    with pytest.raises(ValueError, match=r"a\.dcm: "):
        read_hu(save(ds, tmp_path / "a.dcm"))


def test_deflated(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(-2048, 2048, (16, 16))
    path = save(make_ct(values, syntax=DeflatedExplicitVRLittleEndian), tmp_path / "a.dcm")
    check_dicom(path)
    assert np.array_equal(read_hu(path), values - 1024)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    refused(path, "its deflated data set has no end")
    path.write_bytes(whole)
    monkeypatch.setattr(elements, "MAX_INFLATED", 600)
    refused(path, "unfolds to more than")


@pytest.mark.parametrize(
    "name, message",
    [
        ("test-SR.dcm", "is SR, expected CT"),
        ("MR_truncated.dcm", "is MR, expected CT"),
        ("rtplan.dcm", "is RTPLAN, expected CT"),
        ("no_meta.dcm", "is not a DICOM file"),
        ("examples_rgb_color.dcm", "expected CT"),
    ],
)
def test_pydicom_files_that_are_no_ct(name, message):
    refused(Path(get_testdata_file(name, download=False)), message)


@needs_real
@pytest.mark.parametrize("name", ["693_UNCR.dcm", "693_J2KR.dcm"])
def test_real_files_cut_short(tmp_path, name):
    whole = (REAL / "cq500_693" / name).read_bytes()
    path = tmp_path / name
    for length in (100, 140, 400, 1000, 2000, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        refused(path, "")


def test_identity(tmp_path):
    ds = make_ct()
    assert read_identity(save(ds, tmp_path / "a.dcm")) == ("secret", "1.2", ds.SOPInstanceUID)
    ds = make_ct(PatientID=None)
    assert read_identity(save(ds, tmp_path / "b.dcm")) == ("", "1.2", ds.SOPInstanceUID)


# --- apply_window --------------------------------------------------------------------------------


def test_window_by_hand():
    # Level 50, width 100 is 0..100 HU: 25 HU -> 0.25, and what lies outside is clipped.
    hu = np.array([[-1000, 0, 25, 50, 100, 3000]], dtype=np.float32)
    before = hu.copy()
    out = apply_window(hu, 50, 100)
    assert out.dtype == np.float32
    assert out.tolist() == [[0, 0, 0.25, 0.5, 1, 1]]
    assert np.array_equal(hu, before)


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.float64])
def test_window_takes_any_number(dtype):
    out = apply_window(np.array([-200, 40, 80], dtype=dtype), 40, 80)
    assert out.dtype == np.float32
    assert out.tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("level, width", [(50, 100), (40, 80), (600, 2800)])
def test_window_is_linear_exact_of_pydicom_and_highdicom(level, width):
    hu = np.arange(-1024, 3072, dtype=np.int16)
    ours = apply_window(hu, level, width)
    ds = make_ct(VOILUTFunction="LINEAR_EXACT", RescaleIntercept=0)
    ds.WindowCenter, ds.WindowWidth = level, width
    theirs = apply_windowing(hu, ds)  # onto the 16-bit range -32768 ... 32767
    np.testing.assert_allclose(ours, (theirs + 32768) / 65535, atol=1e-6)
    exact = apply_voi_window(
        hu.astype(float), level, width, voi_lut_function="LINEAR_EXACT", output_range=(0, 1)
    )
    np.testing.assert_allclose(ours, exact, atol=1e-6)
    # LINEAR, the default of DICOM, is at most 1 / width away, and is what docs/dicom.md says.
    linear = apply_voi_window(
        hu.astype(float), level, width, voi_lut_function="LINEAR", output_range=(0, 1)
    )
    by_hand = np.clip((hu - (level - 0.5)) / (width - 1) + 0.5, 0, 1)
    np.testing.assert_allclose(linear, by_hand, atol=1e-12)
    assert 0 < np.abs(ours - linear).max() <= 1 / width + 1e-6


def test_eight_bit_windows():
    hu = np.random.default_rng(0).uniform(-200, 300, (9, 7)).astype(np.float32)
    windows = [(50, 100), (80, 200), (600, 2800)]
    image = window_image(hu, windows)
    assert image.dtype == np.uint8 and image.shape == (9, 7, 3)
    for channel, window in enumerate(windows):
        expected = np.rint(apply_window(hu, *window) * 255)
        assert np.array_equal(image[..., channel], expected)


def test_window_against_the_standard():
    # PS3.3 C.11.2.1.2.1, LINEAR: ((x - (c - 0.5)) / (w - 1) + 0.5), clipped.
    hu = np.linspace(-50, 150, 2001, dtype=np.float32)
    linear = np.clip((hu - 49.5) / 99 + 0.5, 0, 1)
    difference = np.abs(apply_window(hu, 50, 100) - linear).max()
    assert 0.0099 < difference <= 0.01 + 1e-6


@pytest.mark.parametrize("level, width", [(50, 0), (50, -1), (50, np.nan), (np.inf, 100)])
def test_window_refuses(level, width):
    with pytest.raises(ValueError, match="positive width"):
        apply_window(np.zeros(3), level, width)


# --- read_series ---------------------------------------------------------------------------------

AXIAL = [1, 0, 0, 0, 1, 0]
SAGITTAL = [0, 1, 0, 0, 0, -1]


def make_slice(height, orientation=AXIAL, **attributes):
    """A slice at a height in mm along the normal of its orientation."""
    normal = np.cross(orientation[:3], orientation[3:])
    position = [float(v) for v in normal * height]
    return make_ct(ImagePositionPatient=position, ImageOrientationPatient=orientation, **attributes)


def names(series):
    return [path.name for path in series.files]


def test_slices_are_sorted_along_the_normal(tmp_path):
    # Names and instance numbers run against the anatomy; one folder deeper is found too.
    (tmp_path / "deep").mkdir()
    save(make_slice(12, InstanceNumber=1), tmp_path / "a")
    save(make_slice(-3, InstanceNumber=2), tmp_path / "deep" / "b.dcm")
    save(make_slice(2, InstanceNumber=3), tmp_path / "c.dcm")
    (series,), skipped = read_series(tmp_path)
    assert names(series) == ["b.dcm", "c.dcm", "a"]
    assert series.spacing_mm == (7.5, 0.5, 0.4)  # gaps 5 and 10
    assert (series.series_uid, series.study_uid, series.patient_id) == ("1.2.3", "1.2", "secret")
    assert skipped == []


def test_series_and_orientations_are_apart(tmp_path):
    for index, height in enumerate((5, 0)):
        save(make_slice(height), tmp_path / f"axial{index}.dcm")
        save(make_slice(height, SAGITTAL), tmp_path / f"sagittal{index}.dcm")
        save(make_slice(height, SeriesInstanceUID="1.2.2"), tmp_path / f"other{index}.dcm")
    series, skipped = read_series(tmp_path)
    assert [names(s) for s in series] == [
        ["other1.dcm", "other0.dcm"],
        ["axial1.dcm", "axial0.dcm"],
        ["sagittal1.dcm", "sagittal0.dcm"],
    ]
    assert skipped == []


def test_everything_else_is_skipped_with_a_reason(tmp_path):
    save(make_slice(0), tmp_path / "slice0.dcm")
    save(make_slice(5), tmp_path / "slice1.dcm")
    save(make_slice(9, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), tmp_path / "scout.dcm")
    save(make_slice(9, Modality="SR", PixelData=None), tmp_path / "report.dcm")
    (tmp_path / "notes.txt").write_text("hello")
    shutil.copy(tmp_path / "slice0.dcm", tmp_path / "slice0_copy.dcm")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "slice0.dcm").read_bytes()[:-1])
    (tmp_path / "broken_link").symlink_to(tmp_path / "nothing")
    (series,), skipped = read_series(tmp_path)
    assert names(series) == ["slice0.dcm", "slice1.dcm"]
    reasons = {path.name: reason for path, reason in skipped}
    assert list(reasons) == sorted(reasons)
    expected = {
        "broken_link": "is not a regular file.",
        "cut.dcm": "is truncated",
        "notes.txt": "is not a DICOM file",
        "report.dcm": "is SR, expected CT.",
        "scout.dcm": "is a localizer",
        "slice0_copy.dcm": "repeats the image slice0.dcm",
    }
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name]
        assert str(tmp_path) not in reasons[name]


def test_what_is_no_head_is_skipped(tmp_path):
    for name, part in (
        ("a", "HEAD"),
        ("b", ""),
        ("c", "Head/Neck"),
        ("d", "CHEST"),
        ("e", "LSPINE"),
    ):
        save(make_slice(ord(name), BodyPartExamined=part), tmp_path / name)
    (series,), skipped = read_series(tmp_path)
    assert names(series) == ["a", "b", "c"]
    reasons = {path.name: reason for path, reason in skipped}
    assert reasons == {
        "d": "Body Part Examined (0018,0015) is CHEST, expected a head.",
        "e": "Body Part Examined (0018,0015) is LSPINE, expected a head.",
    }


def notes(tmp_path, heights, **attributes):
    for i, height in enumerate(heights):
        save(make_slice(height, PixelSpacing=[0.5, 0.5], **attributes), tmp_path / f"{i}")
    (series,), skipped = read_series(tmp_path)
    assert skipped == [] and len(series.files) == len(heights)
    assert series.positions_mm == tuple(sorted(heights))
    return list(series.notes)


def test_nothing_to_note_in_an_even_series_or_one_of_two_spacings(tmp_path):
    assert notes(tmp_path, [0, 2.5, 5, 7.5, 12.5, 17.5, 22.5]) == []


def test_missing_and_repeated_slices_are_noted(tmp_path):
    assert notes(tmp_path, [0, 5, 10, 25, 30, 30, 35]) == [
        "2 slice(s) seem to be missing between 2 and 3: 15.0 mm apart, beside them 5.0 mm",
        "4 and 5 lie at one position",
    ]


def test_odd_pixels_and_orientations_are_noted(tmp_path):
    save(make_slice(0), tmp_path / "a")  # 0.5 mm between rows, 0.4 between columns
    save(make_slice(0, [-1, 0, 0, 0, -1, 0], SeriesInstanceUID="1.2.4"), tmp_path / "b")
    series, _ = read_series(tmp_path)
    square = "pixels are not square: 0.5 mm between rows, 0.4 mm between columns"
    turned = "rows and columns do not run to the patient's left and back, as in usual axial slices"
    assert [s.notes for s in series] == [(square,), (square, turned)]


def test_neighbours():
    # In order: 0, 5, 10, then a gap of 15, 25, 30. The ends and the gap have nothing beyond.
    table = neighbours([10, 0, 25, 5, 30])
    assert table.tolist() == [[3, 0, 0], [1, 1, 3], [2, 2, 4], [1, 3, 0], [2, 4, 4]]
    assert neighbours([7.0]).tolist() == [[0, 0, 0]]
    assert neighbours([0, 5, 10], reach=2)[0].tolist() == [0, 0, 0, 1, 2]


def test_single_file_needs_no_geometry(tmp_path):
    save(make_ct(PixelSpacing=None), tmp_path / "only.dcm")
    (series,), skipped = read_series(tmp_path)
    assert names(series) == ["only.dcm"]
    assert series.spacing_mm[0] == 5
    assert np.isnan(series.spacing_mm[1:]).all()
    assert skipped == []


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    save(make_slice(0), outside / "a.dcm")
    save(make_slice(5), inside / "b.dcm")
    (inside / "file.dcm").symlink_to(outside / "a.dcm")
    (inside / "folder").symlink_to(outside)
    (series,), skipped = read_series(inside)
    assert names(series) == ["b.dcm"]
    assert [path.name for path, _ in skipped] == ["file.dcm", "folder"]
    assert all("not followed" in reason for _, reason in skipped)
    # The folder itself may be a link.
    (tmp_path / "link").symlink_to(inside)
    assert names(read_series(tmp_path / "link")[0][0]) == ["b.dcm"]


def test_missing_or_empty_folder(tmp_path):
    assert read_series(tmp_path) == ([], [])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_series(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        read_series(tmp_path / "file")


@needs_real
def test_real_tilted_series(tmp_path):
    sources = sorted((REAL / "ge_tilted_series").glob("*.dcm"))
    order = np.random.default_rng(0).permutation(len(sources))
    for source, place in zip(sources, order, strict=True):
        ds = pydicom.dcmread(source)
        ds.InstanceNumber = int(place)
        ds.save_as(tmp_path / f"{place}.dcm")
    (series,), skipped = read_series(tmp_path)
    assert skipped == []
    # The source names count up from the base of the skull.
    assert names(series) == [f"{place}.dcm" for place in order]
    heights = [float(pydicom.dcmread(p).ImagePositionPatient[2]) for p in series.files]
    assert heights == sorted(heights)
    gaps = np.diff(heights) * np.cos(np.deg2rad(18.5))  # the normal is tilted by 18.5 degrees
    assert series.spacing_mm[0] == pytest.approx(np.median(gaps), abs=0.1)
    assert series.is_axial
    assert series.frames == (None,) * 10
