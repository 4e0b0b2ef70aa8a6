"""Every key that ich_det2 adds to Detectron2's config, with its default and unit."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_ich_config(cfg: CfgNode) -> None:
    """Adds ich_det2's keys to a Detectron2 config, in place. Detectron2's own defaults stay.

    The parts that read the keys are registered with it.

    Args:
        cfg: a config from ``detectron2.config.get_cfg()``.

    Raises:
        ImportError: Detectron2 is not installed.
    """
    if importlib.util.find_spec("detectron2") is None:
        raise ImportError(
            "ich_det2 extends Detectron2, which is not installed in this environment: run `make"
            " setup` in a clone of ich_det2, or install Detectron2 as docs/install.md says."
        )
    from detectron2.config import CfgNode as CN

    from . import modeling as _  # noqa: F401  only registration

    # ---- data ------------------------------------------------------------------------------
    # VOC tree with Annotations/, DICOM/ or JPEGImages/, ImageSets/Main/{train,val,test}.txt.
    cfg.DATASETS.ICH_ROOT = "datasets/phantom"
    # One name: every object in the XML is of that class, whatever its name there.
    # Several names: the XML's names are kept as types (e.g. EDH IPH IVH SAH SDH).
    cfg.DATASETS.ICH_CLASSES = ["hemorrhage"]
    # Datasets for model selection during training; DATASETS.TEST is touched once, at the end.
    cfg.DATASETS.VAL = ("ich_val",)

    # Detectron2's INPUT.MASK_FORMAT "bitmask" asks for the masks of SegmentationObject/ or
    # SegmentationClass/, in training and evaluation; without it they are not opened.

    # [level HU, width HU], one channel each; one window fills three channels. Images of 8 bit
    # (PNG, JPEG) are taken as windowed already.
    cfg.INPUT.WINDOWS = [[50.0, 100.0]]
    # Slices on either side that become channels, along the slice normal, each in the one window:
    # 1 gives three channels, n gives 2 n + 1, for which MODEL.PIXEL_MEAN and PIXEL_STD need as many
    # values. 0: off.
    cfg.INPUT.CONTEXT_SLICES = 0
    # Slices on either side that a classifier of sequences (BHCNetLSTM, BHCNetGRU, RADNet) sees in
    # order; at the ends of a series, and at a gap in it, the last slice before stands in. 0: off.
    cfg.INPUT.SEQUENCE_SLICES = 0
    # Slices, at even distances over the series, of the whole scan that a classifier of scans
    # (CNN3D) sees; it learns one label a scan, and each slice gets its scan's score. 0: off.
    cfg.INPUT.SCAN_SLICES = 0
    # Crop slices to the head: a square around the largest part that is neither air nor thin, over
    # all slices of a series, with a margin of 4 % on each side. Boxes are mapped back.
    cfg.INPUT.HEAD_CROP = False
    # Blank what lies outside of the skull: the scalp, hands beside the head, the couch.
    cfg.INPUT.SKULL_MASK = False
    # With one window: the second of the three channels shows how much denser than the slice's brain
    # its soft tissue is, smoothed and without bone.
    cfg.INPUT.DENSITY = False
    # The third channel shows how much denser than its mirror image the head's soft tissue is.
    cfg.INPUT.ASYMMETRY = False
    # Folder in which decoded slices of compressed DICOM files are kept. "": none.
    cfg.INPUT.CACHE_DIR = ""
    cfg.INPUT.AUG = CN()
    # Random translation, as a fraction of the image's width and height to either side. 0: off.
    cfg.INPUT.AUG.SHIFT = 0.0
    # Random scaling: the head is drawn with a factor in [1 / (1 + SCALE), 1 + SCALE]. 0: off.
    cfg.INPUT.AUG.SCALE = 0.0
    # Random rotation by at most so many degrees to either side. 0: off.
    cfg.INPUT.AUG.ROTATE = 0.0
    # Random contrast and brightness: factors in [1 - JITTER, 1 + JITTER]. 0: off.
    cfg.INPUT.AUG.JITTER = 0.0
    # Fixed expansion of the training set as in the paper: each image stands EXPAND times in an
    # epoch, the first untouched, the others moved and scaled by at most EXPAND_SHIFT and
    # EXPAND_SCALE, drawn once. 1: off.
    cfg.INPUT.AUG.EXPAND = 1
    cfg.INPUT.AUG.EXPAND_SHIFT = 0.1
    cfg.INPUT.AUG.EXPAND_SCALE = 0.2

    # Share of slices with hemorrhage in each batch of DATALOADER.SAMPLER_TRAIN
    # "PositiveShareSampler", in (0, 1).
    cfg.DATALOADER.POSITIVE_SHARE = 0.5

    # ---- anchors ---------------------------------------------------------------------------
    # Anchors of ClusteredAnchorGenerator left as [[]] are clustered from the training boxes by
    # tools/train_net.py before the model is built. For several IN_FEATURES, from fine to coarse,
    # they are sorted by size and dealt to the levels in order, equally many to each.
    cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS = CN()
    # "separate" clusters areas and ratios (paper) for SIZES x ASPECT_RATIOS; "joint" clusters
    # widths and heights by IoU for PAIRS, NUM_SIZES x NUM_RATIOS of them.
    cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD = "separate"
    # Over all levels; with several, SIZES (joint: PAIRS) must be a multiple of their number.
    cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.NUM_SIZES = 3
    cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.NUM_RATIOS = 3
    # "linear" clusters height/width (paper); "log" treats h/w and w/h alike.
    cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.RATIO_SPACE = "linear"
    # Anchors as a list of [width, height] for each level or one for all, network-input pixels;
    # METHOD "joint" fills them in. Where they are given, SIZES and ASPECT_RATIOS are not read.
    cfg.MODEL.ANCHOR_GENERATOR.PAIRS = [[]]

    # ---- cost-sensitive RPN ----------------------------------------------------------------
    cfg.MODEL.RPN.COST = CN()
    # Weight of a positive anchor in the objectness loss (alpha); 1 is stock.
    cfg.MODEL.RPN.COST.ALPHA = 1.0
    # Divisor of the objectness loss: "num_samples" (stock: BATCH_SIZE_PER_IMAGE x images) or
    # "sum_weights" (the sum of the sampled anchors' weights, which keeps the loss's size).
    cfg.MODEL.RPN.COST.NORMALIZER = "num_samples"
    cfg.MODEL.RPN.SAMPLER = CN()
    # A name in ANCHOR_SAMPLER_REGISTRY: AdaptiveRatioSampler or FixedRatioSampler.
    cfg.MODEL.RPN.SAMPLER.NAME = "AdaptiveRatioSampler"
    # R, the upper bound of the positive:negative ratio k; 1 keeps k at 1.
    cfg.MODEL.RPN.SAMPLER.MAX_RATIO = 1.0
    # With fewer positives than wanted: "fill" (stock: negatives fill up), "shrink" (fewer
    # negatives, so that the ratio holds), "repeat" (positives weigh more, so that it holds).
    cfg.MODEL.RPN.SAMPLER.SHORTFALL = "fill"
    # IoU of the NMS that screens candidate anchors before sampling, by objectness and within
    # positives and negatives apart, of each the 2 * BATCH_SIZE_PER_IMAGE highest scored. 0: off.
    cfg.MODEL.RPN.SAMPLER.NMS_THRESH = 0.0
    # Initial objectness of every anchor, set by the bias of CostSensitiveRPNHead. 0: off (0.5).
    cfg.MODEL.RPN.PRIOR_PROB = 0.0

    # ---- second stage ----------------------------------------------------------------------
    cfg.MODEL.ROI_HEADS.COST = CN()
    # Weight of a foreground proposal in the ROI classification loss of CostSensitiveROIHeads,
    # CostSensitiveRes5ROIHeads, CostSensitiveCascadeROIHeads, InceptionV3ROIHeads and
    # RFCNROIHeads; 1 is stock.
    # Beyond the paper.
    cfg.MODEL.ROI_HEADS.COST.ALPHA = 1.0
    # In the test, in place of NMS at NMS_THRESH_TEST, Soft-NMS: each box lowers the scores of those
    # of its class by exp(-IoU^2 / sigma); of the same heads, but for a cascade. 0: off.
    cfg.MODEL.ROI_HEADS.SOFT_NMS_SIGMA_TEST = 0.0
    # In the test each box that NMS leaves becomes the mean, by scores, of all boxes of its class
    # that overlap it by this IoU; of the same heads, but for a cascade. 0: off.
    cfg.MODEL.ROI_HEADS.VOTE_THRESH_TEST = 0.0
    # In the test, how often CostSensitiveROIHeads are shown their own boxes again as proposals; the
    # scores stay those of the RPN's. 0: off.
    cfg.MODEL.ROI_HEADS.REFINE_TEST = 0
    # The least score of a box that is refined; each takes as long again as in the second stage.
    cfg.MODEL.ROI_HEADS.REFINE_THRESH_TEST = 0.0

    # Detectron2's MODEL.MASK_ON gives all ROI heads here but RFCNROIHeads a mask head; the one of
    # MODEL.ROI_MASK_HEAD.NAME KnownMaskHead learns no mask from a box without one.

    # ---- timm backbones (build_timm_backbone) ------------------------------------------------
    cfg.MODEL.TIMM = CN()
    # Any name that timm.create_model takes and that offers feature maps.
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    # Strides of the maps to give out; named "stride16" and so on.
    cfg.MODEL.TIMM.OUT_STRIDES = [16]
    # Keep the batch norms' statistics and affine parameters as loaded.
    cfg.MODEL.TIMM.FREEZE_BN = True
    # Share of the newest batch in the running statistics of batch norms that are not frozen. Some
    # networks come with 0.01, which lags behind in a training of some hundred steps.
    cfg.MODEL.TIMM.BN_MOMENTUM = 0.1

    # Channels of the FPN of build_timm_fpn_backbone are MODEL.FPN.OUT_CHANNELS, its maps "p3" (of
    # stride 8), "p4" and so on, one for each of OUT_STRIDES.

    # ---- image head (META_ARCHITECTURE DiagnosisRCNN) ----------------------------------------
    # It scores the whole slice and learns from every image label; slices that bleed but have no
    # boxes teach it alone.
    cfg.MODEL.IMAGE_HEAD = CN()
    # Map of the backbone that it takes. "": the one of the largest stride.
    cfg.MODEL.IMAGE_HEAD.IN_FEATURE = ""
    # Channels before the pooling, by the mean and the maximum over the slice.
    cfg.MODEL.IMAGE_HEAD.CONV_DIM = 128
    # Share of the pooled values left out in training.
    cfg.MODEL.IMAGE_HEAD.DROPOUT = 0.0
    # Weight of a slice with hemorrhage in its loss, and of its loss among the others.
    cfg.MODEL.IMAGE_HEAD.POS_WEIGHT = 1.0
    cfg.MODEL.IMAGE_HEAD.LOSS_WEIGHT = 1.0
    # Share w of its logit in the slice's score, 1 - w being that of the highest scored box.
    cfg.MODEL.IMAGE_HEAD.SCORE_WEIGHT = 0.5
    # Exponent v of its score in a box's: box ** (1 - v) * slice ** v. 0: off.
    cfg.MODEL.IMAGE_HEAD.BOX_WEIGHT = 0.0

    # ---- ensembles (META_ARCHITECTURE EnsembleRCNN, made by tools/ensemble.py) -----------------
    cfg.MODEL.ENSEMBLE = CN()
    # For each member the keys, and their values, in which it differs from this config.
    cfg.MODEL.ENSEMBLE.MEMBERS = []
    # Each member also sees the slice mirrored left to right.
    cfg.MODEL.ENSEMBLE.FLIP = False
    # IoU from which on the members' boxes are fused.
    cfg.MODEL.ENSEMBLE.IOU_THRESHOLD = 0.5

    # ---- classifiers of whole slices (META_ARCHITECTURE ImageClassifier) ---------------------
    cfg.MODEL.CLASSIFIER = CN()
    # A name in CLASSIFIER_REGISTRY: LeNet, AlexNet, GoogLeNet, DenseNet121, InceptionV3,
    # InceptionResNetV2, EfficientNetLite0, BHCNet, BHCNetLSTM, BHCNetGRU, GLCMNet, AlexNetSVM,
    # AutoencoderAlexNetSVM, RADNet or CNN3D.
    cfg.MODEL.CLASSIFIER.NAME = "DenseNet121"
    # Side of the network's square input, pixels; slices are scaled to it by their longer side.
    cfg.MODEL.CLASSIFIER.INPUT_SIZE = 224
    # Weight of a slice with hemorrhage in the loss.
    cfg.MODEL.CLASSIFIER.POS_WEIGHT = 1.0

    # ---- lesions without learning (META_ARCHITECTURE ThresholdSegmenter, LevelSetSegmenter) ----
    cfg.MODEL.SEGMENTER = CN()
    # HU beyond the median of the slice's brain from which on it may be blood.
    cfg.MODEL.SEGMENTER.THRESHOLD_HU = 20.0
    # Share of the head; what is smaller is no lesion.
    cfg.MODEL.SEGMENTER.MIN_SHARE = 5e-4
    # Weight of a slice with hemorrhage in the loss.
    cfg.MODEL.SEGMENTER.POS_WEIGHT = 1.0
    # HU beyond that median at which the clusters of LevelSetSegmenter start, ascending.
    cfg.MODEL.SEGMENTER.CENTERS = [-6.0, 0.0, 6.0, 25.0]
    # Iterations of its level set; 0 leaves the outlines to the clusters.
    cfg.MODEL.SEGMENTER.ITERATIONS = 20
    # Below 0 its outlines grow where there is no edge, above 0 they shrink.
    cfg.MODEL.SEGMENTER.AREA = -1.0

    # ---- segmentation of slices (META_ARCHITECTURE DynUNetSegmenter) --------------------------
    cfg.MODEL.DYNUNET = CN()
    # The stages of the network: sizes of convolutions and strides, [rows, columns] each, and
    # channels. Left as [] they are planned, as nnU-Net does, from the sizes of the training slices
    # at the network's input by tools/train_net.py before the model is built.
    cfg.MODEL.DYNUNET.KERNELS = []
    cfg.MODEL.DYNUNET.STRIDES = []
    cfg.MODEL.DYNUNET.FILTERS = []
    # Channels of a planned network's first stage; each further one has twice as many as that before
    # it, up to 16 times these.
    cfg.MODEL.DYNUNET.BASE_FILTERS = 32
    # Probability of all types together from which on a pixel bleeds.
    cfg.MODEL.DYNUNET.MASK_THRESH_TEST = 0.5
    # Pixels of the least lesion; the slice's score is the mean probability of as many pixels.
    cfg.MODEL.DYNUNET.MIN_PIXELS = 4

    # ---- torchvision's Inception V3 (build_inception_v3_backbone, InceptionV3ROIHeads) --------
    cfg.MODEL.TORCHVISION = CN()
    # Keep the batch norms' statistics and affine parameters as loaded.
    cfg.MODEL.TORCHVISION.FREEZE_BN = True

    # ---- diagnosis ---------------------------------------------------------------------------
    cfg.TEST.DIAGNOSIS = CN()
    # Image scores at which the diagnosis is tabulated.
    cfg.TEST.DIAGNOSIS.THRESHOLDS = [round(0.05 * i, 2) for i in range(1, 20)]
    # A slice (patient) is called positive if its score is at least this.
    cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD = 0.5
    # Cost of a missed bleed, in false alarms; of the expected cost.
    cfg.TEST.DIAGNOSIS.COST_RATIO = 10.0
    # From slices to the patient: any, at_least_<m> (slices), top_<k>_mean (of scores), noisy_or.
    # The first makes the diagnosis, the others are reported beside it.
    cfg.TEST.DIAGNOSIS.PATIENT_RULES = ["any", "at_least_2", "top_3_mean", "noisy_or"]
    # Weights of a slice's neighbours along the series and of its own score, in the middle: an odd
    # number of them, of sum 1, such as [0.25, 0.5, 0.25]. The mean is the score that slices and
    # patients are diagnosed by, in evaluation and diagnosis. []: off.
    cfg.TEST.DIAGNOSIS.SMOOTHING = []
    # With SMOOTHING boxes are smoothed too, each with those of the neighbours that overlap it by
    # this IoU, and the slice's score moves as that of its highest box. 0: off.
    cfg.TEST.DIAGNOSIS.SMOOTHING_IOU = 0.0
    # The weights that boxes are smoothed by where they are: a bleed's outline holds for fewer
    # slices than that there is a bleed. []: those of SMOOTHING.
    cfg.TEST.DIAGNOSIS.SMOOTHING_BOXES = []
    cfg.TEST.DIAGNOSIS.OPERATING_POINT = CN()
    # How the best model's threshold is chosen on DATASETS.VAL, before DATASETS.TEST is touched:
    # fixed (OPERATING_THRESHOLD), recall, youden, f2 or cost. It is written to
    # OUTPUT_DIR/operating_point.json, and used by every later evaluation of these weights.
    cfg.TEST.DIAGNOSIS.OPERATING_POINT.RULE = "fixed"
    # Where the rule is applied: image or patient.
    cfg.TEST.DIAGNOSIS.OPERATING_POINT.LEVEL = "image"
    # The least recall that the rule "recall" asks for.
    cfg.TEST.DIAGNOSIS.OPERATING_POINT.TARGET_RECALL = 0.95
    # Draws of the bootstrap over patients.
    cfg.TEST.DIAGNOSIS.RESAMPLES = 2000
    # Training stops after so many validations without a better BEST_METRIC. 0: off.
    cfg.TEST.DIAGNOSIS.PATIENCE = 0
    # Metric on DATASETS.VAL that picks model_best.pth, e.g. bbox/AP50; larger is better, but
    # for a cost.
    cfg.TEST.DIAGNOSIS.BEST_METRIC = "diagnosis/image_auc"
    # Images per batch in evaluation and tools/diagnose.py.
    cfg.TEST.BATCH_SIZE = 4
