"""CT files and pictures of the kinds that several tests need."""

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import EnhancedCTImageStorage, JPEGLosslessSV1


def encode_jpeg_lossless(values):
    """Encode (H, W) unsigned 16-bit values as JPEG process 14, selection value 1 (ITU-T T.81)."""
    height, width = values.shape
    bits = []
    for y, row in enumerate(values.astype(int)):
        for x, value in enumerate(row):
            # First row: from the left; first column: from above; predictor 1: from the left.
            before = row[x - 1] if x else values[y - 1, 0] if y else 1 << 15
            difference = (int(value) - int(before) + 0x8000) % 0x10000 - 0x8000
            size = abs(difference).bit_length()
            bits.append(f"{size:05b}")  # 17 categories, each with a code of 5 bits
            if 0 < size < 16:
                bits.append(
                    f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}"
                )
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    huffman = bytes([0]) + bytes([0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17))
    frame = (
        bytes([16]) + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([1, 1, 0x11, 0])
    )

    def segment(marker, content):
        return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content

    return (
        b"\xff\xd8"
        + segment(0xC3, frame)
        + segment(0xC4, huffman)
        + segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
        + data
        + b"\xff\xd9"
    )


@pytest.fixture
def jpeg_lossless():
    """Function that encodes an image as JPEG lossless."""
    return encode_jpeg_lossless


@pytest.fixture
def compress(jpeg_lossless):
    """Function that compresses the pixels of a data set; pydicom has no encoder of process 14."""

    def apply(ds, syntax):
        if syntax == JPEGLosslessSV1:
            stored = np.frombuffer(ds.PixelData, "<u2").reshape(-1, ds.Rows, ds.Columns)
            ds.PixelData = encapsulate([jpeg_lossless(frame) for frame in stored])
            ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
            ds.file_meta.TransferSyntaxUID = syntax
        else:
            ds.compress(syntax, generate_instance_uid=False)

    return apply


@pytest.fixture
def write_enhanced(tmp_path, write_ct, compress):
    """Factory of an Enhanced CT file: frame i lies at a height and has a rescale of its own."""

    def write(stored, heights, *, intercepts, syntax=None, **attributes):
        path = write_ct(tmp_path / "enhanced.dcm", np.zeros(stored.shape[1:]))
        ds = pydicom.dcmread(path)
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = EnhancedCTImageStorage
        ds.SeriesInstanceUID, ds.NumberOfFrames = "1.2.3", len(stored)
        del ds.RescaleSlope, ds.RescaleIntercept
        shared, measures, orientation = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = [0.5, 0.5], 5
        orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        shared.PixelMeasuresSequence = [measures]
        shared.PlaneOrientationSequence = [orientation]
        ds.SharedFunctionalGroupsSequence = [shared]
        frames = []
        for height, intercept in zip(heights, intercepts, strict=True):
            frame, position, transformation = Dataset(), Dataset(), Dataset()
            position.ImagePositionPatient = [0, 0, height]
            transformation.RescaleIntercept, transformation.RescaleSlope = intercept, 2
            transformation.RescaleType = "HU"
            frame.PlanePositionSequence = [position]
            frame.PixelValueTransformationSequence = [transformation]
            frames.append(frame)
        ds.PerFrameFunctionalGroupsSequence = frames
        ds.PixelData = stored.astype("<u2").tobytes()
        if syntax is not None:
            compress(ds, syntax)
        for keyword, value in attributes.items():
            setattr(ds, keyword, value)
        ds.save_as(path)
        return path

    return write


def _draw_head(centre, axes, *, couch=False, shape=(256, 256), seed=0):
    """Skull and noisy brain in a brain window; a couch that touches it, and one that does not."""
    grey = np.zeros(shape, np.uint8)
    cv2.ellipse(grey, centre, axes, 0, 0, 360, 255, -1)
    cv2.ellipse(grey, centre, (axes[0] - 8, axes[1] - 8), 0, 0, 360, 110, -1)
    noise = np.random.default_rng(seed).normal(110, 30, shape).clip(0, 255)
    grey = np.where(grey == 110, noise, grey).astype(np.uint8)
    if couch:
        cv2.ellipse(grey, (128, 60), (125, centre[1] + axes[1] - 58), 0, 5, 175, 200, 3)
        grey[200:, 4:9] = 255
    return grey


@pytest.fixture
def draw_head():
    """Skull and noisy brain in a brain window."""
    return _draw_head
