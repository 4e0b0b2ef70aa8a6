"""A detector that also scores the whole slice, and learns from slices whose boxes are missing.

Shape glossary: N slices of a batch, C channels, H and W the height and width of a feature map.
"""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F

_EPS = 1e-4


class ImageHead(nn.Module):
    """From a feature map to the logit that the slice has hemorrhage.

    The map is pooled by its mean and by its maximum: a bleed may be all over the slice or in one
    cell.
    """

    def __init__(self, input_shape: ShapeSpec, *, conv_dim: int = 128, dropout: float = 0.0):
        """
        Args:
            input_shape: of the map.
            conv_dim: channels of the layer before the pooling.
            dropout: share of the pooled values that are left out in training, in [0, 1).
        """
        super().__init__()
        self.conv = nn.Conv2d(input_shape.channels, conv_dim, 1, bias=False)
        self.norm = nn.GroupNorm(32 if conv_dim % 32 == 0 else 1, conv_dim)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * conv_dim, 1)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: (N, C, H, W).

        Returns:
            Logits, (N,).
        """
        x = F.relu(self.norm(self.conv(features)))
        x = torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        return self.fc(self.dropout(x)).squeeze(1)


@META_ARCH_REGISTRY.register()
class DiagnosisRCNN(GeneralizedRCNN):
    """:class:`GeneralizedRCNN` with an :class:`ImageHead`, trained by mixed supervision.

    The image head learns from every slice's "image_label". RPN and ROI heads, of any kind, learn
    from the slices whose boxes are known: one that bleeds and has no box is no background.
    """

    @configurable
    def __init__(
        self,
        *,
        image_head: ImageHead,
        image_head_feature: str,
        pos_weight: float = 1.0,
        loss_weight: float = 1.0,
        score_weight: float = 0.5,
        box_weight: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            image_head: scores the slice.
            image_head_feature: name of the backbone's map that it takes.
            pos_weight: weight of a slice with hemorrhage in the image head's loss, > 0.
            loss_weight: weight of the image head's loss among the others, >= 0.
            score_weight: w in [0, 1]; the slice's score is the sigmoid of w times the image head's
                logit and 1 - w times that of the highest scored box.
            box_weight: v in [0, 1]; a box's score is its own to the power of 1 - v, times the image
                head's to the power of v.
            kwargs: arguments of :class:`GeneralizedRCNN`.

        Raises:
            ValueError: if a weight is out of its range.
        """
        super().__init__(**kwargs)
        for key, value in (("SCORE_WEIGHT", score_weight), ("BOX_WEIGHT", box_weight)):
            if not 0 <= value <= 1:
                raise ValueError(f"MODEL.IMAGE_HEAD.{key} is {value}, expected 0 to 1.")
        if not pos_weight > 0 or not loss_weight >= 0:
            raise ValueError(
                f"MODEL.IMAGE_HEAD.POS_WEIGHT is {pos_weight} and LOSS_WEIGHT {loss_weight},"
                " expected a number above 0, and one of at least 0."
            )
        self.image_head = image_head
        self.image_head_feature = image_head_feature
        self.register_buffer("pos_weight", torch.tensor(float(pos_weight)), persistent=False)
        self.image_loss_weight = loss_weight
        self.score_weight, self.box_weight = score_weight, box_weight

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        head, shapes = cfg.MODEL.IMAGE_HEAD, ret["backbone"].output_shape()
        feature = head.IN_FEATURE or max(shapes, key=lambda name: shapes[name].stride)
        if feature not in shapes:
            raise ValueError(
                f"MODEL.IMAGE_HEAD.IN_FEATURE is '{feature}', but the backbone has"
                f" {sorted(shapes)}."
            )
        return {
            **ret,
            "image_head": ImageHead(shapes[feature], conv_dim=head.CONV_DIM, dropout=head.DROPOUT),
            "image_head_feature": feature,
            "pos_weight": head.POS_WEIGHT,
            "loss_weight": head.LOSS_WEIGHT,
            "score_weight": head.SCORE_WEIGHT,
            "box_weight": head.BOX_WEIGHT,
        }

    def forward(self, batched_inputs: list[dict]) -> dict | list[dict]:
        """
        Args:
            batched_inputs: as of :class:`GeneralizedRCNN`; in training with "image_label", 0 or 1,
                without which a slice is taken to bleed if it has a box.

        Returns:
            In training its losses and "loss_image"; else its outputs with "image_score", a tensor
            without dimensions.
        """
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        gt = [x["instances"].to(self.device) for x in batched_inputs]
        known = [i for i, x in enumerate(batched_inputs) if has_known_boxes(x)]
        # Without any, every layer still takes part: all processes wait for each one's gradient.
        of_boxes = known or list(range(len(gt)))
        some_images, some_features = images, features
        if len(of_boxes) < len(gt):
            some_images = ImageList(
                images.tensor[of_boxes], [images.image_sizes[i] for i in of_boxes]
            )
            some_features = {name: x[of_boxes] for name, x in features.items()}
        some_gt = [gt[i] for i in of_boxes]
        proposals, losses = self.proposal_generator(some_images, some_features, some_gt)
        _, roi_losses = self.roi_heads(some_images, some_features, proposals, some_gt)
        losses = {**roi_losses, **losses}
        if not known:
            losses = {name: 0 * loss for name, loss in losses.items()}
        elif self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training([batched_inputs[i] for i in of_boxes], proposals)
        logits = self.image_head(features[self.image_head_feature])
        labels = logits.new_tensor([float(image_label(x)) for x in batched_inputs])
        loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.pos_weight)
        return {**losses, "loss_image": self.image_loss_weight * loss}

    def inference(self, batched_inputs, detected_instances=None, do_postprocess=True):
        """As :meth:`GeneralizedRCNN.inference`, with "image_score" beside "instances"."""
        if detected_instances is not None or not do_postprocess:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals, _ = self.proposal_generator(images, features, None)
        found, _ = self.roi_heads(images, features, proposals, None)
        outputs = self._postprocess(found, batched_inputs, images.image_sizes)
        logits = self.image_head(features[self.image_head_feature]).float()
        for output, logit in zip(outputs, logits):
            instances, w, v = output["instances"], self.score_weight, self.box_weight
            scores = instances.scores.float()
            top = F.pad(scores, (0, 1)).max()  # 0 without boxes
            output["image_score"] = (w * logit + (1 - w) * top.logit(_EPS)).sigmoid()
            if v > 0:
                instances.scores = scores ** (1 - v) * logit.sigmoid() ** v
        return outputs


def has_known_boxes(dataset_dict: dict) -> bool:
    """Whether a slice's boxes are all there, so that the rest of it is background.

    Args:
        dataset_dict: mapped, with "instances".
    """
    return len(dataset_dict["instances"]) > 0 or not image_label(dataset_dict)


def image_label(dataset_dict: dict) -> bool:
    """Whether a slice has hemorrhage, with boxes or without.

    Args:
        dataset_dict: mapped, with "instances".
    """
    return bool(dataset_dict.get("image_label", len(dataset_dict["instances"]) > 0))
