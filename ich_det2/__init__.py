"""Cost-sensitive Faster R-CNN for intracranial hemorrhage on head CT, as a Detectron2 extension.

``import ich_det2`` registers its parts in Detectron2's registries; ``add_ich_config(cfg)`` adds
its config keys. Nothing of Detectron2 is patched.
"""

import importlib.util

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "ich_det2 extends Detectron2, which is not installed in this environment: run `make setup`"
        " in a clone of ich_det2, or install Detectron2 as the README's section Installation says."
    )

from . import modeling as _  # noqa: F401  only registration
from .config import add_ich_config
from .version import __version__

__all__ = ["__version__", "add_ich_config"]
