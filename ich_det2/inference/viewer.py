"""A page to look through a patient's slices with what was found on them, in any browser.

It is one file that asks nothing of any address: pixels, boxes, masks and script are in the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from pathlib import Path

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..data.dicom import pixel_ratio, read_hu, read_spacing
from ..data.inspection import WINDOW
from ..data.masks import decode_mask
from ..data.pictures import is_picture, read_picture
from ..files import write_atomically
from .results import Diagnosis, PatientDiagnosis, Progress, SliceDiagnosis

WINDOWS = (("brain", 40, 80), ("subdural", 75, 215), ("bone", 600, 2800))
"""Name, level and width in HU."""

_GREY = (("grey", 127.5, 255),)
"""Of pictures, which are windowed already."""


def write_viewers(diagnosis: Diagnosis, folder: Path, progress: Progress) -> None:
    """``viewer.html`` of the one patient, or ``viewers/<patient>.html`` of each of several."""
    patients = [p for p in diagnosis.patients if p.n_slices]
    pages = {patients[0].patient: folder / "viewer.html"}
    if len(diagnosis.patients) > 1:
        (folder / "viewers").mkdir()
        pages = {p.patient: folder / "viewers" / f"{p.patient}.html" for p in patients}
    for patient in patients:
        slices = [s for s in diagnosis.slices if s.patient == patient.patient]
        page = build_viewer(diagnosis, patient, slices, progress)
        with write_atomically(pages[patient.patient]) as file:
            file.write(page)


def build_viewer(
    diagnosis: Diagnosis,
    patient: PatientDiagnosis,
    slices: list[SliceDiagnosis],
    progress: Progress,
) -> str:
    """The page of a patient, which begins at the slice of the highest score.

    Args:
        diagnosis: that the patient is of.
        patient: whose page it is.
        slices: the patient's, at least one.
        progress: shows how far the reading is.
    """
    hu = not all(is_picture(s.source.path) for s in slices)
    windows = WINDOWS if hu else _GREY
    rows = [_pack(s, hu) for s in progress(slices, "packing", len(slices))]
    data = {
        "slices": rows,
        "first": max(range(len(slices)), key=lambda i: slices[i].score),
        "window": windows[0][1:],
        "hu": hu,
        "classes": len({name for s in slices for name in s.classes}),
        "step": 0.5,
        "threshold": diagnosis.threshold,
    }
    here = Path(__file__).parent
    script = (here / "viewer.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Nothing in the data can end its element.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = environment.get_template("viewer.html.jinja")
    return page.render(
        study=patient,
        threshold=diagnosis.threshold,
        notice=diagnosis.notice,
        windows=windows,
        data=_Verbatim(text),
        script=_Verbatim(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


class _Verbatim(str):
    """Is not escaped by a template."""

    def __html__(self) -> str:
        return self


def _pack(s: SliceDiagnosis, hu: bool) -> dict:
    """A slice for the page's script: pixels as differences along the rows, deflated, in base64."""
    source = s.source
    if is_picture(source.path):
        values, ratio = read_picture(source.path).astype(float), 1.0
        if hu:  # beside slices in HU
            level, width = WINDOW
            values = level - width / 2 + values * (width / 255)
    else:
        values = read_hu(source.path, source.frame)
        ratio = pixel_ratio(read_spacing(source.path))
    whole = np.rint(np.nan_to_num(values)).clip(-2048, 30000).astype("<i2")
    steps = np.diff(whole, axis=1, prepend=np.zeros((len(whole), 1), "<i2"))
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    packed = packer.compress(steps.astype("<i2").tobytes()) + packer.flush()
    boxes = [
        {"box": [round(float(v), 2) for v in box], "score": float(score), "class": name}
        for box, score, name in zip(s.boxes, s.scores, s.classes, strict=True)
    ]
    for row, mask in zip(boxes, s.masks or ()):
        row["outlines"] = _outlines(decode_mask(mask))
    return {
        "series": s.series,
        "index": s.index,
        "score": s.score,
        "verdict": s.verdict,
        "rows": whole.shape[0],
        "columns": whole.shape[1],
        "ratio": ratio,
        "boxes": boxes,
        "pixels": base64.b64encode(packed).decode(),
    }


def _outlines(mask: np.ndarray) -> list[list[int]]:
    """The outlines of a mask, bool (H, W), and of its holes: column and row of the outermost pixels
    by turns, without those on the line between two others."""
    kind = cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    contours, _ = cv2.findContours(mask.astype(np.uint8), *kind)
    return [contour.ravel().tolist() for contour in contours]
