"""Best checkpoint and history: what a run keeps, also over --resume."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from ich_det2.engine import BestCheckpointer, DiagnosisHook, IchCheckpointer
from ich_det2.engine.hooks import EarlyStop, EarlyStopping, FitHook

METRIC = "diagnosis/image_auc"


def run(tmp_path, values, start_iter=0, period=10):
    """Feeds validation values, one every 10 iterations; returns the hook."""
    checkpointer = IchCheckpointer(nn.Linear(1, 1), str(tmp_path))
    hook = BestCheckpointer(period, checkpointer, METRIC)
    hook.trainer = SimpleNamespace(start_iter=start_iter, max_iter=1000, iter=start_iter)
    with EventStorage(start_iter) as storage:
        hook.trainer.storage = storage
        hook.before_train()
        for n, value in enumerate(values):
            hook.trainer.iter = storage.iter = start_iter + (n + 1) * period - 1
            storage.put_scalar(METRIC, value, smoothing_hint=False)
            hook.after_step()
    return hook


def record(tmp_path):
    return json.loads((tmp_path / "model_best.json").read_text())


class Fitted(nn.Linear):
    """Notes when it is fitted, whether it was in training then, and to what."""

    def embed(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        return self(torch.tensor([[x["image"]] for x in batch]))

    def fit(self, features, labels, groups):
        self.seen.append((self.training, features.shape, labels.tolist(), groups))


def test_a_model_is_fitted_before_each_validation_and_checkpoint_and_at_the_end():
    model, seen = Fitted(1, 1), {}
    slices = [
        {"image": 1.0, "image_label": 1, "file_name": "a", "patient_id": "p"},
        {"image": 2.0, "image_label": 0, "file_name": "b"},
    ]
    batches = [slices]
    hook = FitHook(model, (3, 0, 4), lambda: batches)
    for i in range(7):
        model.seen = []
        hook.trainer = SimpleNamespace(iter=i, max_iter=7)
        hook.after_step()
        seen[i + 1] = model.seen
    once = [(True, (2, 1), [1, 0], ("p", "b"))]
    assert seen == {1: [], 2: [], 3: once, 4: once, 5: [], 6: once, 7: once}


def test_the_largest_value_is_kept_and_a_tie_goes_to_the_later(tmp_path):
    run(tmp_path, [0.7, 0.9, 0.9, 0.8])
    assert record(tmp_path) == {"metric": METRIC, "value": 0.9, "iteration": 29}


def test_after_the_last_iteration_the_record_is_of_that_iteration(tmp_path):
    hook = run(tmp_path, [0.7])
    hook.trainer.max_iter = 20
    with EventStorage(20) as hook.trainer.storage:
        hook.trainer.iter = 20  # as TrainerBase.train leaves it
        hook.trainer.storage.put_scalar(METRIC, 0.8, smoothing_hint=False)
        hook.after_train()
    assert record(tmp_path)["iteration"] == 19


def test_the_record_survives_resume(tmp_path):
    run(tmp_path, [0.9])
    weights = (tmp_path / "model_best.pth").read_bytes()
    assert run(tmp_path, [0.8], start_iter=10).best_metric == 0.9
    assert (tmp_path / "model_best.pth").read_bytes() == weights
    assert record(tmp_path)["iteration"] == 9
    run(tmp_path, [0.95], start_iter=20)
    assert record(tmp_path)["value"] == 0.95
    assert (tmp_path / "model_best.pth").read_bytes() != weights


def test_a_new_run_in_the_same_folder_does_not_believe_the_old_record(tmp_path):
    run(tmp_path, [0.9])
    run(tmp_path, [0.6], start_iter=0)
    assert record(tmp_path)["value"] == 0.6


def test_an_undefined_metric_leaves_a_model_and_any_number_beats_it(tmp_path):
    run(tmp_path, [math.nan])
    assert (tmp_path / "model_best.pth").is_file()
    assert not (tmp_path / "model_best.json").exists()
    run(tmp_path, [math.nan, 0.1, math.nan])
    assert record(tmp_path)["value"] == 0.1


def test_a_metric_that_no_validation_gives_is_named(tmp_path):
    hook = BestCheckpointer(10, IchCheckpointer(nn.Linear(1, 1), str(tmp_path)), "bbox/AP51")
    with EventStorage(0) as storage:
        storage.put_scalar("bbox/AP50", 1.0)
        hook.trainer = SimpleNamespace(storage=storage, iter=9, max_iter=100)
        with pytest.raises(ValueError, match=r"bbox/AP51.*bbox/AP50"):
            hook.after_step()


def history(tmp_path):
    with open(tmp_path / "diagnosis_history.csv", newline="") as file:
        return list(csv.DictReader(file))


def validate(tmp_path, start_iter, values):
    values = iter(values)
    hook = DiagnosisHook(10, lambda: {"diagnosis": {"image_auc": next(values)}}, tmp_path)
    with EventStorage(start_iter) as storage:
        hook.trainer = SimpleNamespace(start_iter=start_iter, max_iter=40, storage=storage)
        hook.before_train()
        for i in range(start_iter, 40):
            hook.trainer.iter = storage.iter = i
            hook.after_step()
        hook.trainer.iter = storage.iter = 40  # as TrainerBase.train leaves it
        hook.after_train()
        assert storage.latest()[METRIC][0] == pytest.approx(float(history(tmp_path)[-1][METRIC]))


def test_history_has_each_validation_once_also_after_resume(tmp_path):
    validate(tmp_path, 0, [0.5, 0.6, 0.7, 0.8])
    assert [row["iteration"] for row in history(tmp_path)] == ["10", "20", "30", "40"]
    # Resumed from the checkpoint of iteration 20: what came later is measured anew.
    validate(tmp_path, 20, [0.75, 0.85])
    rows = [(float(r["iteration"]), float(r[METRIC])) for r in history(tmp_path)]
    assert rows == [(10, 0.5), (20, 0.6), (30, 0.75), (40, 0.85)]
    assert (tmp_path / "diagnosis_history.png").stat().st_size > 1000


def test_of_a_cost_the_smallest_is_kept(tmp_path):
    checkpointer = IchCheckpointer(nn.Linear(1, 1), str(tmp_path))
    hook = BestCheckpointer(10, checkpointer, "diagnosis/patient_expected_cost")
    hook.trainer = SimpleNamespace(start_iter=0, max_iter=1000, iter=0)
    with EventStorage(0) as storage:
        hook.trainer.storage = storage
        for n, value in enumerate([0.8, 0.3, 0.5]):
            hook.trainer.iter = storage.iter = (n + 1) * 10 - 1
            storage.put_scalar(hook._val_metric, value, smoothing_hint=False)
            hook.after_step()
    assert record(tmp_path)["value"] == 0.3 and record(tmp_path)["iteration"] == 19


@pytest.mark.parametrize(
    ("patience", "stopped"),
    [(1, 29), (2, 59), (5, None)],
)
def test_training_stops_after_validations_without_a_better_one(tmp_path, patience, stopped):
    values = [0.7, 0.8, 0.6, 0.9, 0.85, 0.7, 0.6, 0.5]
    best = BestCheckpointer(10, IchCheckpointer(nn.Linear(1, 1), str(tmp_path)), METRIC)
    hook = EarlyStopping(10, patience, best)
    trainer = SimpleNamespace(start_iter=0, max_iter=1000, iter=0)
    best.trainer = hook.trainer = trainer
    at = None
    with EventStorage(0) as storage:
        trainer.storage = storage
        for n, value in enumerate(values):
            trainer.iter = storage.iter = (n + 1) * 10 - 1
            storage.put_scalar(METRIC, value, smoothing_hint=False)
            best.after_step()
            try:
                hook.after_step()
            except EarlyStop:
                at = trainer.iter
                break
    # Bests at 9, 19, 39: one validation without at 29; two at 59; never five.
    assert at == stopped
