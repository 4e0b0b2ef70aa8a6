"""From boxes to a diagnosis, and how good it is."""

from .diagnosis import confusion_at_thresholds, diagnose, roc_auc_score, summarize
from .evaluator import DiagnosisEvaluator

__all__ = [
    "DiagnosisEvaluator",
    "confusion_at_thresholds",
    "diagnose",
    "roc_auc_score",
    "summarize",
]
