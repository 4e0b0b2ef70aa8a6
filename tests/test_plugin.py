"""The parts in pipelines that are not this project's: stock loops, networks, trainer, predictor.

Networks are stock ones with few channels and random weights.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer, SimpleTrainer, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

import ich_det2
from ich_det2.data import register_ich_voc
from ich_det2.engine.anchors import anchor_settings, clustered_anchors

ROOT = Path(__file__).parents[1]
C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
TINY = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.RETINANET.NUM_CLASSES", 1),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0),
    *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.IMS_PER_BATCH", 2),
)
COST_SENSITIVE = (
    *("MODEL.PROPOSAL_GENERATOR.NAME", "CostSensitiveRPN"),
    *("MODEL.RPN.HEAD_NAME", "CostSensitiveRPNHead", "MODEL.RPN.COST.ALPHA", 5.0),
    *("MODEL.RPN.SAMPLER.MAX_RATIO", 3.0, "MODEL.RPN.SAMPLER.SHORTFALL", "shrink"),
)
ONE_LEVEL = ("MODEL.ANCHOR_GENERATOR.SIZES", [[12.0, 24.0]])
FIVE_LEVELS = ("MODEL.ANCHOR_GENERATOR.SIZES", [[8.0], [16.0], [32.0], [64.0], [128.0]])


def make_cfg(path, *opts):
    """A stock config with this project's keys, small."""
    cfg = get_cfg()
    ich_det2.add_ich_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(path))
    cfg.merge_from_list([*TINY, *opts])
    return cfg


def make_model(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def make_input(*boxes, size=64, seed=1):
    """An image of noise with bright boxes."""
    generator = torch.Generator().manual_seed(seed)
    image = 100 * torch.rand(3, size, size, generator=generator)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] += 100
    target = Instances((size, size))
    target.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4).float())
    target.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
    return {"image": image, "instances": target, "height": size, "width": size}


BATCH = [make_input((4, 6, 30, 28), (40, 40, 52, 50)), make_input(seed=2)]


def train_step(model, batch=BATCH):
    """Losses by name and stored scalars of a forward and backward pass."""
    torch.manual_seed(0)
    with EventStorage() as storage:
        losses = model.train()(batch)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert torch.isfinite(loss), name
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    return losses, {key: value for key, (value, _) in storage.latest().items()}


def infer(model, batch=BATCH):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(batch)]


def ratio_of(model):
    return model.proposal_generator.anchor_sampler.ratio


@pytest.fixture
def registered(full_tree):
    """Registers ``plugin_train`` and ``plugin_val`` of a small tree of PNG; returns its root."""
    root = full_tree()
    for split in ("train", "val"):
        register_ich_voc(f"plugin_{split}", root, split)
    return root


# ---- stock loops -------------------------------------------------------------------------------


def test_a_plain_training_loop_trains_and_its_checkpoint_keeps_the_ratio(registered, tmp_path):
    cfg = make_cfg(C4, *COST_SENSITIVE, *ONE_LEVEL)
    cfg.DATASETS.TRAIN, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = ("plugin_train",), 4, (3,)
    model = make_model(cfg).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    checkpointer = DetectionCheckpointer(
        model, str(tmp_path), optimizer=optimizer, scheduler=scheduler
    )
    periodic = PeriodicCheckpointer(checkpointer, 2, max_iter=cfg.SOLVER.MAX_ITER)
    ratios = [ratio_of(model)]
    with EventStorage() as storage:
        for batch, iteration in zip(build_detection_train_loader(cfg), range(cfg.SOLVER.MAX_ITER)):
            storage.step()
            total = sum(model(batch).values())
            assert torch.isfinite(total)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            scheduler.step()
            periodic.step(iteration)
            ratios.append(ratio_of(model))
    assert ratios[0] == 1 and len(set(ratios)) > 2 and all(1 <= k <= 3 for k in ratios)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())

    torch.manual_seed(1)
    again = build_model(cfg)
    DetectionCheckpointer(again, str(tmp_path)).resume_or_load("", resume=True)
    assert ratio_of(again) == ratios[-1] != 1
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def shrink_lazy_model(model):
    """From ResNet50 to a ResNet18 whose last stage is one narrow block."""
    stages = model.backbone.stages
    del stages.stride_in_1x1  # of bottlenecks
    stages.depth = 18
    model.proposal_generator.head.in_channels = model.roi_heads.res5.in_channels = 256
    model.roi_heads.res5.update(
        num_blocks=1, stride_per_block=[2], bottleneck_channels=8, out_channels=32
    )
    for part in (model.backbone.stem, stages, model.roi_heads.res5):
        part.norm = "BN"
    model.proposal_generator.post_nms_topk = [20, 20]
    model.roi_heads.batch_size_per_image = 16


