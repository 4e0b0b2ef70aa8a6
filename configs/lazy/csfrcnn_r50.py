"""../csfrcnn_r50.yaml as a LazyConfig, for Detectron2's tools/lazyconfig_train_net.py.

Anchors come from `python tools/cluster_anchors.py --config-file configs/csfrcnn_r50.yaml`, which
prints sizes and ratios; without them the anchor generator says what is missing:

    lazyconfig_train_net.py --config-file configs/lazy/csfrcnn_r50.py dataloader.root=my/data \\
        model.proposal_generator.anchor_generator.sizes=[17.2,41.5,83.0] \\
        model.proposal_generator.anchor_generator.aspect_ratios=[0.6,1.0,1.7]
"""

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.transforms import ResizeShortestEdge
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import OmegaConf

from ich_det2.data import IchDatasetMapper, load_ich_voc
from ich_det2.data.augmentation import expand_dataset
from ich_det2.evaluation import DiagnosisEvaluator
from ich_det2.modeling import (
    AdaptiveRatioSampler,
    ClusteredAnchorGenerator,
    CostSensitiveRes5ROIHeads,
    CostSensitiveRPN,
    CostSensitiveRPNHead,
)
from ich_det2.modeling.roi_heads import CostSensitiveFastRCNNOutputLayers

# ---- model: Detectron2's C4 without masks, with this project's RPN ---------------------------
model = model_zoo.get_config("common/models/mask_rcnn_c4.py").model
model.backbone.freeze_at = 2
model.proposal_generator.update(
    _target_=CostSensitiveRPN,
    alpha=100.0,
    post_nms_topk=(2000, 300),
    anchor_sampler=L(AdaptiveRatioSampler)(
        num_samples="${..batch_size_per_image}", max_ratio=3.0, shortfall="shrink"
    ),
)
model.proposal_generator.head.update(
    _target_=CostSensitiveRPNHead,
    num_anchors=9,  # number of sizes times number of ratios
)
model.proposal_generator.anchor_generator.update(
    _target_=ClusteredAnchorGenerator,
    sizes=[],  # sqrt(area), network-input pixels; of tools/cluster_anchors.py
    aspect_ratios=[],  # height / width; likewise
    offset=0.0,
)
del model.roi_heads.mask_head
model.roi_heads._target_ = CostSensitiveRes5ROIHeads
model.roi_heads.box_predictor._target_ = CostSensitiveFastRCNNOutputLayers
model.roi_heads.box_predictor.alpha = 1.0
model.roi_heads.num_classes = 1
model.roi_heads.batch_size_per_image = 128
model.roi_heads.box_predictor.test_score_thresh = 0.001  # ROC curves need the low scores too

# ---- data: healthy slices are kept -----------------------------------------------------------
dataloader = OmegaConf.create({"root": "datasets/phantom"})
dataloader.train = L(build_detection_train_loader)(
    dataset=L(expand_dataset)(
        dicts=L(load_ich_voc)(root="${....root}", split="train"),
        factor=4,
        shift=0.1,
        scale=0.2,
        seed=1,
    ),
    mapper=L(IchDatasetMapper)(
        is_train=True,
        augmentations=[L(ResizeShortestEdge)(short_edge_length=512, max_size=1333)],
        windows=[[50, 100]],  # level HU, width HU
    ),
    total_batch_size=1,
    aspect_ratio_grouping=False,
    num_workers=4,
)
# The training evaluates this one every now and then. The test patients, once, at the end:
# --eval-only train.init_checkpoint=... dataloader.test.dataset.split=test
dataloader.test = L(build_detection_test_loader)(
    dataset=L(load_ich_voc)(root="${...root}", split="val"),
    mapper=L(IchDatasetMapper)(
        is_train=False,
        augmentations="${...train.mapper.augmentations}",
        windows="${...train.mapper.windows}",
    ),
    batch_size=4,
    num_workers=4,
)
dataloader.evaluator = L(DiagnosisEvaluator)(
    thresholds=[round(0.05 * i, 2) for i in range(1, 20)],
    operating_threshold=0.5,
    output_dir="${train.output_dir}/inference/ich_${..test.dataset.split}",
)

# ---- schedule --------------------------------------------------------------------------------
optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer.lr = 0.0005
lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.2], milestones=[15000, 30000])

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/csfrcnn_r50_lazy"
train.device = "cuda" if torch.cuda.is_available() else "cpu"
train.max_iter = 30000
train.seed = 1
