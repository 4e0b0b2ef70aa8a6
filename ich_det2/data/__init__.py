"""From DICOM, PNG or JPEG with VOC XML to Detectron2's dataset dicts and model inputs."""

from ..lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".datasets": ["load_ich_voc", "register_ich_datasets", "register_ich_voc"],
        ".mapper": ["IchDatasetMapper"],
    },
)
