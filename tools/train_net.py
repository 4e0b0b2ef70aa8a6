#!/usr/bin/env python
"""Trains, validates and tests a detector or classifier on head CT; Detectron2's own command line.

    python tools/train_net.py --config-file configs/csfrcnn_r50.yaml DATASETS.ICH_ROOT my/data
    python tools/train_net.py --config-file output/csfrcnn_r50/config.yaml --eval-only \\
        MODEL.WEIGHTS output/csfrcnn_r50/model_best.pth

In OUTPUT_DIR: config.yaml with the anchors used, model_best.pth by validation, model_final.pth,
operating_point.json (the threshold, chosen on validation), metrics.json and TensorBoard events,
diagnosis_history.csv and .png, and for each dataset inference/<dataset>/ with report.html,
report.json, image_scores.csv, lesions.csv, diagnosis_thresholds.csv, diagnosis.json,
coco_instances_results.json and the curves. Without a GPU, --num-gpus N runs N processes on the CPU.
"""

import sys
from pathlib import Path

from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ich_det2.cli import log_to_terminal
from ich_det2.data import register_ich_datasets
from ich_det2.engine import IchCheckpointer, IchTrainer
from ich_det2.engine.checks import check_config
from ich_det2.engine.config import context_settings, load_config
from ich_det2.engine.operating_point import check_operating_point, find_operating_point
from ich_det2.engine.report import write_reports


def train(args, cfg) -> dict:
    """Trains and tests, or only tests, in each of the launched processes."""
    # Spawned processes start with empty registries of data.
    register_ich_datasets(cfg.DATASETS.ICH_ROOT, cfg.DATASETS.ICH_CLASSES, **context_settings(cfg))
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="ich_det2")
    if args.eval_only:
        model = IchTrainer.build_model(cfg)
        checkpointer = IchCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        if args.resume and checkpointer.has_checkpoint():
            weights = checkpointer.get_checkpoint_file()
        else:
            weights = cfg.MODEL.WEIGHTS
        cfg.defrost()
        point = find_operating_point(cfg, Path(weights))
        results = IchTrainer.test(cfg, model)
        if comm.is_main_process():
            write_reports(cfg, point)
            verify_results(cfg, results)
        return results
    trainer = IchTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return trainer.test_best()


def main(argv=None) -> int:
    args = default_argument_parser(epilog=__doc__).parse_args(argv)
    num_processes = args.num_gpus * args.num_machines
    try:
        with log_to_terminal():
            cfg = load_config(args.config_file, args.opts)
            check_operating_point(cfg)
            check_config(
                cfg, eval_only=args.eval_only, resume=args.resume, num_processes=num_processes
            )
    except (FileNotFoundError, ValueError) as error:
        print(f"train_net.py: error: {error}", file=sys.stderr)
        return 2
    cfg.freeze()
    launch(
        train,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args, cfg),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
