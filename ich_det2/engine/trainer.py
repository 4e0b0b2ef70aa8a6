"""Detectron2's trainer for head CT."""

import logging
import weakref
from collections import defaultdict

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators
from detectron2.utils import comm

from ..data.augmentation import expand_dataset
from ..data.crop import uncrop
from ..data.mapper import IchDatasetMapper
from ..data.samplers import PositiveShareSampler, image_labels
from ..evaluation.evaluator import DiagnosisEvaluator
from ..evaluation.mask_evaluator import MaskEvaluator, is_known
from .checkpoint import IchCheckpointer, for_inference
from .config import (
    has_all_masks,
    is_classifier,
    is_dynunet,
    learns_from_labels,
    reads_masks,
)
from .hooks import BestCheckpointer, DiagnosisHook, EarlyStop, EarlyStopping, FitHook
from .operating_point import choose_operating_point
from .partitions import share_images
from .report import write_reports
from .resume import ResumableLoader, seed_generators
from .run_folder import RunFolder
from .signals import StopOnSignal, shield_workers

logger = logging.getLogger(__name__)


class IchTrainer(DefaultTrainer):
    """Trains on ``DATASETS.TRAIN``, selects the model on ``DATASETS.VAL``, tests it once.

    Runs on one GPU, several, or the CPU in one or several (gloo) processes. A run that is resumed
    equals one that was never interrupted, see :mod:`ich_det2.engine.resume`.
    """

    def __init__(self, cfg):
        # DefaultTrainer.__init__ hands GPU numbers to DistributedDataParallel, which fails on the
        # CPU, and builds Detectron2's checkpointer; everything else is as there.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        cfg.defrost()
        if cfg.SEED < 0:
            cfg.SEED = int(comm.shared_random_seed())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        ddp_args = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **ddp_args)
        step = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = IchCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self._start_image: int | None = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """As ``DefaultTrainer.resume_or_load``; the data go on behind the last trained image."""
        super().resume_or_load(resume)
        if self.start_iter > 0:
            if self.cfg.DATALOADER.ASPECT_RATIO_GROUPING:
                logger.warning(
                    "DATALOADER.ASPECT_RATIO_GROUPING keeps images back between batches: the"
                    " resumed run takes them in another order than an uninterrupted one."
                )
            if self._start_image is None:  # of a checkpoint that counted batches alone
                run = RunFolder(self.cfg.OUTPUT_DIR)
                before = run.read_config() if run.config.is_file() else self.cfg
                self._start_image = self.start_iter * before.SOLVER.IMS_PER_BATCH
            self._trainer.reset_data_loader(
                lambda: self.build_train_loader(self.cfg, self.start_iter, self._start_image)
            )

    def state_dict(self) -> dict:
        done = self.iter + 1 - self.start_iter
        images = self._start_image + done * self.cfg.SOLVER.IMS_PER_BATCH
        return {**super().state_dict(), "seed": self.cfg.SEED, "images": images}

    def load_state_dict(self, state_dict: dict) -> None:
        wanted = [{**group, "params": None} for group in self.optimizer.param_groups]
        base_lrs = list(self.scheduler.base_lrs)
        super().load_state_dict(state_dict)
        # The config's, where Detectron2 goes on with the checkpoint's whatever was set.
        self.scheduler.base_lrs = base_lrs
        rates = self.scheduler.get_lr()
        for group, own, rate in zip(self.optimizer.param_groups, wanted, rates, strict=True):
            group.update({**own, "params": group["params"], "lr": rate})
        self._start_image = state_dict.get("images")
        if "seed" in state_dict:
            self.cfg.SEED = state_dict["seed"]
        else:
            logger.warning(
                "The checkpoint holds no seed: the order of the data and the random draws are not"
                " those of the interrupted run."
            )

    def train(self):
        """As ``DefaultTrainer.train``; ends early by ``TEST.DIAGNOSIS.PATIENCE``.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with a checkpoint that ``--resume`` goes on from.
        """
        validated = {row["iteration"] for row in RunFolder(self.cfg.OUTPUT_DIR).read_history()}
        if self.start_iter >= self.max_iter and self.max_iter in validated:
            logger.info(
                "Resume training from iteration %d: all are done, nothing is trained.",
                self.start_iter,
            )
            return None
        stop_on_signal = StopOnSignal(self.checkpointer)
        self.register_hooks([stop_on_signal])  # the last, behind whatever the caller registered
        try:
            with stop_on_signal.listening():
                return super().train()
        except EarlyStop as stop:
            logger.info(str(stop))
        finally:
            loader = self._trainer.data_loader
            if isinstance(loader, ResumableLoader):  # else its workers end when Python does
                loader.close()
                self._trainer.reset_data_loader(lambda: loader)

    @classmethod
    def build_train_loader(
        cls, cfg, start_iter: int = 0, start_image: int | None = None
    ) -> ResumableLoader:
        """The training loader, from an iteration and an image of the common order on.

        Args:
            cfg: config.
            start_iter: the first iteration.
            start_image: the first image; None: behind ``start_iter`` batches.
        """
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
        dataset = one_a_scan(cfg, without_unlearnable(cfg, dataset))
        dataset = expand_dataset(
            dataset,
            cfg.INPUT.AUG.EXPAND,
            shift=cfg.INPUT.AUG.EXPAND_SHIFT,
            scale=cfg.INPUT.AUG.EXPAND_SCALE,
            seed=max(cfg.SEED, 0),
        )
        # Detectron2's samplers draw a seed of their own, from NumPy's generator.
        seed_generators(cfg.SEED, "order")
        sampler = None  # as DATALOADER.SAMPLER_TRAIN names it
        if cfg.DATALOADER.SAMPLER_TRAIN == PositiveShareSampler.__name__:
            sampler = PositiveShareSampler(
                image_labels(dataset),
                cfg.DATALOADER.POSITIVE_SHARE,
                cfg.SOLVER.IMS_PER_BATCH,
                seed=int(comm.shared_random_seed()),
            )
        loader = build_detection_train_loader(
            cfg, dataset=dataset, mapper=IchDatasetMapper(cfg, is_train=True), sampler=sampler
        )
        if start_image is None:
            start_image = start_iter * cfg.SOLVER.IMS_PER_BATCH
        return ResumableLoader(
            loader, seed=cfg.SEED, start_iter=start_iter, start_image=start_image
        )

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return super().test(cfg, for_inference(model), evaluators)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        loader = build_detection_test_loader(
            cfg,
            dataset_name,
            mapper=IchDatasetMapper(cfg, is_train=False),
            batch_size=cfg.TEST.BATCH_SIZE,
        )
        return shield_workers(loader)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str):
        output_dir = RunFolder(cfg.OUTPUT_DIR).inference(dataset_name)
        truth = DatasetCatalog.get(dataset_name)
        diagnosis = DiagnosisEvaluator(
            thresholds=cfg.TEST.DIAGNOSIS.THRESHOLDS,
            operating_threshold=cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD,
            cost_ratio=cfg.TEST.DIAGNOSIS.COST_RATIO,
            patient_rule=cfg.TEST.DIAGNOSIS.PATIENT_RULES[0],
            smoothing=cfg.TEST.DIAGNOSIS.SMOOTHING,
            smoothing_iou=cfg.TEST.DIAGNOSIS.SMOOTHING_IOU,
            smoothing_boxes=cfg.TEST.DIAGNOSIS.SMOOTHING_BOXES,
            truth=truth,
            output_dir=output_dir,
        )
        if is_classifier(cfg):
            return diagnosis
        tasks, evaluators = ["bbox"], [diagnosis]
        if reads_masks(cfg):
            masks = MaskEvaluator(
                classes=MetadataCatalog.get(dataset_name).thing_classes,
                threshold=cfg.TEST.DIAGNOSIS.OPERATING_THRESHOLD,
                truth=truth,
                smoothing=cfg.TEST.DIAGNOSIS.SMOOTHING_BOXES or cfg.TEST.DIAGNOSIS.SMOOTHING,
                smoothing_iou=cfg.TEST.DIAGNOSIS.SMOOTHING_IOU,
                output_dir=output_dir,
            )
            evaluators.append(masks)
        if cfg.MODEL.MASK_ON and has_all_masks(truth):
            tasks.append("segm")
        coco = COCOEvaluator(
            dataset_name,
            tasks=tasks,
            output_dir=str(output_dir),
            # Detectron2 from a package index has no compiled ops.
            use_fast_impl=False,
            allow_cached_coco=False,
        )
        return _Evaluators([coco, *evaluators])

    def build_hooks(self) -> list:
        cfg = with_datasets(self.cfg, self.cfg.DATASETS.VAL)
        validate = DiagnosisHook(
            cfg.TEST.EVAL_PERIOD, lambda: self.test(cfg, self.model), cfg.OUTPUT_DIR
        )
        # DefaultTrainer evaluates DATASETS.TEST there; the test patients are kept for the end.
        own, best, period = [validate], None, cfg.TEST.EVAL_PERIOD
        if comm.is_main_process():
            best = BestCheckpointer(period, self.checkpointer, cfg.TEST.DIAGNOSIS.BEST_METRIC)
            own.append(best)
        if cfg.TEST.DIAGNOSIS.PATIENCE > 0:
            own.append(EarlyStopping(period, cfg.TEST.DIAGNOSIS.PATIENCE, best))
        built = [
            replacement
            for hook in super().build_hooks()
            for replacement in (own if isinstance(hook, hooks.EvalHook) else [hook])
        ]
        model = self.checkpointer.model  # without the wrapper of several processes
        if getattr(model, "needs_fit", False):
            train, periods = list(cfg.DATASETS.TRAIN), (period, cfg.SOLVER.CHECKPOINT_PERIOD)
            fit = FitHook(model, periods, lambda: self.build_test_loader(cfg, train))
            built.insert(1, fit)  # behind the timer, ahead of what saves and validates
        return built

    def test_best(self) -> dict:
        """Evaluates the best model by validation on ``DATASETS.TEST``, once.

        Before that its operating point is chosen on ``DATASETS.VAL`` and written beside it.

        Returns:
            The nested metrics, on the main process.
        """
        comm.synchronize()
        best = RunFolder(self.cfg.OUTPUT_DIR).best
        logger.info(f"Testing the best model by validation, {best}.")
        self.checkpointer.load(str(best), checkpointables=[])
        cfg, point = self.cfg.clone(), None
        cfg.defrost()
        if share_images(cfg.DATASETS.VAL, cfg.DATASETS.TEST):
            logger.warning(
                "DATASETS.VAL is tested on too: no operating point is chosen on it,"
                " OPERATING_THRESHOLD is used."
            )
        else:
            self.test(with_datasets(cfg, cfg.DATASETS.VAL), self.model)
            if comm.is_main_process():
                point = choose_operating_point(cfg, best)
        results = self.test(cfg, self.model)
        if comm.is_main_process():
            write_reports(cfg, point)
        return results