def test_a_lazyconfig_loop_trains_and_diagnoses(full_tree, tmp_path):
    cfg = LazyConfig.load(str(ROOT / "configs/lazy/csfrcnn_r50.py"))
    generator = "model.proposal_generator.anchor_generator"
    cfg = LazyConfig.apply_overrides(
        cfg,
        [
            f"dataloader.root={full_tree('dicom')}",
            *(f"{generator}.sizes=[12.0,24.0,40.0]", f"{generator}.aspect_ratios=[0.5,1.0,2.0]"),
            *(f"train.output_dir={tmp_path}", "train.device=cpu", "train.max_iter=4"),
            *("dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
            *("dataloader.train.total_batch_size=2", "train.checkpointer.period=2"),
            "dataloader.train.mapper.augmentations.0.short_edge_length=64",
        ],
    )
    shrink_lazy_model(cfg.model)
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), optimizer)
    checkpointer = DetectionCheckpointer(
        model, cfg.train.output_dir, optimizer=optimizer, trainer=trainer
    )

    def evaluate():
        return inference_on_dataset(
            model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        )

    ratios, results = [], []
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
            hooks.CallbackHook(after_step=lambda _: ratios.append(ratio_of(model))),
            hooks.EvalHook(cfg.train.eval_period, lambda: results.append(evaluate())),
        ]
    )
    trainer.train(0, cfg.train.max_iter)
    assert len(set(ratios)) > 1
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert saved["proposal_generator.anchor_sampler._ratio"].item() == ratios[-1]
    # One bleeding and one healthy slice: any ranking gives 0, 0.5 or 1.
    assert results[0]["diagnosis"]["image_auc"] in (0, 0.5, 1)
    scores = (tmp_path / "inference/ich_val/image_scores.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in scores] == ["image_id", "e", "f"]


def test_the_stock_trainer_and_predictor_run_it(registered, tmp_path):
    generator = ("MODEL.ANCHOR_GENERATOR.NAME", "ClusteredAnchorGenerator")
    cfg = make_cfg(C4, *COST_SENSITIVE, *generator, *ONE_LEVEL)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("plugin_train",), ()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.OUTPUT_DIR = 2, (1,), str(tmp_path)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert type(trainer.model.proposal_generator).__name__ == "CostSensitiveRPN"
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    predictor = DefaultPredictor(cfg)
    assert ratio_of(predictor.model) == ratio_of(trainer.model) > 1
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    found = predictor(image)["instances"]
    assert len(found) > 0 and found.image_size == (48, 64)
    assert torch.isfinite(found.pred_boxes.tensor).all()


# ---- stock networks ----------------------------------------------------------------------------


def test_fpn_samples_over_all_levels():
    cfg = make_cfg(FPN, *COST_SENSITIVE, *FIVE_LEVELS, "MODEL.RPN.SAMPLER.SHORTFALL", "fill")
    model = make_model(cfg)
    sampler, seen = model.proposal_generator.anchor_sampler, []
    sample = sampler.sample
    sampler.sample = lambda labels, ratio: seen.append(sample(labels, ratio)) or seen[-1]
    losses, scalars = train_step(model)
    assert losses.keys() == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    # Strides 4 to 64 at 64 pixels: 16^2 + 8^2 + 4^2 + 2^2 + 1 positions of 3 ratios.
    counts = [3 * n * n for n in (16, 8, 4, 2, 1)]
    for image in seen:
        assert image.num_pos + image.num_neg == 256
        levels = [level for level in image.labels.split(counts) if (level >= 0).any()]
        assert len(levels) >= 4
    assert sum((level == 1).any() for level in seen[0].labels.split(counts)) >= 2
    assert seen[0].num_pos > 1 and seen[1].num_pos == 0
    assert scalars["rpn/num_pos_anchors"] * 2 == seen[0].num_pos
    assert ratio_of(model) > 1
    assert len(infer(model)[0]) > 0


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
def test_mask_rcnn_trains_and_finds_masks(kind):
    model = make_model(make_cfg(MASK, *COST_SENSITIVE, *FIVE_LEVELS))
    batch = [make_input((4, 6, 30, 28)), make_input(seed=2)]
    for entry in batch:
        boxes = entry["instances"].gt_boxes.tensor
        if kind == "polygon":
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
            entry["instances"].gt_masks = PolygonMasks([[polygon] for polygon in corners])
        else:
            masks = torch.zeros(len(boxes), 64, 64, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
                mask[y0:y1, x0:x1] = True
            entry["instances"].gt_masks = BitMasks(masks)
    losses, _ = train_step(model, batch)
    assert losses["loss_mask"] > 0 and ratio_of(model) > 1
    found = infer(model, batch)[0]
    assert len(found) > 0 and found.pred_masks.shape[1:] == (64, 64)


def test_retinanet_takes_clustered_anchors():
    sizes = [[6.0, 9.0], [12.0, 18.0], [24.0, 36.0], [48.0, 60.0], [64.0, 90.0]]
    opts = ("MODEL.ANCHOR_GENERATOR.NAME", "ClusteredAnchorGenerator")
    opts += ("MODEL.ANCHOR_GENERATOR.SIZES", sizes)
    opts += ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.6, 1.0, 1.7]])
    opts += ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    cfg = make_cfg(RETINANET, *opts)
    model = make_model(cfg)
    generator = model.anchor_generator
    assert type(generator).__name__ == "ClusteredAnchorGenerator"
    areas = [Boxes(cell).area().sqrt().unique() for cell in generator.cell_anchors]
    assert torch.allclose(areas[2][[0, -1]], torch.tensor([24.0, 36.0]))
    losses, scalars = train_step(model)
    assert losses.keys() == {"loss_cls", "loss_box_reg"}
    assert scalars["num_pos_anchors"] > 0
    assert len(infer(model)[0]) > 0


