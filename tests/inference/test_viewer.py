"""The page to look through: the pixels that were read, the boxes, and no way out of the file."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import zlib

import cv2
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from ich_det2.data.dicom import read_hu
from ich_det2.data.masks import decode_mask
from ich_det2.inference.api import diagnose

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def parts(page):
    """The page's data, and its script."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    return json.loads(data[1]), script[1]


def unpack(s):
    steps = np.frombuffer(zlib.decompress(base64.b64decode(s["pixels"]), -15), "<i2")
    return np.cumsum(steps.reshape(s["rows"], s["columns"]), axis=1, dtype=np.int16)


@pytest.fixture
def look(finder, tmp_path):
    def make(folder):
        out = tmp_path / "out"
        diagnosis = diagnose([folder], finder)
        diagnosis.write(out, overlays="none", viewer=True, force=True)
        return diagnosis, out

    return make


def test_what_was_noticed_of_a_patient_stands_on_the_page(look, write_series, tmp_path):
    paths = write_series(bleed_at=2)
    shutil.copy(paths[0], paths[0].with_name("again.dcm"))
    diagnosis, out = look(tmp_path / "exam")
    (patient,) = diagnosis.patients
    assert patient.notes
    for note in patient.notes:
        assert html.escape(note) in (out / "viewer.html").read_text()


def test_the_pixels_are_the_hu_of_the_files_and_the_boxes_those_of_the_diagnosis(
    look, write_series, tmp_path
):
    paths = write_series(bleed_at=2)
    diagnosis, out = look(tmp_path / "exam")
    data, _ = parts((out / "viewer.html").read_text())
    assert data["hu"] and data["first"] == 2 and data["threshold"] == diagnosis.threshold
    for s, found, path in zip(data["slices"], diagnosis.slices, paths, strict=True):
        np.testing.assert_array_equal(unpack(s), np.rint(read_hu(path)))
        assert s["score"] == found.score and s["verdict"] == found.verdict
        assert [b["box"] for b in s["boxes"]] == found.boxes.round(2).tolist()
        assert s["ratio"] == 1


def test_outlines_are_those_of_the_masks(look, finder, write_series, tmp_path, monkeypatch):
    ring = torch.zeros(1, 32, 32, dtype=torch.bool)
    ring[0, 3:12, 2:10] = True
    ring[0, 6:9, 5:7] = False
    forward = type(finder.model).forward

    def with_masks(self, inputs):
        outputs = forward(self, inputs)
        for output in outputs:
            output["instances"].pred_masks = ring
        return outputs

    monkeypatch.setattr(type(finder.model), "forward", with_masks)
    write_series(bleed_at=1)
    diagnosis, out = look(tmp_path / "exam")
    data, _ = parts((out / "viewer.html").read_text())
    for s, found in zip(data["slices"], diagnosis.slices, strict=True):
        for box, mask in zip(s["boxes"], found.masks, strict=True):
            lines = [np.array(points).reshape(-1, 2) for points in box["outlines"]]
            drawn = np.zeros((32, 32), np.uint8)
            cv2.polylines(drawn, lines, True, 1)
            mask = decode_mask(mask)
            # Of the outside its own outermost pixels; of a hole the mask's pixels about it.
            assert len(lines) == 2 and not drawn[~mask].any()
            assert drawn[3, 2:10].all() and drawn[5, 5:7].all()


def test_pixels_that_are_not_square_are_shown_as_they_lie(look, write_series, tmp_path):
    write_series(PixelSpacing=[0.6, 0.5])
    _, out = look(tmp_path / "exam")
    data, _ = parts((out / "viewer.html").read_text())
    assert data["slices"][0]["ratio"] == pytest.approx(1.2)


def test_pictures_are_shown_in_their_own_grey(look, tmp_path):
    (tmp_path / "exam").mkdir()
    grey = np.random.default_rng(0).integers(0, 256, (40, 30)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "exam/a.png")
    _, out = look(tmp_path / "exam")
    data, _ = parts((out / "viewer.html").read_text())
    np.testing.assert_array_equal(unpack(data["slices"][0]), grey)
    assert not data["hu"] and data["window"] == [127.5, 255]


def test_no_address_and_no_identity_is_in_the_page_and_its_script_is_the_only_one(
    look, write_series, tmp_path
):
    write_series(bleed_at=0, PatientID="PID4711", PatientName="ZWICKY^JANUSZ")
    _, out = look(tmp_path / "exam")
    page = (out / "viewer.html").read_text()
    _, script = parts(page)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    policy = html.unescape(policy)
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy
    assert not re.findall(r"https?:|//\w+\.|<link(?! rel=\"icon\" href=\"data:,\")|src=", page)
    for secret in ("PID4711", "ZWICKY", "JANUSZ", "1.2.1", str(tmp_path)):
        assert secret not in page


def test_names_cannot_end_the_data(finder, write_series, tmp_path):
    write_series(bleed_at=1)
    finder.classes = ("</script><script>alert(1)</script>",)
    diagnose([tmp_path / "exam"], finder).write(tmp_path / "out", overlays="none", viewer=True)
    page = (tmp_path / "out/viewer.html").read_text()
    assert page.count("<script") == 2
    data, _ = parts(page)
    assert data["slices"][1]["boxes"][0]["class"] == finder.classes[0]


def test_each_of_several_patients_has_a_page(look, write_series, tmp_path):
    write_series("exams/a")
    write_series("exams/b", PatientID="P2", StudyInstanceUID="1.3", SeriesInstanceUID="1.3.1")
    _, out = look(tmp_path / "exams")
    names = sorted(p.name for p in (out / "viewers").iterdir())
    assert names == ["patient-001.html", "patient-002.html"]
    assert not (out / "viewer.html").exists()
    data, _ = parts((out / "viewers/patient-002.html").read_text())
    assert len(data["slices"]) == 4


def test_a_patient_without_a_readable_slice_has_no_page(look, write_series, tmp_path):
    write_series("exams/a")
    for path in write_series("exams/b", PatientID="P2", StudyInstanceUID="1.3"):
        ds = pydicom.dcmread(path)
        ds.PixelData = ds.PixelData[:100]
        ds.save_as(path)
    diagnosis, out = look(tmp_path / "exams")
    assert len(diagnosis.patients) == 2
    assert [p.name for p in (out / "viewers").iterdir()] == ["patient-001.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_it(look, write_series, tmp_path):
    write_series(bleed_at=2)
    diagnosis, out = look(tmp_path / "exam")
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    argv += ["--no-first-run", "--disable-background-networking", "--dump-dom"]
    argv += [f"--user-data-dir={tmp_path / 'profile'}", (out / "viewer.html").as_uri()]
    page = subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout
    assert f"score {diagnosis.slices[2].score:.3f}  {diagnosis.slices[2].verdict}" in page
    assert "slice 2  (3 of 4)" in page and "window 40 / 80 HU" in page
