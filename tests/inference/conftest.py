"""Exams on disk, and a model that finds what is drawn into them."""

import numpy as np
import pydicom
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from ich_det2.data import IchDatasetMapper
from ich_det2.inference.diagnoser import Diagnoser


class Finder(torch.nn.Module):
    """A detector that scores the share of pixels of 65 to 75 HU, in the window 0 to 100 HU."""

    def forward(self, inputs):
        outputs = []
        for x in inputs:
            blood = (x["image"][0] > 160) & (x["image"][0] < 195)
            instances = Instances((x["height"], x["width"]))
            instances.pred_boxes = Boxes(torch.tensor([[2.0, 3.0, 10.0, 12.0]]))
            instances.scores = blood.float().mean()[None].mul(4).clamp(0, 1)
            instances.pred_classes = torch.zeros(1).long()
            outputs.append({"instances": instances})
        return outputs


@pytest.fixture
def finder():
    mapper = IchDatasetMapper(False, augmentations=[], windows=[[50, 100]])
    return Diagnoser(Finder(), mapper, batch_size=2)


@pytest.fixture
def write_series(tmp_path, write_ct):
    """Function that writes a series of slices of brain, with a bleed on one of them if wanted."""

    def write(folder="exam", z=(0, 5, 10, 15), bleed_at=None, normal=2, **attributes):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        paths = []
        for i, height in enumerate(z):
            hu = np.random.default_rng(i).integers(25, 35, (32, 32))
            if i == bleed_at:
                hu[8:24, 8:24] = 70
            position = [0.0, 0.0, 0.0]
            position[normal] = float(height)
            own = {
                "PatientID": "P1",
                "StudyInstanceUID": "1.2.1",
                "SeriesInstanceUID": "1.2.1.1",
                "ImagePositionPatient": position,
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PixelSpacing": [0.5, 0.5],
                "SliceThickness": 5,
                "WindowCenter": 40,
                "WindowWidth": 80,
                **attributes,
            }
            own = {k: v for k, v in own.items() if v is not None}
            paths.append(write_ct(tmp_path / folder / f"IM{i + 1}.dcm", hu, **own))
        return paths

    return write


@pytest.fixture
def write_raw():
    """Function that writes a text into an element as it is, whatever its VR allows."""

    def write(path, keyword, text):
        ds = pydicom.dcmread(path)
        tag = Tag(tag_for_keyword(keyword))
        value = text.encode() + b" " * (len(text) % 2)
        ds._dict[tag] = RawDataElement(
            tag, dictionary_VR(tag)[:2], len(value), value, 0, False, True
        )
        ds.save_as(path, enforce_file_format=True)

    return write
