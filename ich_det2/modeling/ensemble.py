"""Several trained detectors, and mirrored slices, as one model.

Shape glossary: K results of one slice, D_k boxes of the k-th.
"""

from collections.abc import Sequence

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.ops import box_iou

_EPS = 1e-4


@META_ARCH_REGISTRY.register()
class EnsembleRCNN(nn.Module):
    """Detectors whose answers are fused: a mean of the slice's logits, and :func:`fuse_boxes`.

    It is not trained; ``tools/ensemble.py`` makes it of trained runs. With one member and ``flip``
    it is that detector with test-time augmentation.
    """

    @configurable
    def __init__(
        self,
        *,
        members: Sequence[nn.Module],
        flip: bool = False,
        iou_threshold: float = 0.5,
        detections_per_image: int = 100,
    ):
        """
        Args:
            members: detectors that take the same inputs, one or more.
            flip: each also sees the slice mirrored left to right.
            iou_threshold: in (0, 1), from which on boxes are taken as of the same bleed.
            detections_per_image: fused boxes kept, the highest scored.

        Raises:
            ValueError: if there is no member or the threshold is out of its range.
        """
        super().__init__()
        if not members:
            raise ValueError("MODEL.ENSEMBLE.MEMBERS is [], expected a list of settings for each.")
        if not 0 < iou_threshold < 1:
            raise ValueError(
                f"MODEL.ENSEMBLE.IOU_THRESHOLD is {iou_threshold}, expected above 0, below 1."
            )
        self.members = nn.ModuleList(members)
        self.flip = flip
        self.iou_threshold = iou_threshold
        self.detections_per_image = detections_per_image

    @classmethod
    def from_config(cls, cfg):
        members = []
        for settings in cfg.MODEL.ENSEMBLE.MEMBERS:
            member = cfg.clone()
            member.defrost()
            member.merge_from_list(list(settings))
            if member.MODEL.META_ARCHITECTURE == cfg.MODEL.META_ARCHITECTURE:
                raise ValueError(
                    f"MODEL.ENSEMBLE.MEMBERS names {cls.__name__} again, expected detectors."
                )
            if member.MODEL.MASK_ON:
                raise ValueError(
                    f"{cls.__name__} fuses boxes, not masks; take members of MODEL.MASK_ON False."
                )
            members.append(build_model(member))
        return {
            "members": members,
            "flip": cfg.MODEL.ENSEMBLE.FLIP,
            "iou_threshold": cfg.MODEL.ENSEMBLE.IOU_THRESHOLD,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """
        Args:
            batched_inputs: as of :class:`GeneralizedRCNN`.

        Returns:
            For each slice "instances" with fused boxes, and "image_score": the sigmoid of the mean
            logit of the members' scores.

        Raises:
            RuntimeError: in training mode.
        """
        if self.training:
            raise RuntimeError(f"{type(self).__name__} is made of trained models, not trained.")
        answers = [member(batched_inputs) for member in self.members]
        if self.flip:
            mirrored = [{**x, "image": x["image"].flip(-1)} for x in batched_inputs]
            answers += [[_mirrored(y) for y in member(mirrored)] for member in self.members]
        return [self._fuse(answer) for answer in zip(*answers)]

    def _fuse(self, answers: Sequence[dict]) -> dict:
        found = [y["instances"] for y in answers]
        boxes, scores, classes = fuse_boxes(
            [x.pred_boxes.tensor for x in found],
            [x.scores for x in found],
            [x.pred_classes for x in found],
            iou_threshold=self.iou_threshold,
        )
        keep = slice(self.detections_per_image)  # they come sorted
        fused = Instances(found[0].image_size)
        fused.pred_boxes = Boxes(boxes[keep])
        fused.scores, fused.pred_classes = scores[keep], classes[keep]
        logits = torch.stack([image_score(y).logit(_EPS) for y in answers])
        return {"instances": fused, "image_score": logits.mean().sigmoid()}


def image_score(output: dict) -> torch.Tensor:
    """A slice's score by a detector's output: its own, or that of its highest scored box."""
    if "image_score" in output:
        return output["image_score"].float()
    scores = output["instances"].scores.float()
    return scores.max() if len(scores) else scores.new_zeros(())


def _mirrored(output: dict) -> dict:
    instances = output["instances"]
    boxes, width = instances.pred_boxes.tensor, instances.image_size[1]
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    instances.pred_boxes = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    return output


def fuse_boxes(
    boxes: Sequence[torch.Tensor],
    scores: Sequence[torch.Tensor],
    classes: Sequence[torch.Tensor],
    *,
    iou_threshold: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted box fusion of several results (after Solovyev et al., arXiv:1910.13302).

    Boxes are gathered around the highest scored one that is left: of its class and of each other
    result, the highest scored one that overlaps it by the threshold. A cluster's box is the mean by
    scores; its score is the mean over the K results, 0 where one has none. Unlike there, boxes of
    one result are never fused: it has chosen what it leaves apart, by NMS or by Soft-NMS, and an
    ensemble of one answers as that one.

    Args:
        boxes: K tensors, (D_k, 4), XYXY.
        scores: K tensors, (D_k,), >= 0.
        classes: K tensors, (D_k,).
        iou_threshold: from which on two boxes are of one cluster.

    Returns:
        Boxes, scores and classes of the clusters, by falling score.
    """
    number = len(boxes)
    source = torch.cat([torch.full_like(c, k) for k, c in enumerate(classes)])
    box, score, kind = torch.cat(list(boxes)), torch.cat(list(scores)), torch.cat(list(classes))
    order = score.argsort(descending=True, stable=True)
    box, score, kind, source = box[order], score[order], kind[order], source[order]
    near = (box_iou(box, box) >= iou_threshold) & (kind[:, None] == kind)
    near &= source[:, None] != source
    left = torch.ones(len(box), dtype=torch.bool, device=box.device)
    # The box that each belongs to: the first, as the highest scored, that took it.
    clusters = []
    for i in range(len(box)):
        if not left[i]:
            continue
        beside = (near[i] & left).nonzero().flatten().tolist()
        firsts = {int(source[j]): j for j in reversed(beside)}  # they come by falling score
        taken = [i, *sorted(firsts.values())]
        left[taken] = False
        weights = score[taken]
        total = weights.sum()
        mean = (box[taken] * weights[:, None]).sum(dim=0) / total if total > 0 else box[i]
        clusters.append((mean, total / number, kind[i]))
    if not clusters:
        return box, score, kind
    fused = [torch.stack(values) for values in zip(*clusters)]
    order = fused[1].argsort(descending=True, stable=True)
    return fused[0][order], fused[1][order], fused[2][order]
