"""Training: trainer, checkpoints, hooks, and the checks before a run."""

from .checkpoint import IchCheckpointer
from .hooks import BestCheckpointer, DiagnosisHook
from .trainer import IchTrainer

__all__ = ["BestCheckpointer", "DiagnosisHook", "IchCheckpointer", "IchTrainer"]