# ---- clustered anchors on several levels -------------------------------------------------------


def cluster_into(cfg, boxes_wh, method):
    """Fills the anchors in as tools/train_net.py does."""
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "ClusteredAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.update(METHOD=method, NUM_SIZES=5, NUM_RATIOS=3)
    cfg.MODEL.ANCHOR_GENERATOR.update(anchor_settings(cfg, clustered_anchors(cfg, boxes_wh)))
    return cfg


BOXES_WH = np.exp(np.random.default_rng(0).normal(3, 0.6, size=(300, 2)))


@pytest.mark.parametrize("method", ["separate", "joint"])
@pytest.mark.parametrize("path", [FPN, RETINANET])
def test_clustered_anchors_on_every_level_of_a_pyramid(path, method):
    cfg = cluster_into(make_cfg(path, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0), BOXES_WH, method)
    model = make_model(cfg)
    # RetinaNet holds its generator itself, Faster R-CNN in its RPN.
    generator = getattr(model, "proposal_generator", model).anchor_generator
    assert generator.num_anchors == [3] * 5
    areas = [Boxes(cell).area() for cell in generator.cell_anchors]
    for finer, coarser in zip(areas, areas[1:]):
        assert finer.max() < coarser.min()
    train_step(model)
    assert len(infer(model)[0]) > 0


def test_joint_anchors_are_the_pairs():
    cfg = cluster_into(make_cfg(C4, *COST_SENSITIVE), BOXES_WH, "joint")
    (pairs,) = cfg.MODEL.ANCHOR_GENERATOR.PAIRS
    model = make_model(cfg)
    (cells,) = model.proposal_generator.anchor_generator.cell_anchors
    expected = [[-w / 2, -h / 2, w / 2, h / 2] for w, h in pairs]
    assert len(pairs) == 15 and torch.allclose(cells, torch.tensor(expected), atol=1e-4)
    assert model.proposal_generator.rpn_head.objectness_logits.out_channels == 15
    losses, _ = train_step(model)
    assert losses["loss_rpn_cls"] > 0 and len(infer(model)[0]) > 0


def test_levels_of_unequal_numbers_of_pairs_are_refused():
    cfg = make_cfg(FPN, "MODEL.ANCHOR_GENERATOR.NAME", "ClusteredAnchorGenerator")
    cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD = "joint"
    cfg.MODEL.ANCHOR_GENERATOR.PAIRS = [[[4.0, 8.0]], *[[[9.0, 5.0], [9.0, 9.0]]] * 4]
    with pytest.raises(AssertionError, match="same number of anchors"):
        make_model(cfg)


# ---- stock models stay stock -------------------------------------------------------------------

