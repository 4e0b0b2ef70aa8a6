"""Damaged files: whatever is in them, one documented error, no crash, no hang, bounded memory.

``pytest tests/data/test_fuzz.py --fuzz-examples 2000`` runs longer than the suite does.
"""

import itertools
import os
import resource
import time
import tracemalloc

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ich_det2.data.dicom import check_dicom, read_hu, read_series, read_windowed, window_image
from ich_det2.data.voc import VocAnnotation, read_voc, write_voc

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # pydicom warns about nearly every mutation
]

SECONDS = 10
"""No file may take longer, on a busy machine; whole ones take milliseconds."""

GROWTH_MIB = 512
"""The process may grow by so much over the whole run; a slice of the largest size that is accepted
takes 64 MiB as float32, and a deflated file unfolds to at most 256 MiB."""

# A mutation: where (as a share of the file), what, and how much of it.
MUTATION = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["set", "flip", "delete", "insert", "repeat", "cut", "swap"]),
    st.binary(min_size=1, max_size=8),
)
# Most damage that gets far is in the header; half of the places are within its first kilobytes.
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=6)


def mutate(data, mutations, reach):
    """Apply mutations to bytes; every other one within the first ``reach`` bytes."""
    data = bytearray(data)
    for i, (place, kind, extra) in enumerate(mutations):
        span = min(len(data), reach) if i % 2 == 0 else len(data)
        at = int(place * span)
        if kind == "set":
            data[at : at + len(extra)] = extra
        elif kind == "flip" and data:
            data[at] ^= extra[0] or 1
        elif kind == "delete":
            del data[at : at + extra[0]]
        elif kind == "insert":
            data[at:at] = extra
        elif kind == "repeat":
            data[at:at] = data[at : at + extra[0]] * (1 + extra[-1] % 4)
        elif kind == "cut" and extra[0] < 64:
            del data[at:]
        elif kind == "swap":
            data[at : at + 2] = data[at : at + 2][::-1]
    return bytes(data)


@pytest.fixture
def dicom_seeds(tmp_path, write_ct, write_enhanced, compress):
    """Small CT files, each with the frame to read: one in each kind of transfer syntax, a real one,
    and Enhanced ones of three frames."""
    seeds = [open(get_testdata_file("CT_small.dcm", download=False), "rb").read()]
    hu = np.random.default_rng(0).integers(-1000, 2000, (48, 64))
    path = write_ct(
        tmp_path / "seed.dcm", hu, SeriesInstanceUID="1.2", ImagePositionPatient=[0, 0, 1.5],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[0.5, 0.5],
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], PatientID="x",
    )  # fmt: skip
    seeds.append(path.read_bytes())
    for syntax in (JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1, RLELossless):
        ds = pydicom.dcmread(path)
        compress(ds, syntax)
        ds.save_as(tmp_path / "other.dcm")
        seeds.append((tmp_path / "other.dcm").read_bytes())
    for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian):
        ds = pydicom.dcmread(path)
        words = np.frombuffer(ds.PixelData, "<u2")
        ds.PixelData = words.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
        ds.file_meta.TransferSyntaxUID = syntax
        plain = pydicom.Dataset(ds)
        plain.file_meta = ds.file_meta
        plain.save_as(tmp_path / "other.dcm", enforce_file_format=True)
        seeds.append((tmp_path / "other.dcm").read_bytes())
    seeds = [(seed, None) for seed in seeds]
    stored = np.random.default_rng(0).integers(0, 2000, (3, 32, 40))
    for syntax in (None, RLELossless, JPEG2000Lossless, JPEGLosslessSV1):
        path = write_enhanced(
            stored, [10, -5, 2], intercepts=[-1024, 0, 7], syntax=syntax, PatientID="x"
        )
        seeds.append((path.read_bytes(), 1))
    return seeds


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_fuzz(pytestconfig, strategy, check):
    """Run ``check`` on examples; the process must not grow nor any example take too long."""
    slowest = 0.0

    @settings(
        max_examples=pytestconfig.getoption("--fuzz-examples"),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example):
        nonlocal slowest
        start = time.perf_counter()
        check(example)
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        assert seconds < SECONDS

    before = peak_mib()
    run()
    growth = peak_mib() - before
    print(f"\nslowest {slowest * 1e3:.0f} ms, growth {growth:.0f} MiB")
    assert growth < GROWTH_MIB


def test_mutated_dicom(pytestconfig, tmp_path, dicom_seeds):
    path = tmp_path / "fuzz" / "a.dcm"
    path.parent.mkdir()
    outcomes, times = {"read": 0, "refused": 0}, itertools.count()

    def check(example):
        seed, mutations = example
        data, frame = dicom_seeds[seed]
        path.write_bytes(mutate(data, mutations, reach=1500))
        os.utime(path, ns=(0, next(times)))  # examples follow faster than the clock of files
        try:
            hu = read_hu(path, frame)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            grey, _ = read_windowed(path, [(50, 100)], frame)
            assert np.array_equal(grey, window_image(hu, [(50, 100)]))
            assert hu.dtype == np.float32 and hu.ndim == 2 and np.isfinite(hu).all()
            check_dicom(path, frame)  # what can be read passes the check
            outcomes["read"] += 1
        series, skipped = read_series(path.parent)
        assert sum(len(s.files) for s in series) + len(skipped) >= 1

    run_fuzz(pytestconfig, st.tuples(st.integers(0, len(dicom_seeds) - 1), MUTATIONS), check)
    print(outcomes)
    assert outcomes["read"] and outcomes["refused"]


def test_mutated_xml(pytestconfig, tmp_path):
    path = tmp_path / "a.xml"
    box = (10.5, 20, 30, 44)
    objects = [("SDH", box), ("IPH", box)]
    write_voc(path, filename="a.dcm", width=64, height=48, objects=objects, database="x")
    seeds = [path.read_bytes(), b'<?xml version="1.0" encoding="utf-16"?>' + path.read_bytes()]
    seeds.append(path.read_text().encode("utf-16"))
    outcomes = {"read": 0, "refused": 0}

    def check(example):
        seed, mutations = example
        path.write_bytes(mutate(seeds[seed], mutations, reach=1500))
        try:
            annotation = read_voc(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            outcomes["refused"] += 1
        else:
            assert isinstance(annotation, VocAnnotation)
            for obj in annotation.objects:
                x0, y0, x1, y1 = obj.box
                assert 0 <= x0 < x1 and 0 <= y0 < y1
            outcomes["read"] += 1

    run_fuzz(pytestconfig, st.tuples(st.integers(0, len(seeds) - 1), MUTATIONS), check)
    print(outcomes)
    assert outcomes["read"] and outcomes["refused"]


BILLION_LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x0 "ha">'
    + "".join(f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">' for i in range(1, 10))
    + "]><annotation><filename>&x9;</filename></annotation>"
)
EXTERNAL = (
    '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>'
    "<annotation><filename>&x;</filename></annotation>"
)


@pytest.mark.parametrize("content", [BILLION_LAUGHS, EXTERNAL], ids=["bomb", "external"])
def test_entities_are_refused(tmp_path, content):
    path = tmp_path / "a.xml"
    path.write_text(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="defines XML entities"):
            read_voc(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_huge_annotation_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "a.xml"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: takes no room on the disk
    with pytest.raises(ValueError, match="has 1099511627776 bytes, expected at most 8 MiB"):
        read_voc(path)