def without_unlearnable(cfg, dataset: list[dict]) -> list[dict]:
    """Leaves out slices with hemorrhage but no boxes where they would be taken as background; those
    with a box but no mask of it, where a model learns from masks alone.

    Args:
        cfg: config of the training.
        dataset: dataset dicts, with "image_label" or without.
    """
    if is_dynunet(cfg):
        kept, lacking, remedy = [d for d in dataset if is_known(d)], "not all of it has masks", ""
    elif learns_from_labels(cfg):
        return dataset
    else:
        kept = [d for d in dataset if d.get("annotations") or not d.get("image_label")]
        lacking = "no boxes"
        remedy = " With MODEL.META_ARCHITECTURE DiagnosisRCNN its image head learns from them."
    if number := len(dataset) - len(kept):
        said = "%d training slices have hemorrhage, but %s: they are left out.%s"
        logger.warning(said, number, lacking, remedy)
    return kept


def one_a_scan(cfg, dataset: list[dict]) -> list[dict]:
    """Of each scan its first slice alone, labelled by whether any bleeds, where scans are trained.

    Args:
        cfg: config of the training.
        dataset: dataset dicts, with "scan_files".
    """
    if not cfg.INPUT.SCAN_SLICES:
        return dataset
    scans = defaultdict(list)
    for d in dataset:
        scans[tuple(d.get("scan_files", d["file_name"]))].append(d)
    return [
        {**of[0], "image_label": int(any(d.get("image_label", d["annotations"]) for d in of))}
        for of in scans.values()
    ]


class _Evaluators(DatasetEvaluators):
    """Evaluators that see boxes on whole slices."""

    def process(self, inputs, outputs):
        super().process(inputs, uncrop(inputs, outputs))


def with_datasets(cfg, names):
    """A copy of a config that tests on these datasets."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = names
    return cfg
