"""Which anchors of an image enter the RPN loss: the positive:negative ratio k and its samplers.

Shape glossary: A is the number of anchors of an image over all levels, M the number of them that
are sampled. Labels are 1 positive, 0 negative, -1 ignored.
"""

import math
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.layers import nms
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import nn

ANCHOR_SAMPLER_REGISTRY = Registry("ANCHOR_SAMPLER")
ANCHOR_SAMPLER_REGISTRY.__doc__ = """
Registry of anchor samplers. The object is called as ``obj(cfg)`` and must be an
:class:`AnchorSampler`.
"""

SHORTFALLS = ("fill", "shrink", "repeat")


def build_anchor_sampler(cfg) -> "AnchorSampler":
    """Builds the sampler named by ``cfg.MODEL.RPN.SAMPLER.NAME``.

    Raises:
        ValueError: if no sampler of that name is registered.
    """
    name = cfg.MODEL.RPN.SAMPLER.NAME
    if name not in ANCHOR_SAMPLER_REGISTRY:
        known = sorted(name for name, _ in ANCHOR_SAMPLER_REGISTRY)
        raise ValueError(
            f"MODEL.RPN.SAMPLER.NAME is '{name}', but the registered anchor samplers are {known}."
        )
    return ANCHOR_SAMPLER_REGISTRY.get(name)(cfg)


def split_counts(ratio: float, num_samples: int) -> tuple[int, int]:
    """Numbers of positives and negatives for a ratio k: eq. (1), (2) of the paper.

    ``N_pos = k / (1 + k) * N`` rounded down, as Detectron2 does with ``POSITIVE_FRACTION``, and
    ``N_neg = N - N_pos``.

    Args:
        ratio: k, positives to negatives, >= 0.
        num_samples: N, anchors per image, >= 0.

    Raises:
        ValueError: if ratio is negative or not finite, or num_samples is negative.
    """
    if not 0 <= ratio < math.inf:
        raise ValueError(f"ratio must be a finite number >= 0, got {ratio}.")
    if num_samples < 0:
        raise ValueError(f"num_samples must be >= 0, got {num_samples}.")
    # A hair more, so that rounding of k does not floor a whole number one too low.
    num_pos = math.floor(ratio * num_samples / (1 + ratio) + 1e-9)
    return num_pos, num_samples - num_pos


def next_ratio(
    probs: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_samples: int,
    max_ratio: float,
    pos_weight: float = 1.0,
) -> torch.Tensor:
    """The ratio k after an image: eq. (3) of the paper.

    ``k = 1 + (R - 1) / N * sum_j p*_j (p*_j - p_j)`` over the image's sampled anchors: 1 when all
    positives are scored 1, towards R when positives are missed.

    Args:
        probs: predicted objectness p in [0, 1] of the sampled anchors, sized (M,).
        labels: p*, 1 or 0, sized (M,).
        num_samples: N, > 0. The sum of the anchors' weights if positives are repeated.
        max_ratio: R, >= 1.
        pos_weight: how many times each positive counts ("repeat").

    Returns:
        A scalar tensor of float64 in [1, R].

    Raises:
        ValueError: if num_samples or max_ratio is out of its range.
    """
    if num_samples <= 0:
        raise ValueError(f"num_samples must be > 0, got {num_samples}.")
    if not 1 <= max_ratio < math.inf:
        raise ValueError(f"max_ratio (R) must be a finite number >= 1, got {max_ratio}.")
    labels = labels.double()
    missed = pos_weight * (labels * (labels - probs.double())).sum()
    return (1 + (max_ratio - 1) / num_samples * missed).clamp(1, max_ratio)


