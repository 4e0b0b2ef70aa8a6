"""What is wrong with a run is said in one sentence before anything is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from PIL import Image

from ich_det2 import add_ich_config
from ich_det2.anchors import AnchorPairs, Anchors
from ich_det2.data import IchDatasetMapper
from ich_det2.data.datasets import register_ich_datasets
from ich_det2.data.tree import VocTree
from ich_det2.engine.anchors import (
    anchor_levels,
    anchor_settings,
    fill_anchors,
    take_trained_anchors,
    training_boxes_wh,
)
from ich_det2.engine.checks import check_config, check_weights
from ich_det2.engine.config import (
    change_answers,
    class_count_key,
    differences,
    is_classifier,
    is_retinanet,
    load_config,
    not_continuable,
)
from ich_det2.evaluation.evaluator import metric_names
from ich_det2.modeling import ImageClassifier

EFFNET = "configs/csfrcnn_effnet_lite0.yaml"
OPEN_ANCHORS = (
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[]]"),
    *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[]]"),
    *("MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD", "separate"),
)
JOINT = ("MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD", "joint")


@pytest.fixture
def cfg_on(tiny_cfg, full_tree, tmp_path):
    def make(*opts):
        root, out = str(full_tree()), str(tmp_path / "out")
        return tiny_cfg("DATASETS.ICH_ROOT", root, "OUTPUT_DIR", out, *opts)

    return make


def test_what_a_sampler_lacks_is_said_before_anything_is_written(cfg_on, tmp_path):
    cfg = cfg_on("DATALOADER.SAMPLER_TRAIN", "PositiveShareSampler")
    table = Path(cfg.DATASETS.ICH_ROOT) / "labels.csv"
    images = VocTree(cfg.DATASETS.ICH_ROOT).images
    table.write_text("\n".join(["image,label", *(f"{image},1" for image in images), ""]))
    with pytest.raises(ValueError, match="have hemorrhage and 0 have none"):
        check(cfg)
    assert not (tmp_path / "out").exists()


def check(cfg, **kwargs):
    check_config(cfg, **{"eval_only": False, "resume": False, **kwargs})


def test_a_good_config_passes_and_gets_its_anchors(cfg_on, tmp_path):
    cfg = cfg_on(*OPEN_ANCHORS)
    check(cfg)
    # Both training boxes are 20 x 16 in 64 x 48 (VOC is inclusive), and the short edge grows from
    # 48 to 64: 26.7 x 21.3, so the size is sqrt(26.7 * 21.3) = 23.85 and the ratio 0.8. The longer
    # edge is rounded: 85 px.
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[pytest.approx(23.85, abs=0.01)]]
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[pytest.approx(0.8)]]
    assert not (tmp_path / "out").exists()


def test_joint_clusters_are_filled_in_as_pairs(cfg_on):
    cfg = cfg_on(*OPEN_ANCHORS, *JOINT)
    check(cfg)  # builds the model too
    # 20 x 16 times 64/48, as above, but not turned into a size and a ratio; two equal boxes.
    (((width, height),),) = cfg.MODEL.ANCHOR_GENERATOR.PAIRS
    assert (width, height) == (pytest.approx(26.67, abs=0.01), pytest.approx(21.33, abs=0.01))
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[]]


def test_pairs_in_the_config_are_kept(cfg_on):
    cfg = cfg_on(*JOINT, "MODEL.ANCHOR_GENERATOR.PAIRS", "[[[10.0, 20.0]]]")
    check(cfg)
    assert cfg.MODEL.ANCHOR_GENERATOR.PAIRS == [[[10.0, 20.0]]]


LEVELS = ("MODEL.RPN.IN_FEATURES", "['p2', 'p3', 'p4']")


def test_sizes_are_dealt_to_the_levels_from_small_to_large(tiny_cfg):
    sizes = Anchors((8.001, 12.0, 16.126, 24.0, 32.0, 48.0), (0.5, 1.23456))
    assert anchor_settings(tiny_cfg(*LEVELS), sizes) == {
        "SIZES": [[8.0, 12.0], [16.13, 24.0], [32.0, 48.0]],
        "ASPECT_RATIOS": [[0.5, 1.235]],
    }
    assert anchor_settings(tiny_cfg(), sizes)["SIZES"] == [[8.0, 12.0, 16.13, 24.0, 32.0, 48.0]]


def test_pairs_are_dealt_to_the_levels_from_small_to_large(tiny_cfg):
    pairs = AnchorPairs(((4.0, 8.0), (9.0, 5.126), (20.0, 20.0)))
    dealt = [[[4.0, 8.0]], [[9.0, 5.13]], [[20.0, 20.0]]]
    assert anchor_settings(tiny_cfg(*LEVELS), pairs) == {"PAIRS": dealt}
    assert anchor_settings(tiny_cfg(), pairs) == {"PAIRS": [[pair for (pair,) in dealt]]}


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        (Anchors((8.0, 16.0), (1.0,)), "gave 2 SIZES"),
        (Anchors((8.0, 16.0, 24.0, 32.0), (0.5, 1.0, 2.0)), "gave 4 SIZES"),
        (AnchorPairs(((4.0, 8.0), (9.0, 5.0))), "gave 2 PAIRS"),
    ],
)
def test_what_cannot_be_dealt_equally_is_an_error_with_the_remedy(tiny_cfg, anchors, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        anchor_settings(tiny_cfg(*LEVELS), anchors)
    for text in (message, "3 levels ['p2', 'p3', 'p4']", "CLUSTERS.NUM_SIZES"):
        assert text in str(error.value)


def test_the_levels_are_those_of_the_models_head(tiny_cfg):
    assert anchor_levels(tiny_cfg()) == ["stride16"]
    assert len(anchor_levels(tiny_cfg("MODEL.META_ARCHITECTURE", "RetinaNet"))) == 5


def test_architectures_derived_from_retinanet_and_the_classifier_are_as_they_are(tiny_cfg):
    for base in (RetinaNet, ImageClassifier):
        name = f"Own{base.__name__}"
        if name not in META_ARCH_REGISTRY:
            META_ARCH_REGISTRY.register(type(name, (base,), {}))
    own = tiny_cfg("MODEL.META_ARCHITECTURE", "OwnRetinaNet")
    assert is_retinanet(own) and class_count_key(own) == "MODEL.RETINANET.NUM_CLASSES"
    own = tiny_cfg("MODEL.META_ARCHITECTURE", "OwnImageClassifier")
    assert is_classifier(own) and class_count_key(own) == ""


def test_anchors_in_the_config_are_kept(cfg_on):
    cfg = cfg_on()
    check(cfg)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[12.0, 24.0]]


@pytest.mark.parametrize("key", ["SIZES", "ASPECT_RATIOS"])
def test_half_of_the_anchors_is_refused_and_not_replaced(cfg_on, key):
    cfg = cfg_on(*OPEN_ANCHORS, f"MODEL.ANCHOR_GENERATOR.{key}", "[[8.0, 16.0]]")
    with pytest.raises(ValueError, match=rf"{key} is \[\[8.0, 16.0\]\], but \w+ is open"):
        check(cfg)


def test_boxes_are_those_of_the_networks_input(cfg_on):
    cfg = cfg_on("INPUT.MIN_SIZE_TRAIN", "(24,)")
    check(cfg)
    # 20 x 16 pixels at half size.
    assert training_boxes_wh(cfg).tolist() == [[10, 8], [10, 8]]


def test_boxes_are_those_of_the_networks_input_where_pixels_are_not_square(voc_tree, tiny_cfg):
    images = {"a": [("IPH", (11, 13, 30, 28))], "b": [("SDH", (1, 1, 64, 5))]}
    header = {"a": {"PixelSpacing": [1.0, 0.5]}, "b": {"PixelSpacing": [0.3, 0.45]}}
    root = voc_tree(images, kind="dicom", header=header)
    cfg = tiny_cfg("DATASETS.ICH_ROOT", str(root), "INPUT.MIN_SIZE_TRAIN", "(32,)")
    register_ich_datasets(root)
    boxes_wh = training_boxes_wh(cfg)
    # a: 64 x 48 pixels become 64 x 96, then 32 x 48: 20 x 16 become 10 x 16.
    # b: 64 x 32, and then the same: 5 of 48 rows become 5 x 32 / 48.
    assert boxes_wh == pytest.approx(np.array([[10, 16], [64, 5 * 32 / 48]]))
    mapper = IchDatasetMapper(cfg, is_train=True)
    mapped = [mapper(d)["instances"].gt_boxes.tensor for d in DatasetCatalog.get("ich_train")]
    corners = torch.cat(mapped).numpy()
    assert boxes_wh == pytest.approx(corners[:, 2:] - corners[:, :2])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.RPN.SAMPLER.NAME", "AdaptiveSampler"), "AdaptiveRatioSampler"),
        (("MODEL.RPN.SAMPLER.SHORTFALL", "pad"), "SHORTFALL is 'pad'"),
        (("MODEL.RPN.SAMPLER.MAX_RATIO", "0.5"), "MAX_RATIO must be"),
        (("MODEL.RPN.COST.ALPHA", "0.0"), "ALPHA must be"),
        (("MODEL.RPN.COST.NORMALIZER", "mean"), "NORMALIZER is 'mean'"),
        (("MODEL.RPN.PRIOR_PROB", "1.0"), "PRIOR_PROB must be"),
        ((*OPEN_ANCHORS, "MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD", "jiont"), "METHOD is 'jiont'"),
        (("MODEL.RPN.HEAD_NAME", "NoHead"), "NoHead"),
        (("MODEL.PROPOSAL_GENERATOR.NAME", "NoRPN"), "NoRPN"),
        (("MODEL.TIMM.NAME", "efficientnet_lite9"), "efficientnet_lite9"),
        (("INPUT.WINDOWS", "[[50, 100], [80, 200]]"), "1 or 3"),
        (("DATASETS.TRAIN", "('ich_trian',)"), "ich_trian"),
        (("MODEL.WEIGHTS", "no/such/model.pth"), "MODEL.WEIGHTS ''"),
        (("MODEL.WEIGHTS", "timm://no_such_network"), "no_such_network"),
        (("MODEL.WEIGHTS", "no.pth?matching_heuristics=True"), "there is no such file"),
        (("MODEL.WEIGHTS", "model.pth?matching_heuristics=true"), "heuristics=True, which finds"),
        (("MODEL.WEIGHTS", "torchvision://vgg19?matching_heuristics=True"), "one of vgg16"),
        (("MODEL.WEIGHTS", "torchvision://alexnet"), "one of vgg16, inception_v3, resnet50"),
        (("MODEL.WEIGHTS", "torchvision://resnet50"), "MODEL.RESNETS.STRIDE_IN_1X1 False"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(cfg_on, tmp_path, opts, message):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        check(cfg_on(*opts))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_batch_that_processes_cannot_share_is_refused(cfg_on):
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 4, expected a multiple of the 3"):
        check(cfg_on(), num_processes=3)


def test_a_training_set_without_boxes_is_refused(tiny_cfg, voc_tree):
    for split in ("train", "val", "test"):
        root = voc_tree({f"{split}1": []}, split=split)
    with pytest.raises(ValueError, match="has no box"):
        check(tiny_cfg("DATASETS.ICH_ROOT", str(root), *OPEN_ANCHORS))


def test_evaluation_needs_a_whole_detector(cfg_on):
    with pytest.raises(ValueError, match="--eval-only needs a trained model"):
        check(cfg_on(), eval_only=True)
    for weights in ("timm://tf_efficientnet_lite0", "torchvision://vgg16"):
        with pytest.raises(ValueError, match="--eval-only needs a trained model"):
            check_weights(weights, trained=True)


def test_evaluation_takes_the_anchors_of_the_training_not_of_its_own_data(cfg_on, tmp_path):
    cfg = cfg_on(*OPEN_ANCHORS)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model" / "model_best.pth")
    with pytest.raises(ValueError, match="no config.yaml with the trained anchors"):
        take_trained_anchors(cfg)
    trained = cfg_on()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.yaml").write_text(trained.dump())
    take_trained_anchors(cfg)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[12.0, 24.0]]


def test_evaluation_takes_pairs_of_the_training_too(cfg_on, tmp_path):
    trained = cfg_on(*JOINT, "MODEL.ANCHOR_GENERATOR.PAIRS", "[[[10.0, 20.0]]]")
    (tmp_path / "config.yaml").write_text(trained.dump())
    # The method comes along, whichever the config asks for.
    for opts in ((), JOINT):
        cfg = cfg_on(*OPEN_ANCHORS, *opts, "MODEL.WEIGHTS", str(tmp_path / "model_best.pth"))
        take_trained_anchors(cfg)
        assert cfg.MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD == "joint"
        assert cfg.MODEL.ANCHOR_GENERATOR.PAIRS == [[[10.0, 20.0]]]


def test_patients_in_two_splits_are_warned_of(cfg_on, caplog):
    cfg = cfg_on()
    csv = f"{cfg.DATASETS.ICH_ROOT}/patients.csv"
    with open(csv, encoding="utf-8") as file:
        text = file.read().replace("p-g", "p-a")
    with open(csv, "w", encoding="utf-8") as file:
        file.write(text)
    check(cfg)
    assert "'p-a' is in ich_train and in ich_test" in caplog.text


def test_dropping_healthy_slices_is_warned_of(cfg_on, caplog):
    check(cfg_on("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "True"))
    assert "no healthy slice" in caplog.text


@pytest.mark.parametrize(
    ("file", "opts", "message"),
    [
        ("configs/none.yaml", (), "no file"),
        (EFFNET, ("MODEL.RPN.COST.ALHPA", "5"), "MODEL.RPN.COST.ALHPA"),
        (EFFNET, ("MODEL.RPN.COST.ALPHA", "much"), "command line"),
        (EFFNET, ("MODEL.RPN.COST.ALPHA",), "command line"),
    ],
)
def test_a_bad_command_line_is_named(file, opts, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_config(file, opts)


def test_a_config_that_would_run_code_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/owned']\n")
    with pytest.raises(ValueError, match="config.yaml"):
        load_config(file)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("opts", [OPEN_ANCHORS, JOINT])
def test_the_dumped_config_builds_the_same_anchors(cfg_on, tmp_path, opts):
    cfg = cfg_on(*opts)
    check(cfg)
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = load_config(file)
    fill_anchors(again)
    assert again.MODEL.ANCHOR_GENERATOR == cfg.MODEL.ANCHOR_GENERATOR


def test_ich_keys_leave_detectron2s_defaults_alone():
    stock, ours = get_cfg(), get_cfg()
    add_ich_config(ours)

    def walk(a, b, path=""):
        for key, value in a.items():
            if isinstance(value, dict):
                walk(value, b[key], f"{path}{key}.")
            else:
                assert b[key] == value, f"{path}{key}"

    walk(stock, ours)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.MAX_ITER", "0"), "SOLVER.MAX_ITER is 0, expected a number of at least 1."),
        (("SOLVER.IMS_PER_BATCH", "0"), "SOLVER.IMS_PER_BATCH is 0"),
        (("SOLVER.BASE_LR", "0.0"), "SOLVER.BASE_LR is 0.0, expected a number above 0."),
        (("SOLVER.BASE_LR", "-0.1"), "SOLVER.BASE_LR is -0.1"),
        (("SOLVER.BASE_LR", "1e999"), "SOLVER.BASE_LR is inf"),
        (("SOLVER.CHECKPOINT_PERIOD", "0"), "SOLVER.CHECKPOINT_PERIOD is 0"),
        (("DATALOADER.NUM_WORKERS", "-1"), "DATALOADER.NUM_WORKERS is -1"),
        (("TEST.BATCH_SIZE", "0"), "TEST.BATCH_SIZE is 0"),
        (("TEST.EVAL_PERIOD", "-5"), "TEST.EVAL_PERIOD is -5"),
        (("TEST.DIAGNOSIS.RESAMPLES", "0"), "TEST.DIAGNOSIS.RESAMPLES is 0"),
        (("TEST.DIAGNOSIS.THRESHOLDS", "[]"), "THRESHOLDS is [], expected one number or more"),
        (("TEST.DIAGNOSIS.THRESHOLDS", "[0.5, 1.5]"), "at least 0 and at most 1."),
        (("TEST.DIAGNOSIS.THRESHOLDS", "['a']"), "THRESHOLDS is ['a']"),
        (("TEST.DIAGNOSIS.OPERATING_THRESHOLD", "85.0"), "OPERATING_THRESHOLD is 85.0"),
        (("TEST.DIAGNOSIS.SMOOTHING", "[0.5, 0.5]"), "TEST.DIAGNOSIS.SMOOTHING: the weights are"),
        (("TEST.DIAGNOSIS.SMOOTHING", "['a']"), "expected an odd number of them"),
        (("TEST.DIAGNOSIS.SMOOTHING", "[0.25, 0.5, 0.25]"), "does not say where in its series"),
        (("INPUT.MIN_SIZE_TRAIN", "()"), "INPUT.MIN_SIZE_TRAIN is ()"),
        (("INPUT.MIN_SIZE_TRAIN", "(64, 'a')"), "INPUT.MIN_SIZE_TRAIN is (64, 'a')"),
        (("INPUT.MIN_SIZE_TEST", "-64"), "INPUT.MIN_SIZE_TEST is -64"),
        (("INPUT.AUG.EXPAND", "0"), "INPUT.AUG.EXPAND is 0"),
        (("INPUT.AUG.SHIFT", "-0.5"), "INPUT.AUG.SHIFT is -0.5"),
        (("INPUT.WINDOWS", "[['a', 'b']]"), "INPUT.WINDOWS is [['a', 'b']]"),
        (("INPUT.WINDOWS", "[]"), "INPUT.WINDOWS is []"),
        (("INPUT.WINDOWS", "[50, 100]"), "INPUT.WINDOWS is [50, 100]"),
        (("MODEL.PIXEL_MEAN", "[100.0]"), "MODEL.PIXEL_MEAN has 1 values [100.0], expected 3"),
        (("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"), "MODEL.PIXEL_STD is [1.0, 0.0, 1.0]"),
        (("MODEL.PIXEL_STD", "['a', 'b', 'c']"), "MODEL.PIXEL_STD is ['a'"),
        (("DATASETS.ICH_CLASSES", "[]"), "ICH_CLASSES is [], expected different names"),
        (("DATASETS.ICH_CLASSES", "['a', 'a']"), "ICH_CLASSES is ['a', 'a']"),
        (("DATASETS.TRAIN", "()"), "DATASETS.TRAIN is empty, expected e.g. ('ich_train',)."),
        (("DATASETS.VAL", "()"), "DATASETS.VAL is empty"),
        (("DATASETS.VAL", "(1,)"), "DATASETS.VAL is (1,), expected names"),
        (("DATASETS.TEST", "('ich_test', 'ich_test')"), "names of data sets, each once"),
        (("OUTPUT_DIR", ""), "OUTPUT_DIR is empty"),
        (("SOLVER.AMP.ENABLED", "True"), "which needs a GPU"),
        (("TEST.DIAGNOSIS.PATIENCE", "2", "TEST.EVAL_PERIOD", "0"), "set a period, or PATIENCE 0"),
    ],
)
def test_values_that_crash_later_or_do_nothing_are_refused_first(cfg_on, tmp_path, opts, message):
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as error:
        check(cfg_on(*opts))
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "opts", "message"),
    [
        (EFFNET, ("SOLVER.BASE_LR", "abc"), "SOLVER.BASE_LR"),
        (EFFNET, ("INPUT.WINDOWS", "50"), "INPUT.WINDOWS"),
        (EFFNET, ("DATASETS.TRAIN", "ich_train"), "DATASETS.TRAIN"),
        (EFFNET, ("SOLVER.MAX_ITER", "10.5"), "SOLVER.MAX_ITER"),
        (EFFNET, ("MODEL", "5"), "MODEL"),
        (EFFNET, ("MODEL.RPN.COST.ALPHA.X", "5"), "MODEL.RPN.COST.ALPHA.X"),
    ],
)
def test_a_wrong_type_is_one_sentence(file, opts, message):
    with pytest.raises(ValueError, match=r"^command line, KEY VALUE pairs: [^\n]+\.$") as error:
        load_config(file, opts)
    assert message in str(error.value)


BEST = "TEST.DIAGNOSIS.BEST_METRIC"
TWO = ("DATASETS.VAL", "('ich_val', 'ich_test')")
CLASSIFIER = {"config": "classifier_effnet_lite0.yaml"}


@pytest.mark.parametrize(
    ("opts", "config", "likely"),
    [
        ((BEST, "diagnosis/imageauc"), {}, "diagnosis/image_auc"),
        ((BEST, "bbox/AP51"), {}, "bbox/AP"),
        ((BEST, "image_auc"), {}, "diagnosis/image_auc"),
        ((BEST, "bbox/AP50"), CLASSIFIER, "diagnosis/"),
        ((BEST, "diagnosis/lesion_cpm_iou"), CLASSIFIER, "diagnosis/"),
        ((BEST, "bbox/AP-IPH"), {}, "bbox/AP"),
        (TWO, {}, "ich_val/diagnosis/image_auc"),
    ],
)
def test_a_best_metric_that_validation_does_not_give_is_refused(
    tiny_cfg, full_tree, opts, config, likely
):
    cfg = tiny_cfg("DATASETS.ICH_ROOT", str(full_tree()), *opts, **config)
    with pytest.raises(ValueError, match=r"^TEST.DIAGNOSIS.BEST_METRIC is [^\n]+\.$") as error:
        check(cfg)
    assert f"such as {likely}" in str(error.value)


@pytest.mark.parametrize(
    "opts",
    [
        (BEST, "bbox/APs"),
        (BEST, "diagnosis/patient_expected_cost"),
        (BEST, "diagnosis/lesion_voc_ap50"),
        (BEST, "bbox/AP-IPH", "DATASETS.ICH_CLASSES", "['IPH', 'SDH']"),
        (*TWO, BEST, "ich_test/bbox/AP50"),
    ],
)
def test_a_best_metric_that_validation_gives_is_taken(cfg_on, opts):
    cfg = cfg_on(*opts)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(cfg.DATASETS.ICH_CLASSES)
    check(cfg)


def test_the_names_of_metrics_are_those_that_a_validation_stores(cfg_on, tmp_path):
    from ich_det2.engine import IchTrainer

    cfg = cfg_on("DATASETS.TEST", "('ich_val',)", "DATASETS.ICH_CLASSES", "['IPH', 'SDH']")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check(cfg)
    results = IchTrainer.test(cfg, IchTrainer.build_model(cfg))
    assert set(flatten_results_dict(results)) == set(metric_names(["IPH", "SDH"]))


def test_smoothing_needs_the_places_of_what_is_scored(cfg_on, caplog):
    cfg = cfg_on("TEST.DIAGNOSIS.SMOOTHING", "[0.25, 0.5, 0.25]")
    table = Path(cfg.DATASETS.ICH_ROOT) / "patients.csv"
    places = [f"{i},p-{i},5\n" for i in "eg"]  # of validation and test
    table.write_text("".join(["image,patient,position_mm\n", *places, "f,p-f,\n", "h,p-h,3\n"]))
    check(cfg)
    assert "ich_val: the place of 1 of 2 slices is not known" in caplog.text
    assert "ich_test: the place" not in caplog.text


@pytest.mark.parametrize("key", ["SMOOTHING", "SMOOTHING_BOXES"])
def test_bad_weights_of_the_smoothing_are_named(cfg_on, key):
    with pytest.raises(ValueError, match=f"TEST.DIAGNOSIS.{key}: the weights are"):
        check(cfg_on(f"TEST.DIAGNOSIS.{key}", "[0.5, 0.5]"))


def test_smoothing_is_a_part_of_what_a_model_answers():
    before = load_config("", ["MODEL.DEVICE", "cpu"])
    now = load_config("", ["MODEL.DEVICE", "cpu", "TEST.DIAGNOSIS.SMOOTHING", "[0.2, 0.6, 0.2]"])
    now.TEST.DIAGNOSIS.COST_RATIO = 3.0
    differs = {"TEST.DIAGNOSIS.SMOOTHING": ([], [0.2, 0.6, 0.2])}
    assert change_answers(differences(before, now)) == differs
    assert not_continuable(differs) == differs


MASKS = ("MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask")


def test_a_mask_head_needs_masks(cfg_on, tmp_path, caplog):
    with pytest.raises(ValueError, match="INPUT.MASK_FORMAT 'polygon', expected 'bitmask'"):
        check(cfg_on("MODEL.MASK_ON", "True"))
    cfg = cfg_on(*MASKS)
    with pytest.raises(ValueError, match="no box of ich_train has a mask; add SegmentationObject/"):
        check(cfg)
    assert not (tmp_path / "out").exists()
    folder = Path(cfg.DATASETS.ICH_ROOT) / "SegmentationClass"
    folder.mkdir()
    Image.fromarray(np.ones((48, 64), np.uint8)).save(folder / "a.png")
    with pytest.raises(ValueError, match="1 of 2 boxes .* have no mask, .* set KnownMaskHead"):
        check(cfg)
    cfg.MODEL.ROI_MASK_HEAD.NAME = "KnownMaskHead"
    check(cfg)
    assert "1 of 2 boxes of ich_train have no mask; they teach no mask" in caplog.text
