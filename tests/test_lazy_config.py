"""configs/lazy/csfrcnn_r50.py is configs/csfrcnn_r50.yaml in Detectron2's other config system."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ich_det2 import add_ich_config
from ich_det2.data import IchDatasetMapper, load_ich_voc
from ich_det2.data.augmentation import expand_dataset

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES, RATIOS = [12.0, 24.0, 40.0], [0.5, 1.0, 2.0]


def yaml_config():
    cfg = get_cfg()
    add_ich_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "csfrcnn_r50.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [SIZES]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [RATIOS]
    return cfg


def lazy_config(*overrides):
    generator = "model.proposal_generator.anchor_generator"
    cfg = LazyConfig.load(str(CONFIGS / "lazy/csfrcnn_r50.py"))
    anchors = (f"{generator}.sizes={SIZES}", f"{generator}.aspect_ratios={RATIOS}")
    return LazyConfig.apply_overrides(cfg, [*anchors, *overrides])


@pytest.fixture(scope="module")
def models():
    """The model of the YAML and of the LazyConfig."""
    return build_model(yaml_config()), instantiate(lazy_config().model)


def plain(value):
    """A setting as plain numbers, lists and dicts; of tensors the shape, of others the class."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(x) for x in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, type):
        return value
    return type(value), plain(getattr(value, "__dict__", {}))


def settings(model):
    return {
        f"{name}.{key}": (type(module), plain(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, nn.Module)
    }


def test_the_model_has_the_same_parts_with_the_same_settings(models):
    yaml, lazy = models
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    trained = [{k: p.requires_grad for k, p in model.named_parameters()} for model in models]
    assert trained[0] == trained[1]
    # By YAML the weight of the class loss is not given, and 1 by default.
    yaml.roi_heads.box_predictor.loss_weight.setdefault("loss_cls", 1.0)
    assert settings(lazy) == settings(yaml)
    assert settings(lazy)["proposal_generator.alpha"][1] == 100.0  # the walk sees them
    assert settings(lazy)["proposal_generator.anchor_matcher"][1][1]["thresholds"][1:3] == [
        0.3,
        0.7,
    ]


def test_the_same_weights_give_the_same_losses_and_boxes(models):
    torch.manual_seed(3)
    # Random weights make large features: scores of 0 or 1, boxes outside the image.
    head, predictor = models[0].proposal_generator.rpn_head, models[0].roi_heads.box_predictor
    for layer in (head.objectness_logits, head.anchor_deltas, *predictor.children()):
        nn.init.normal_(layer.weight, std=1e-5)
    models[1].load_state_dict(models[0].state_dict())
    images = [255 * torch.rand(3, 64, 64) for _ in range(2)]
    boxes = torch.tensor([[8.0, 8.0, 34.0, 30.0]])
    bleeding = Instances((64, 64), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([0]))
    healthy = Instances((64, 64), gt_boxes=Boxes(boxes[:0]), gt_classes=torch.zeros(0).long())
    batch = [{"image": i, "instances": t} for i, t in zip(images, (bleeding, healthy))]
    results = []
    for model in models:
        # Fewer proposals than the paper's: the time goes into them.
        model.roi_heads.batch_size_per_image = 8
        model.proposal_generator.post_nms_topk = {True: 20, False: 20}
        torch.manual_seed(4)
        with EventStorage(), torch.no_grad():
            losses = model.train()(batch)
            found = [out["instances"] for out in model.eval()(batch)]
        results.append((losses, found, model.proposal_generator.anchor_sampler.ratio))
    (losses, found, ratio), (lazy_losses, lazy_found, lazy_ratio) = results
    assert losses.keys() == lazy_losses.keys()
    for key, loss in losses.items():
        assert torch.isfinite(loss) and torch.equal(loss, lazy_losses[key]), key
    assert ratio == lazy_ratio > 1
    for one, other in zip(found, lazy_found):
        assert len(one) > 0
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
        assert torch.equal(one.scores, other.scores)


def test_without_anchors_it_says_where_they_come_from():
    with pytest.raises(ValueError, match="cluster_anchors.py"):
        instantiate(LazyConfig.load(str(CONFIGS / "lazy/csfrcnn_r50.py")).model.proposal_generator)


def test_the_data_are_the_same(full_tree):
    root = full_tree("dicom")
    cfg, lazy = (
        yaml_config(),
        lazy_config(f"dataloader.root={root}", "dataloader.test.num_workers=0"),
    )
    aug = cfg.INPUT.AUG
    expected = expand_dataset(
        load_ich_voc(root, "train"),
        aug.EXPAND,
        shift=aug.EXPAND_SHIFT,
        scale=aug.EXPAND_SCALE,
        seed=cfg.SEED,
    )
    assert instantiate(lazy.dataloader.train.dataset) == expected
    mapped = instantiate(lazy.dataloader.train.mapper)(expected[1])
    by_yaml = IchDatasetMapper(cfg, is_train=True)(expected[1])
    assert mapped["image"].shape[1] == 512 and torch.equal(mapped["image"], by_yaml["image"])
    boxes = [m["instances"].gt_boxes.tensor for m in (mapped, by_yaml)]
    assert len(boxes[0]) == 1 and torch.equal(*boxes)
    first = next(iter(instantiate(lazy.dataloader.test)))
    assert [d["image_id"] for d in first] == ["e", "f"]  # validation, one batch
    assert torch.equal(
        first[0]["image"],
        IchDatasetMapper(cfg, is_train=False)(load_ich_voc(root, "val")[0])["image"],
    )
    settings = instantiate(lazy.dataloader.evaluator).settings
    assert list(settings.thresholds) == cfg.TEST.DIAGNOSIS.THRESHOLDS
    assert settings.operating_threshold == cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD


def test_the_schedule_is_the_same(models):
    cfg, lazy = yaml_config(), lazy_config()
    lazy.optimizer.params.model = models[1]
    optimizer, stock = instantiate(lazy.optimizer), build_optimizer(cfg, models[0])
    for group, other in zip(optimizer.param_groups, stock.param_groups):
        assert len(group["params"]) == len(other["params"])
        for key in ("lr", "momentum", "weight_decay", "nesterov", "dampening"):
            assert group[key] == other[key], key
    assert len(optimizer.param_groups) == len(stock.param_groups)
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert (lazy.train.eval_period, lazy.train.checkpointer.period, lazy.train.seed) == (
        cfg.TEST.EVAL_PERIOD,
        cfg.SOLVER.CHECKPOINT_PERIOD,
        cfg.SEED,
    )
    assert lazy.train.init_checkpoint == cfg.MODEL.WEIGHTS
    schedulers = (
        LRMultiplier(optimizer, instantiate(lazy.lr_multiplier), lazy.train.max_iter),
        build_lr_scheduler(cfg, stock),
    )
    for iteration, rate in ((0, 5e-4), (14999, 5e-4), (15000, 1e-4), (29999, 1e-4)):
        for scheduler in schedulers:
            scheduler.last_epoch = iteration
            assert scheduler.get_lr()[0] == pytest.approx(rate), iteration


def test_saved_and_loaded_it_is_the_same(models, tmp_path):
    path, cfg = tmp_path / "config.yaml", lazy_config(f"dataloader.root={tmp_path}")
    LazyConfig.save(cfg, str(path))
    again = LazyConfig.load(str(path))
    assert again.dataloader.test.dataset.root == str(tmp_path)
    assert settings(instantiate(again.model)).keys() == settings(models[1]).keys()
    LazyConfig.save(again, str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == path.read_text()
