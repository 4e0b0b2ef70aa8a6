"""The cache of decoded slices: used, checked against its source, shared, repaired."""

import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless, generate_uid

from ich_det2.data.cache import SliceCache
from ich_det2.data.dicom import pixels, read_hu


@pytest.fixture
def compressed(tmp_path, write_ct):
    """Factory of a JPEG 2000 slice, with the HU that it holds."""

    def make(seed=0, name="a.dcm", **attributes):
        hu = np.random.default_rng(seed).integers(-1024, 2000, (64, 64))
        path = write_ct(tmp_path / name, hu, **attributes)
        ds = pydicom.dcmread(path)
        ds.compress(JPEG2000Lossless, generate_instance_uid=False)
        ds.save_as(path)
        return path, hu

    return make


@pytest.fixture
def decodings(monkeypatch):
    """The files that were decoded."""
    calls, decode = [], pixels._decode

    def spy(path, header):
        calls.append(path)
        return decode(path, header)

    monkeypatch.setattr(pixels, "_decode", spy)
    return calls


def read(path, cache):
    return read_hu(path, cache=cache)


def test_a_slice_is_decoded_once(tmp_path, compressed, decodings):
    path, hu = compressed()
    cache = SliceCache(tmp_path / "cache")
    for _ in range(3):
        found = read(path, cache)
        assert found.dtype == np.float32 and np.array_equal(found, hu)
        found += 1  # belongs to the caller
    assert len(decodings) == 1
    (file,) = (tmp_path / "cache").rglob("*.npy")
    assert np.load(file).dtype == np.int16


def test_uncompressed_slices_are_not_kept(tmp_path, write_ct):
    path = write_ct(tmp_path / "a.dcm", np.zeros((8, 8)))
    read(path, SliceCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_fractional_hu_stay_exact(tmp_path, compressed):
    path, _ = compressed(RescaleSlope="0.37")
    cache = SliceCache(tmp_path / "cache")
    first = read(path, cache)
    assert np.array_equal(read(path, cache), first) and np.array_equal(read_hu(path), first)
    assert first[0, 0] != round(float(first[0, 0]))


@pytest.mark.parametrize("what", ["time", "uid", "content"])
def test_a_changed_source_is_decoded_anew(tmp_path, compressed, decodings, what):
    path, hu = compressed(SOPInstanceUID="1.2.3")
    cache = SliceCache(tmp_path / "cache")
    read(path, cache)
    before = path.stat()
    if what == "time":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif what == "uid":  # same size and time, another image
        ds = pydicom.dcmread(path)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.4"
        ds.save_as(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    else:
        path, hu = compressed(seed=1, SOPInstanceUID=generate_uid())
    assert np.array_equal(read(path, cache), hu)
    assert len(decodings) == 2


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_is_replaced(tmp_path, compressed, decodings, damage):
    path, hu = compressed()
    cache = SliceCache(tmp_path / "cache")
    read(path, cache)
    (file,) = (tmp_path / "cache").rglob("*.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] if damage is None else damage)
    assert np.array_equal(read(path, cache), hu)
    assert file.read_bytes() == whole and len(decodings) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, compressed, caplog):
    path, hu = compressed()
    (tmp_path / "file").touch()
    cache = SliceCache(tmp_path / "file" / "cache")
    for _ in range(2):
        assert np.array_equal(read(path, cache), hu)
    assert caplog.text.count("INPUT.CACHE_DIR") == 1


def read_all(job):
    """Sum of each slice, read in an order of this worker's own."""
    seed, folder, paths = job
    cache, sums = SliceCache(folder), {}
    for i in np.random.default_rng(seed).permutation(len(paths) * 5):
        path = paths[i % len(paths)]
        sums[path] = float(read(path, cache).sum())
    return sums


def test_workers_share_a_folder(tmp_path, compressed):
    made = [compressed(i, f"{i}.dcm") for i in range(6)]
    paths, expected = [p for p, _ in made], {p: float(hu.sum()) for p, hu in made}
    jobs = [(seed, tmp_path / "cache", paths) for seed in range(4)]
    with ProcessPoolExecutor(4) as pool:
        assert all(sums == expected for sums in pool.map(read_all, jobs))
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(files) == 6 and {p.suffix for p in files} == {".npy"}
