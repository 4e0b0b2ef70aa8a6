"""Cost-sensitive Faster R-CNN for intracranial hemorrhage on head CT, as a Detectron2 extension.

``add_ich_config(cfg)`` adds the config keys and registers the parts in Detectron2's registries, as
``import ich_det2.modeling`` does; ``diagnose(paths, model)`` runs a trained model. Nothing of
Detectron2 is patched, and neither it nor PyTorch is imported before one of these is used.
"""

from .lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".config": ["add_ich_config"],
        ".inference.api": ["diagnose"],
        ".inference.results": ["Diagnosis"],
        ".version": ["__version__"],
    },
)