def screen_by_nms(
    labels: torch.Tensor,
    logits: torch.Tensor,
    boxes: torch.Tensor,
    nms_thresh: float,
    *,
    topk: int,
) -> torch.Tensor:
    """Ignores candidates that overlap a higher scored candidate of the same label.

    Positives and negatives are screened apart, so that no negative removes a positive. As for
    Detectron2's proposals, only the highest scored of each label go into the NMS, whose time
    grows with their square; the others are ignored too. So beside near copies it leaves out
    negatives that are easy.

    Args:
        labels: of the matcher, 1, 0 or -1, sized (A,).
        logits: predicted objectness, sized (A,).
        boxes: the anchors, XYXY, sized (A, 4).
        nms_thresh: IoU above which the lower scored candidate is ignored.
        topk: candidates of each label that are screened, > 0.

    Returns:
        New labels sized (A,), some of them turned to -1.
    """
    screened = torch.full_like(labels, -1)
    # Not batched_nms: it keeps labels apart by an offset of the largest coordinate, which is too
    # small where boxes reach below 0, as anchors at the border do.
    for value in (0, 1):
        candidates = (labels == value).nonzero().squeeze(1)
        if len(candidates) > topk:
            candidates = candidates[logits[candidates].topk(topk).indices]
        keep = nms(boxes[candidates].float(), logits[candidates].float(), nms_thresh)
        screened[candidates[keep]] = value
    return screened


class SampledAnchors(NamedTuple):
    """The sampled anchors of one image."""

    labels: torch.Tensor  # (A,): 1, 0, or -1 where not sampled
    pos_weight: float  # how many times each positive counts; 1 but with "repeat"
    num_pos: int
    num_neg: int


class AnchorSampler(nn.Module):
    """Draws positives and negatives at the ratio ``self.ratio``.

    A subclass may override :meth:`update` to change the ratio after each batch.
    """

    def __init__(self, *, num_samples: int, ratio: float = 1.0, shortfall: str = "fill"):
        """
        Args:
            num_samples: N, anchors sampled per image.
            ratio: k, positives to negatives.
            shortfall: what happens if an image has fewer than N_pos positives. "fill": negatives
                fill up to N. "shrink": only as many negatives as keep the ratio. "repeat": N_neg
                negatives, and each positive weighs N_pos / (number of positives). An image
                without positives has no ratio: N ("fill") or N_neg negatives.

        Raises:
            ValueError: if an argument is out of its range.
        """
        super().__init__()
        if shortfall not in SHORTFALLS:
            raise ValueError(
                f"MODEL.RPN.SAMPLER.SHORTFALL is '{shortfall}', expected one of {SHORTFALLS}."
            )
        split_counts(ratio, num_samples)  # checks both
        self.num_samples = num_samples
        self.shortfall = shortfall
        # A buffer of float64: saved, resumed and broadcast exactly.
        self.register_buffer("_ratio", torch.tensor(float(ratio), dtype=torch.float64))

    @property
    def ratio(self) -> float:
        """k, the ratio of positives to negatives that is aimed at."""
        return self._ratio.item()

    @torch.no_grad()
    def sample(self, labels: torch.Tensor, ratio: float) -> SampledAnchors:
        """Samples one image's anchors at a ratio.

        Draws random numbers in the same order as
        :func:`detectron2.modeling.sampling.subsample_labels`.

        Args:
            labels: of the matcher, 1, 0 or -1, sized (A,).
            ratio: k, positives to negatives, that is aimed at.
        """
        positive = (labels == 1).nonzero().squeeze(1)
        negative = (labels == 0).nonzero().squeeze(1)
        want_pos, want_neg = split_counts(ratio, self.num_samples)
        num_pos = min(len(positive), want_pos)
        pos_weight = 1.0
        if self.shortfall == "fill":
            want_neg = self.num_samples - num_pos
        elif 0 < num_pos < want_pos:
            if self.shortfall == "shrink":
                want_neg = max(1, round(num_pos / ratio))
            else:
                pos_weight = want_pos / num_pos
        num_neg = min(len(negative), want_neg)
        sampled = torch.full_like(labels, -1)
        sampled[positive[torch.randperm(len(positive), device=labels.device)[:num_pos]]] = 1
        sampled[negative[torch.randperm(len(negative), device=labels.device)[:num_neg]]] = 0
        return SampledAnchors(sampled, pos_weight, num_pos, num_neg)

    def update(self, probs: list[torch.Tensor], samples: list[SampledAnchors]) -> None:
        """Learns from a batch after sampling; here it does nothing.

        Args:
            probs: predicted objectness in [0, 1] of each image's anchors, sized (A,).
            samples: what :meth:`sample` returned for each image.
        """


