"""From DICOM, PNG or JPEG with VOC XML to Detectron2's dataset dicts and model inputs."""

from .datasets import load_ich_voc, register_ich_datasets, register_ich_voc
from .mapper import IchDatasetMapper

__all__ = ["IchDatasetMapper", "load_ich_voc", "register_ich_datasets", "register_ich_voc"]