STOCK_BEFORE_AND_AFTER = """
import sys
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

def run(add_keys):
    cfg = get_cfg()
    add_keys(cfg)
    cfg.merge_from_file(model_zoo.get_config_file({config!r}))
    cfg.merge_from_list({opts!r})
    torch.manual_seed(0)
    model = build_model(cfg)
    state = {{key: value.clone() for key, value in model.state_dict().items()}}
    target = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[4.0, 6.0, 30.0, 28.0]])))
    target.gt_classes = torch.tensor([0])
    with EventStorage():
        losses = model([{{"image": 255 * torch.rand(3, 64, 64), "instances": target}}] * 2)
    return state, losses

stock = run(lambda cfg: None)
assert not any(name.startswith("ich_det2") for name in sys.modules)
import ich_det2
ours = run(ich_det2.add_ich_config)
for one, other in zip(stock, ours):
    assert list(one) == list(other)
    for key in one:
        assert torch.equal(one[key], other[key]), key
print(len(stock[0]), *sorted(stock[1]))
"""


def test_a_stock_config_builds_the_stock_model_bit_for_bit():
    code = STOCK_BEFORE_AND_AFTER.format(config=C4, opts=list(TINY + ONE_LEVEL))
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    count, *losses = done.stdout.split()
    assert int(count) > 250
    assert losses == ["loss_box_reg", "loss_cls", "loss_rpn_cls", "loss_rpn_loc"]


def test_a_stock_checkpoint_loads_into_the_cost_sensitive_model(tmp_path):
    stock = make_model(make_cfg(FPN, *FIVE_LEVELS, "MODEL.ROI_HEADS.NUM_CLASSES", 80))
    DetectionCheckpointer(stock, str(tmp_path)).save("stock")
    torch.manual_seed(1)
    model = build_model(make_cfg(FPN, *COST_SENSITIVE, *FIVE_LEVELS))
    DetectionCheckpointer(model).load(str(tmp_path / "stock.pth"))
    state, expected = model.state_dict(), stock.state_dict()
    assert state.keys() - expected.keys() == {"proposal_generator.anchor_sampler._ratio"}
    for key, value in expected.items():
        if key.startswith("roi_heads.box_predictor"):
            assert state[key].shape != value.shape, key  # of 80 classes
        else:
            assert torch.equal(state[key], value), key
    assert ratio_of(model) == 1


# ---- mixed precision, accumulated gradients ----------------------------------------------------


def test_bfloat16_losses_are_close_to_float32():
    """On the CPU; mixed precision on a GPU (float16 with a gradient scaler) is not run here."""
    model = make_model(make_cfg(C4, *COST_SENSITIVE, *ONE_LEVEL))
    losses, _ = train_step(model)
    ratio = ratio_of(model)
    model.zero_grad()
    model.proposal_generator.anchor_sampler._ratio.fill_(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, _ = train_step(model)
    for name in ("loss_rpn_cls", "loss_rpn_loc"):
        assert low[name].item() == pytest.approx(losses[name].item(), rel=0.02), name
        assert low[name].dtype == torch.float32 and low[name] != losses[name]
    assert ratio_of(model) == pytest.approx(ratio, rel=0.01) != 1


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    """k moves with each forward, so it ends at the last half's; a whole batch gives their mean.

    The gradients agree where the same anchors are sampled (here all are), the divisor is
    "num_samples", and batch norms keep their statistics.
    """
    opts = (*COST_SENSITIVE, *ONE_LEVEL, "MODEL.RPN.SAMPLER.SHORTFALL", "fill")
    # 4 x 4 positions of 6 anchors: all are sampled at k = 3 at the latest.
    model = make_model(make_cfg(C4, *opts, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 200))
    rpn = model.proposal_generator
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    halves = [make_input((4, 6, 30, 28)), make_input((10, 8, 50, 40), (40, 40, 54, 54), seed=2)]

    def forward(batch):
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        with EventStorage():
            _, losses = rpn(images, features, [x["instances"] for x in batch])
        return sum(losses.values())

    forward(halves).backward()
    whole = {name: p.grad.clone() for name, p in rpn.named_parameters()}
    ratio = ratio_of(model)
    model.zero_grad()
    rpn.anchor_sampler._ratio.fill_(1)
    ratios = []
    for half in halves:
        (forward([half]) / 2).backward()
        ratios.append(ratio_of(model))
    for name, parameter in rpn.named_parameters():
        error = (parameter.grad - whole[name]).abs().max()
        assert error < 1e-4 * whole[name].abs().max(), name
    assert 1 < ratios[0] != ratios[1] > 1
    assert ratio == pytest.approx(sum(ratios) / 2)
