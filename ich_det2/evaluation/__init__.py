"""From boxes to a diagnosis, and how good it is."""

from ..lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".diagnosis": ["confusion_at_thresholds", "diagnose", "roc_auc_score", "summarize"],
        ".evaluator": ["DiagnosisEvaluator"],
    },
)
