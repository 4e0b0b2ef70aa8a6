"""Segmentation of slices as nnU-Net does it, as a Detectron2 meta-architecture.

Shape glossary: N slices of a batch, C channels, K types of bleeds, S stages of the network, D its
deeper outputs in training; in pixels of the input Hi and Wi the size of slice i, H and W that of
the batch.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torch.nn import functional as F

from .components import find_components, slice_score
from .diagnosis_rcnn import image_label


class Plan(NamedTuple):
    """The stages of a U-Net, from the input on.

    Attributes:
        kernels: of S stages the sizes of their convolutions along each axis.
        strides: of S stages the steps along each axis by which they begin; the first keeps 1.
        filters: channels of S stages.
    """

    kernels: list[list[int]]
    strides: list[list[int]]
    filters: list[int]


def plan_network(
    size: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    base_filters: int = 32,
    max_filters: int = 512,
    min_size: int = 4,
) -> Plan:
    """Plans the stages of a U-Net from an image's size and spacing, by nnU-Net's rules.

    nnU-Net is Isensee et al. 2021 (doi 10.1038/s41592-020-01008-z). A stage halves each axis that
    is of at least twice ``min_size`` then and whose spacing is less than twice the finest of these;
    a single axis that is left is halved from three times ``min_size`` on. A convolution is 3 wide
    along an axis as soon as its spacing is less than twice the finest of all, before that 1; at the
    bottom it is 3. The first stage has ``base_filters``, each further one twice as many as that
    before it, up to ``max_filters``. nnU-Net's own numbers for images of two axes are the defaults.

    Args:
        size: of the image along each axis, pixels.
        spacing_mm: along each axis; only their proportions count.
        base_filters, max_filters: channels.
        min_size: pixels that an axis keeps.

    Raises:
        ValueError: if there are less than the three stages that a ``DynUNet`` has at least.
    """
    sizes, spacing, axes = list(size), list(spacing_mm), range(len(size))
    kernel, kernels, strides = [1] * len(sizes), [], [[1] * len(sizes)]
    while True:
        large = [a for a in axes if sizes[a] >= 2 * min_size]
        finest = min((spacing[a] for a in large), default=0.0)
        halved = [a for a in large if spacing[a] < 2 * finest]
        if not halved or len(halved) == 1 and sizes[halved[0]] < 3 * min_size:
            break
        kernel = [3 if k == 3 or s < 2 * min(spacing) else 1 for k, s in zip(kernel, spacing)]
        kernels.append(kernel)
        strides.append([2 if a in halved else 1 for a in axes])
        for a in halved:
            sizes[a], spacing[a] = math.ceil(sizes[a] / 2), 2 * spacing[a]
    kernels.append([3] * len(sizes))
    if len(strides) < 3:
        raise ValueError(
            f"images of {' x '.join(map(str, size))} pixels give a U-Net of {len(strides)} stages,"
            f" expected 3 or more: {4 * min_size} pixels at least along an axis."
        )
    filters = [min(base_filters * 2**stage, max_filters) for stage in range(len(strides))]
    return Plan(kernels, strides, filters)


@META_ARCH_REGISTRY.register()
class DynUNetSegmenter(nn.Module):
    """nnU-Net-like segmentation of slices: a pixel's type, lesions, and the slice's score.

    Zhao et al. segmented intracranial hemorrhage by nnU-Net (Isensee et al. 2021, see
    :func:`plan_network`). Their text was not at hand. The network is MONAI's ``DynUNet``: two 3 x 3
    convolutions a stage with instance norm and leaky ReLU, transposed convolutions on the way up.
    As in nnU-Net: its plan, soft Dice over the batch without background plus cross-entropy, and
    losses of the deeper outputs that weigh half as much from one to the next, but for the two
    lowest. Chosen here: two dimensions; whole slices in a window in place of patches of HU; deeper
    outputs scaled up to the truth, as MONAI does, in place of the truth scaled down; this package's
    augmentation, optimizer and schedule; no mirroring in the test and no ensemble of folds.

    What it finds: a pixel bleeds if the probabilities of all types are at least ``mask_thresh``
    together, and is of the most probable type; connected pixels of one type are a lesion, with the
    mean probability as its score. Slices that bleed without known masks teach nothing.
    """

    @configurable
    def __init__(
        self,
        *,
        plan: Plan,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        mask_thresh: float = 0.5,
        min_pixels: int = 4,
        detections_per_image: int = 100,
    ):
        """
        Args:
            plan: the stages, of two axes.
            num_classes: K.
            pixel_mean: C grey values that are subtracted from the channels.
            pixel_std: C grey values that the channels are divided by after that.
            mask_thresh: probability from which on a pixel bleeds, in (0, 1).
            min_pixels: smaller lesions are left out, pixels of the original slice.
            detections_per_image: lesions that are kept, of the highest scores.

        Raises:
            ValueError: if MONAI is not installed, or a value is out of its range.
        """
        super().__init__()
        if importlib.util.find_spec("monai") is None:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE {type(self).__name__} needs MONAI, which is not"
                " installed; pip install 'ich_det2[systems]'."
            )
        from monai.losses import DiceCELoss
        from monai.networks.nets import DynUNet

        _check_plan(plan)
        if not 0 < mask_thresh < 1 or min_pixels < 1:
            raise ValueError(
                f"MODEL.DYNUNET.MASK_THRESH_TEST is {mask_thresh} and MIN_PIXELS {min_pixels},"
                " expected a number above 0 and below 1, and one of at least 1."
            )
        steps_up = len(plan.strides) - 1
        self.network = DynUNet(
            spatial_dims=2,
            in_channels=len(pixel_mean),
            out_channels=num_classes + 1,
            kernel_size=plan.kernels,
            strides=plan.strides,
            upsample_kernel_size=plan.strides[1:],
            filters=plan.filters,
            deep_supervision=True,
            deep_supr_num=max(1, steps_up - 2),
        )
        self.criterion = DiceCELoss(
            include_background=False, to_onehot_y=True, softmax=True, batch=True
        )
        # The input's sides have to be multiples of it.
        self.size_divisibility = max(map(math.prod, zip(*plan.strides)))
        self.mask_thresh, self.min_pixels = mask_thresh, min_pixels
        self.detections_per_image = detections_per_image
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        settings = cfg.MODEL.DYNUNET
        return {
            "plan": Plan(settings.KERNELS, settings.STRIDES, settings.FILTERS),
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "mask_thresh": settings.MASK_THRESH_TEST,
            "min_pixels": settings.MIN_PIXELS,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict | list[dict]:
        """
        Args:
            batched_inputs: N dicts with "image", (C, Hi, Wi) in 0..255, and perhaps "height" and
                "width" of the original slice; in training "instances" with "gt_masks" and, where
                some are not known, "gt_has_mask", and perhaps "image_label", 0 or 1.

        Returns:
            In training "loss_seg"; else N dicts with "instances" (pred_boxes, scores, pred_classes,
            and pred_masks, bool, of the original slice's size) and "image_score", a tensor without
            dimensions, see :func:`slice_score`.

        Raises:
            ValueError: if the model is traced, as for ONNX.
        """
        if torch.jit.is_tracing():  # the lesions of one slice would stand for those of all
            raise ValueError(
                f"{type(self).__name__} finds lesions with SciPy, which no graph holds."
            )
        images = self.preprocess_image(batched_inputs)
        logits = self.network(images.tensor)
        if self.training:
            return {"loss_seg": self.loss(logits.float(), batched_inputs)}
        found = logits.float().softmax(dim=1)[:, 1:]
        return [
            self._lesions(probabilities[:, :height, :width], x)
            for probabilities, x, (height, width) in zip(found, batched_inputs, images.image_sizes)
        ]

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Fills up with air to sides that the network can halve, and normalizes."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        constraints = {"size_divisibility": self.size_divisibility}
        if max(side for image in images for side in image.shape[1:]) <= self.size_divisibility:
            # An instance norm needs more than one pixel at the bottom.
            constraints["square_size"] = 2 * self.size_divisibility
        images = ImageList.from_tensors(images, padding_constraints=constraints)
        return ImageList((images.tensor - self.pixel_mean) / self.pixel_std, images.image_sizes)

    def loss(self, logits: torch.Tensor, batched_inputs: list[dict]) -> torch.Tensor:
        """
        Args:
            logits: (N, 1 + D, K + 1, H, W), the network's output and its deeper ones.
            batched_inputs: as of :meth:`forward` in training.

        Returns:
            The weighted mean of the outputs' losses on the slices whose masks are known; 0 without
            any, where still every layer takes part: all processes wait for each one's gradient.
        """
        known = [i for i, x in enumerate(batched_inputs) if has_known_masks(x)]
        if not known:
            return 0 * logits.sum()
        size = tuple(logits.shape[-2:])
        targets = torch.stack([label_map(batched_inputs[i]["instances"], size) for i in known])
        targets = targets[:, None].to(logits.device)
        outputs = logits[known].unbind(dim=1)
        weights = [0.5**i for i in range(len(outputs))]
        losses = [w * self.criterion(output, targets) for w, output in zip(weights, outputs)]
        return sum(losses) / sum(weights)

    def _lesions(self, probabilities: torch.Tensor, x: dict) -> dict:
        """What is found on a slice, of probabilities (K, Hi, Wi) of its types."""
        size = x.get("height", probabilities.shape[1]), x.get("width", probabilities.shape[2])
        probabilities = F.interpolate(
            probabilities[None], size, mode="bilinear", align_corners=False
        )[0]
        foreground, types = probabilities.sum(dim=0), probabilities.argmax(dim=0)
        labels = torch.where(foreground >= self.mask_thresh, types + 1, 0)
        found = find_components(
            labels.cpu().numpy(),
            probabilities.cpu().numpy(),
            min_pixels=self.min_pixels,
            most=self.detections_per_image,
        )
        boxes, scores, classes, masks = (torch.from_numpy(v).to(self.device) for v in found)
        instances = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
        instances.pred_masks = masks
        score = slice_score(foreground.cpu().numpy(), self.min_pixels)
        return {"instances": instances, "image_score": probabilities.new_tensor(score)}


def has_known_masks(dataset_dict: dict) -> bool:
    """Whether all bleeds of a slice have masks, so that the rest of it is background.

    Args:
        dataset_dict: mapped, with "instances".
    """
    instances = dataset_dict["instances"]
    if not len(instances):
        return not image_label(dataset_dict)
    if not instances.has("gt_masks"):
        return False
    return not instances.has("gt_has_mask") or bool(instances.gt_has_mask.all())


def label_map(instances: Instances, size: tuple[int, int]) -> torch.Tensor:
    """The types of a slice's pixels; of several lesions that hold one the smallest has it.

    Args:
        instances: with "gt_masks", where there is any, and "gt_classes".
        size: (H, W), at least the slice's; the rest is background.

    Returns:
        int64 (H, W): 0 background, c + 1 for type c.
    """
    labels = torch.zeros(size, dtype=torch.int64)
    if len(instances):
        masks = instances.gt_masks.tensor.cpu()
        height, width = masks.shape[1:]
        for i in masks.sum(dim=(1, 2)).argsort(descending=True).tolist():
            labels[:height, :width][masks[i]] = int(instances.gt_classes[i]) + 1
    return labels


def _check_plan(plan: Plan) -> None:
    numbers = {len(values) for values in plan}
    pairs = all(len(pair) == 2 for pair in (*plan.kernels, *plan.strides))
    if len(numbers) > 1 or min(numbers) < 3 or not pairs or set(plan.strides[0]) != {1}:
        names = ("KERNELS", "STRIDES", "FILTERS")
        given = ", ".join(f"{name} {list(values)}" for name, values in zip(names, plan))
        raise ValueError(
            f"MODEL.DYNUNET has {given}, expected as many of each, 3 or more: pairs of kernel"
            " sizes, pairs of strides that begin with [1, 1], and channels; tools/train_net.py"
            " plans them where all are [], and writes them to the run's config.yaml."
        )