@ANCHOR_SAMPLER_REGISTRY.register()
class FixedRatioSampler(AnchorSampler):
    """Samples at the constant ratio that ``MODEL.RPN.POSITIVE_FRACTION`` says."""

    @configurable
    def __init__(self, *, num_samples: int, positive_fraction: float, shortfall: str = "fill"):
        """
        Args:
            num_samples: N, anchors sampled per image.
            positive_fraction: share of positives, in [0, 1).
            shortfall: see :class:`AnchorSampler`.

        Raises:
            ValueError: if an argument is out of its range.
        """
        if not 0 <= positive_fraction < 1:
            raise ValueError(
                f"MODEL.RPN.POSITIVE_FRACTION must be in [0, 1), got {positive_fraction}."
            )
        super().__init__(
            num_samples=num_samples,
            ratio=positive_fraction / (1 - positive_fraction),
            shortfall=shortfall,
        )

    @classmethod
    def from_config(cls, cfg):
        return {
            "num_samples": cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": cfg.MODEL.RPN.POSITIVE_FRACTION,
            "shortfall": cfg.MODEL.RPN.SAMPLER.SHORTFALL,
        }


@ANCHOR_SAMPLER_REGISTRY.register()
class AdaptiveRatioSampler(AnchorSampler):
    """Samples at a ratio k in [1, R] that rises when positives are scored badly.

    k starts at 1 and follows eq. (3) of the paper. It is the mean over the images of a batch, of
    all processes, that have positives; a batch without any leaves k as it is.
    """

    @configurable
    def __init__(self, *, num_samples: int, max_ratio: float, shortfall: str = "fill"):
        """
        Args:
            num_samples: N, anchors sampled per image.
            max_ratio: R, the upper bound of k, >= 1.
            shortfall: see :class:`AnchorSampler`.

        Raises:
            ValueError: if an argument is out of its range.
        """
        super().__init__(num_samples=num_samples, shortfall=shortfall)
        if not 1 <= max_ratio < math.inf:
            raise ValueError(
                f"MODEL.RPN.SAMPLER.MAX_RATIO must be a finite number >= 1, got {max_ratio}."
            )
        self.max_ratio = float(max_ratio)

    @classmethod
    def from_config(cls, cfg):
        return {
            "num_samples": cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
            "max_ratio": cfg.MODEL.RPN.SAMPLER.MAX_RATIO,
            "shortfall": cfg.MODEL.RPN.SAMPLER.SHORTFALL,
        }

    @torch.no_grad()
    def update(self, probs: list[torch.Tensor], samples: list[SampledAnchors]) -> None:
        # Sum of the images' next ratios and their number; summed over processes, so that ranks
        # with few or no positives weigh as much as their images do.
        total = torch.zeros(2, dtype=torch.float64, device=self._ratio.device)
        for prob, sample in zip(probs, samples):
            if sample.num_pos == 0:
                continue
            mask = sample.labels >= 0
            k = next_ratio(
                prob[mask],
                sample.labels[mask],
                num_samples=round(sample.num_pos * sample.pos_weight) + sample.num_neg,
                max_ratio=self.max_ratio,
                pos_weight=sample.pos_weight,
            )
            total += torch.stack([k, torch.ones_like(k)])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(total)
        if total[1] > 0:
            self._ratio.copy_(total[0] / total[1])
