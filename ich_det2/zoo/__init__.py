"""Trained models that come with the package, by name: ``zoo://NAME``.

Each is a folder as a training leaves it, with a model card, ``README.md``, that says what it was
trained on, how good it is, and what it is bad at. For research, not for clinical use.
"""

from __future__ import annotations

import os
from pathlib import Path

PREFIX = "zoo://"
DEFAULT = f"{PREFIX}ct-ich"
_ROOT = Path(__file__).parent


def names() -> list[str]:
    """The models that are there."""
    return sorted(path.parent.name for path in _ROOT.glob("*/README.md"))


def model_folder(model: str | os.PathLike) -> Path:
    """Where a model is.

    Args:
        model: ``zoo://NAME``, or OUTPUT_DIR of a training, which is given back.

    Raises:
        ValueError: if no model of that name comes with the package.
    """
    if not (isinstance(model, str) and model.startswith(PREFIX)):
        return Path(model)
    name = model.removeprefix(PREFIX)
    if name not in names():
        known = ", ".join(PREFIX + known for known in names())
        raise ValueError(f"there is no model '{model}'; expected {known}, or a training's folder.")
    return _ROOT / name


def weights(model: str) -> Path:
    """The weights of ``zoo://NAME``.

    Raises:
        ValueError: as :func:`model_folder`.
    """
    return next(model_folder(model).glob("*.pth"))
