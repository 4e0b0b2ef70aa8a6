"""Hooks that fit, validate the diagnosis during training, and keep the best model."""

import itertools
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from detectron2.engine import hooks
from detectron2.evaluation import inference_context
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..evaluation.plots import plot_history
from ..files import write_atomically, write_csv
from .run_folder import RunFolder

LOWER_IS_BETTER = ("expected_cost", "_fp", "_fn", "volume_error")
"""Ends of the names of metrics whose smallest value is the best."""


class FitHook(hooks.HookBase):
    """Fits what a model does not learn by gradients, such as a support vector machine.

    Before each validation and checkpoint the model's ``fit`` gets what its ``embed`` says of each
    training slice, as it is, without augmentation, the labels and the patients. Every process sees
    its share of the slices, and fits the same to all of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        periods: Sequence[int],
        build_loader: Callable[[], Iterable[list[dict]]],
    ):
        """
        Args:
            model: with ``embed`` and ``fit``, as ``ImageClassifier`` has them.
            periods: iterations between validations and between checkpoints, 0 for none; it also
                fits after the last iteration.
            build_loader: gives a loader of this process's share of the training set, in order.
        """
        self._model, self._periods, self._build_loader = model, periods, build_loader

    def after_step(self):
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter or any(p > 0 and done % p == 0 for p in self._periods):
            self._fit()

    def _fit(self) -> None:
        share = []
        with inference_context(self._model), torch.no_grad():
            for batch in self._build_loader():
                features = self._model.embed(batch).float().cpu()
                patients = (x.get("patient_id", x["file_name"]) for x in batch)
                share += zip(features, [x["image_label"] for x in batch], patients)
        features, labels, patients = zip(*itertools.chain(*comm.all_gather(share)))
        self._model.fit(torch.stack(features), torch.tensor(labels), patients)
        logging.getLogger(__name__).info("Fitted to %d training slices.", len(labels))


class DiagnosisHook(hooks.EvalHook):
    """Validates every ``eval_period`` iterations and after the last one.

    The metrics go to the event storage (TensorBoard), and their course to the history in the run's
    folder, as a table and a figure.
    """

    def __init__(self, eval_period: int, eval_function, output_dir: str | Path):
        """
        Args:
            eval_period: iterations; 0 validates after the last one only.
            eval_function: returns a nested dict of metrics, as an evaluator does.
            output_dir: OUTPUT_DIR.
        """
        super().__init__(eval_period, lambda: self._record(eval_function()))
        self._run = RunFolder(output_dir)
        self._history: dict[int, dict] = {}

    def before_train(self):
        if self.trainer.start_iter > 0 and comm.is_main_process():
            rows = self._run.read_history()
            self._history = {
                row["iteration"]: row for row in rows if row["iteration"] <= self.trainer.start_iter
            }

    def _record(self, results: dict) -> dict:
        if comm.is_main_process() and results:
            # After the last iteration the trainer's counter stands one further.
            done = min(self.trainer.iter + 1, self.trainer.max_iter)
            self._history[done] = {"iteration": done, **flatten_results_dict(results)}
            rows = list(self._history.values())
            self._run.path.mkdir(parents=True, exist_ok=True)
            fields = list(dict.fromkeys(key for row in rows for key in row))
            write_csv(self._run.history, fields, rows)
            plot_history(rows, self._run.history_figure)
        return results


class BestCheckpointer(hooks.BestCheckpointer):
    """Keeps the model with the best validation metric.

    The largest value is the best, but for a cost. Unlike Detectron2's, a tie goes to the later
    model (trained longer at equal quality), the best value survives ``--resume``, and where that
    goes on stays as it is.
    """

    def __init__(self, eval_period: int, checkpointer, val_metric: str):
        """
        Args:
            eval_period: iterations, as :class:`DiagnosisHook`'s.
            checkpointer: an ``IchCheckpointer``.
            val_metric: e.g. "diagnosis/image_auc", "bbox/AP50" or
                "diagnosis/patient_expected_cost".
        """
        run = RunFolder(checkpointer.save_dir)
        super().__init__(eval_period, checkpointer, val_metric, file_prefix=run.best.stem)
        self._sign = -1 if val_metric.endswith(LOWER_IS_BETTER) else 1
        self._record = run.best_value

    def before_train(self):
        if self.trainer.start_iter > 0 and self._record.is_file():
            record = json.loads(self._record.read_text())
            if record["metric"] == self._val_metric:
                self.best_metric, self.best_iter = record["value"], record["iteration"]

    def _best_checking(self):
        logger = logging.getLogger(__name__)
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            known = sorted(k for k in self.trainer.storage.latest() if "/" in k)
            raise ValueError(
                f"TEST.DIAGNOSIS.BEST_METRIC is '{self._val_metric}', but the validation gave"
                f" {known}."
            )
        value, iteration = latest[0], min(latest[1], self.trainer.max_iter - 1)
        finite = math.isfinite(value)
        worse = not finite or self._sign * value < self._sign * (self.best_metric or 0.0)
        if self.best_metric is not None and worse:
            logger.info(
                f"{self._val_metric} {value:.4f} is not better than the best,"
                f" {self.best_metric:.4f} at iteration {self.best_iter + 1}."
            )
            return
        # An undefined metric still leaves something to diagnose with; any number beats it.
        logger.info(f"{self._val_metric} {value:.4f} is the best so far.")
        self._checkpointer.save(self._file_prefix, tag_last=False, iteration=iteration)
        if finite:
            self.best_metric, self.best_iter = value, iteration
            record = {"metric": self._val_metric, "value": value, "iteration": iteration}
            with write_atomically(self._record) as file:
                json.dump(record, file)


class EarlyStop(BaseException):
    """Ends a training in good order; no ``Exception``, which Detectron2 logs as a failure."""


class EarlyStopping(hooks.HookBase):
    """Stops when the best validation metric has not improved for a while, on all ranks at once.

    A tie counts as an improvement, as in :class:`BestCheckpointer`, whose record, which survives
    ``--resume``, is all the state there is.
    """

    def __init__(self, eval_period: int, patience: int, best: BestCheckpointer | None):
        """
        Args:
            eval_period: iterations between validations.
            patience: validations without improvement after which to stop.
            best: on the main process; None elsewhere. Runs before this hook.
        """
        self._eval_period, self._patience, self._best = eval_period, patience, best

    def after_step(self):
        done = self.trainer.iter + 1
        if not self._eval_period or done % self._eval_period or done >= self.trainer.max_iter:
            return
        stop = False
        if self._best is not None and self._best.best_iter is not None:
            # The last validations that were no better.
            stop = done - (self._best.best_iter + 1) >= self._patience * self._eval_period
        if any(comm.all_gather(stop)):
            raise EarlyStop(
                f"No better validation in {self._patience} of them: stopped at iteration {done}."
            )
