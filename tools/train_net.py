#!/usr/bin/env python
"""Trains, validates and tests a detector or classifier on head CT; Detectron2's own command line.

    python tools/train_net.py --config-file configs/csfrcnn_r50.yaml DATASETS.ICH_ROOT my/data
    python tools/train_net.py --config-file output/csfrcnn_r50/config.yaml --eval-only \\
        MODEL.WEIGHTS output/csfrcnn_r50/model_best.pth

In OUTPUT_DIR: config.yaml and run.json, what the model is trained with, the anchors too;
model_best.pth by validation, model_final.pth, operating_point.json (the threshold, chosen on
validation), metrics.json and TensorBoard events, diagnosis_history.csv and .png, and for each
dataset inference/<dataset>/ with report.html, report.json, image_scores.csv, lesions.csv,
diagnosis_thresholds.csv, diagnosis.json, coco_instances_results.json and the curves. An evaluation
with other settings or data than the record's is written to OUTPUT_DIR/what_if/<name>/.

Ctrl-C and SIGTERM save a checkpoint; the same command with --resume goes on from it, also with
another schedule or batch. Without a GPU, --num-gpus N runs N processes on the CPU.

torchrun and srun (SLURM) start it too, then without --num-gpus: rank and number of the processes
are the environment's. With --resume from the start, a job that is started again goes on:

    torchrun --nproc-per-node 8 --max-restarts 3 tools/train_net.py --resume --config-file ...
    srun --ntasks-per-node 8 --gpus-per-node 8 python tools/train_net.py --resume --config-file ...
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from ich_det2.cli import (
    guard,
    keep_freed_memory,
    log_to_terminal,
    quiet_imports,
    silence_libraries,
)

with quiet_imports():
    import torch
    from detectron2.engine import default_argument_parser, launch
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm
    from detectron2.utils.collect_env import collect_env_info
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.logger import setup_logger
    from torch.multiprocessing import ProcessExitedException

    from ich_det2.data import register_ich_datasets
    from ich_det2.data.datasets import fingerprints
    from ich_det2.engine import IchCheckpointer, IchTrainer
    from ich_det2.engine.checks import check_config, check_processes
    from ich_det2.engine.config import dataset_settings, load_config
    from ich_det2.engine.launched import Launched
    from ich_det2.engine.operating_point import find_operating_point
    from ich_det2.engine.partitions import names_of
    from ich_det2.engine.report import write_reports
    from ich_det2.engine.run_folder import RunFolder
    from ich_det2.engine.signals import Interrupted, interrupts, on_signals


def train(args, cfg, stopped=None) -> dict:
    """Trains and tests, or only tests, in each of the launched processes.

    Args:
        args: of Detectron2's command line.
        cfg: checked and complete.
        stopped: takes the number of the signal that ended the training.
    """
    silence_libraries()
    if stopped is not None:  # Ctrl-C ends a launched process without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Spawned processes start with empty registries of data.
    register_ich_datasets(cfg.DATASETS.ICH_ROOT, cfg.DATASETS.ICH_CLASSES, **dataset_settings(cfg))
    if args.eval_only:
        return evaluate(args, cfg)
    run = RunFolder(cfg.OUTPUT_DIR)
    resume = args.resume and run.checkpoint() is not None
    with interrupts() if stopped is None else contextlib.nullcontext():
        if comm.is_main_process() and not resume:
            run.begin(cfg, fingerprints(names_of(cfg)))
        comm.synchronize()
        set_up(args, cfg)
        trainer = IchTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        if comm.is_main_process() and resume:
            run.note_resumed(cfg, trainer.start_iter)
    try:
        trainer.train()
    except Interrupted as stop:
        if stopped is None:
            raise
        stopped.value = stop.number
        return {}
    return trainer.test_best()


def evaluate(args, cfg) -> dict:
    """Tests trained weights."""
    trained = RunFolder.beside(cfg.MODEL.WEIGHTS)
    set_up(args, cfg)
    model = IchTrainer.build_model(cfg)
    IchCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    given, cfg = cfg, cfg.clone()
    cfg.defrost()
    point = find_operating_point(cfg, Path(cfg.MODEL.WEIGHTS))
    if comm.is_main_process():
        data = fingerprints(cfg.DATASETS.TEST)
        differs = trained.answers_differ(given, data)
        RunFolder(cfg.OUTPUT_DIR).begin_evaluation(given, data, differs, point)
    comm.synchronize()
    results = IchTrainer.test(cfg, model)
    if comm.is_main_process():
        write_reports(cfg, point, trained, differs)
        verify_results(cfg, results)
    return results


def set_up(args, cfg) -> None:
    """As Detectron2's ``default_setup``, but for config.yaml, which is the run's record."""
    keep_freed_memory()
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    rank = comm.get_rank()
    for name in ("fvcore", "ich_det2", "detectron2"):
        logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name)
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info("Environment info:\n" + collect_env_info())
    logger.info(f"Command line arguments: {args}")
    logger.info(f"Running with full config:\n{cfg.dump()}")
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    # Its overhead is large for an evaluation.
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not args.eval_only


def run(args) -> int:
    """Checks everything, then launches the processes; returns the exit code.

    Raises:
        FileNotFoundError, ValueError: one sentence with the remedy.
    """
    launched = Launched.from_environment()
    is_first = launched is None or launched.rank == 0
    processes = args.num_gpus * args.num_machines if launched is None else launched.world_size
    with log_to_terminal() if is_first else contextlib.nullcontext():
        check_processes(args.num_gpus, args.num_machines, args.machine_rank, launched)
        cfg = load_config(args.config_file, args.opts)
        if not (args.resume or args.eval_only):
            RunFolder(cfg.OUTPUT_DIR).check_free()
        check_config(cfg, eval_only=args.eval_only, resume=args.resume, num_processes=processes)
    cfg.freeze()
    try:
        if launched is not None:
            launched.join()  # behind the checks of all, and before anything is written
            train(args, cfg)
        elif processes == 1:
            train(args, cfg)
        else:
            launch_all(args, cfg)
    except KeyboardInterrupt as stop:  # Interrupted, or Ctrl-C outside of the training itself
        number = getattr(stop, "number", signal.SIGINT)
        if args.eval_only:
            left = "the evaluation is not complete."
        elif RunFolder(cfg.OUTPUT_DIR).checkpoint() is not None:
            left = (
                f"{cfg.OUTPUT_DIR} holds a checkpoint, and the same command with --resume goes on"
                " from it."
            )
        else:
            left = "nothing was trained yet."
        if is_first:
            name = signal.Signals(number).name
            print(f"train_net.py: stopped by {name}; {left}", file=sys.stderr)
        return 128 + number
    return 0


def launch_all(args, cfg) -> None:
    """Runs :func:`train` in several processes.

    Raises:
        Interrupted: if a signal ended the training.
    """
    # The processes have handlers of their own; a signal to this one alone is passed on.
    stopped, received = multiprocessing.get_context("spawn").Value("i", 0), []

    def pass_on(number: int) -> None:
        received.append(number)
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)

    with on_signals(pass_on):
        try:
            launch(
                train,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args, cfg, stopped),
            )
        except ProcessExitedException:  # by a signal before there was anything to save
            if not received:
                raise
    if stopped.value or received:
        raise Interrupted(stopped.value or received[0])


def main(argv=None) -> int:
    args = default_argument_parser(epilog=__doc__).parse_args(argv)
    return guard("train_net.py", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
