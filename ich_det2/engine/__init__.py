"""Training: trainer, checkpoints, hooks, and the checks before a run."""

from ..lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".checkpoint": ["IchCheckpointer"],
        ".hooks": ["BestCheckpointer", "DiagnosisHook"],
        ".trainer": ["IchTrainer"],
    },
)
