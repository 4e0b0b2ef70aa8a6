"""Cost-sensitive classification loss (pure functions).

Shape glossary: M is the number of sampled anchors.
"""

import torch
import torch.nn.functional as F


def cost_sensitive_bce(
    logits: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    reduction: str = "none",
    *,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Binary cross entropy that weighs positives by ``alpha``: eq. (4)-(7) of the paper.

    ``-log(1 - p)`` for a negative and ``-alpha * log(p)`` for a positive, ``p = sigmoid(logit)``.
    The paper writes ``lg``; another base is a constant factor of the loss, the natural logarithm
    is used here. With ``alpha == 1`` it equals
    :func:`torch.nn.functional.binary_cross_entropy_with_logits` to the last bit.

    Args:
        logits: predicted objectness, sized (M,) or any shape.
        labels: 1 for positive and 0 for negative, same shape, any dtype.
        alpha: cost of a missed positive relative to a false alarm, > 0.
        reduction: "none", "sum", or "mean" (over all elements, not over weights).
        weight: factor of each element's loss besides its cost, same shape; None is 1.

    Raises:
        ValueError: if alpha is not a positive finite number.
    """
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a positive finite number, got {alpha}.")
    cost = positive_weight(labels, alpha)
    if weight is not None:
        cost = cost * weight
    return F.binary_cross_entropy_with_logits(
        logits, labels.to(logits.dtype), weight=cost.to(logits.dtype), reduction=reduction
    )


def positive_weight(labels: torch.Tensor, alpha: float) -> torch.Tensor:
    """Weight of each label, float32: ``alpha`` where it is 1, else 1."""
    return torch.where(labels == 1, float(alpha), 1.0)
