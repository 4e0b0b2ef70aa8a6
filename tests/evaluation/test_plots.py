"""Curves are written whole, for any number of images."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ich_det2.evaluation.diagnosis import diagnosis_table
from ich_det2.evaluation.plots import PLOTTED, plot_history, plot_roc, plot_thresholds
from ich_det2.experiments.figures import plot_bars, plot_curves, plot_pictures, plot_search

LEVELS = {
    "image": (np.array([1, 0, 1, 0]), np.array([0.9, 0.4, 0.4, 0.1])),
    "patient": (np.array([1, 0]), np.array([0.9, 0.4])),
}


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figure that was saved last."""
    seen = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        seen[:] = self.axes
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def curves(ax):
    return {line.get_label(): np.array(line.get_data(), dtype=float) for line in ax.lines}


def assert_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert np.asarray(image.convert("L")).std() > 5  # not blank
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_thresholds_show_every_metric_at_each_level(tmp_path, axes):
    table = [row for k, v in LEVELS.items() for row in diagnosis_table(k, *v, [0.2, 0.5, 0.95])]
    plot_thresholds(table, 0.5, tmp_path / "t.png")
    assert_picture(tmp_path / "t.png")
    assert [ax.get_title() for ax in axes] == ["image level", "patient level"]
    for ax in axes:
        assert set(curves(ax)) == {*PLOTTED, "operating threshold"}
    # Lesions 0.9, 0.4: recall 1, 1/2, 0 at 0.2, 0.5, 0.95.
    assert curves(axes[0])["recall"].tolist() == [[0.2, 0.5, 0.95], [1, 0.5, 0]]


def test_roc_runs_from_corner_to_corner_through_hand_worked_points(tmp_path, axes):
    plot_roc(LEVELS, 0.5, tmp_path / "roc.png")
    assert_picture(tmp_path / "roc.png")
    lines = curves(axes[0])
    # Thresholds inf, 0.9, 0.4, 0.1: false alarms 0, 0, 1/2, 1; recall 0, 1/2, 1, 1.
    # AUC: 0.9 beats both, 0.4 ties one and beats one: 3.5 of 4.
    assert lines["image, AUC 0.875"].tolist() == [[0, 0, 0.5, 1], [0, 0.5, 1, 1]]
    assert lines["patient, AUC 1.000"].tolist() == [[0, 0, 1], [0, 1, 1]]
    dots = [line.get_data() for line in axes[0].lines if line.get_marker() == "o"]
    assert [(x.item(), y.item()) for x, y in dots] == [(0, 0.5), (0, 1)]


@pytest.mark.parametrize("label", [0, 1, None])
def test_one_class_or_no_image_still_gives_pictures(tmp_path, label):
    y_true = np.array([] if label is None else [label] * 3, dtype=int)
    levels = {"image": (y_true, np.linspace(0.1, 0.9, len(y_true)))}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    plot_roc(levels, 0.5, tmp_path / "a" / "roc.png")
    plot_thresholds(
        diagnosis_table("image", *levels["image"], [0.5]), 0.5, tmp_path / "b" / "t.png"
    )
    assert_picture(tmp_path / "a" / "roc.png")
    assert_picture(tmp_path / "b" / "t.png")


def test_history_shows_each_metric_over_iterations(tmp_path, axes):
    history = [
        {"iteration": 100, "diagnosis/image_auc": 0.7, "bbox/AP50": 40.0, "bbox/AP": 20.0},
        {"iteration": 200, "diagnosis/image_auc": 0.8, "bbox/AP50": 50.0},
    ]
    plot_history(history, tmp_path / "h.png")
    assert_picture(tmp_path / "h.png")
    diagnosis, boxes = (curves(ax) for ax in axes)
    assert diagnosis["diagnosis/image_auc"].tolist() == [[100, 200], [0.7, 0.8]]
    assert boxes["bbox/AP50"].tolist() == [[100, 200], [0.4, 0.5]]  # percent as fractions
    assert boxes["bbox/AP"].tolist() == [[100], [0.2]]
    assert set(diagnosis) == {"diagnosis/image_auc"}


def test_history_shows_several_data_sets(tmp_path, axes):
    keys = [f"ich_{name}/diagnosis/image_auc" for name in ("val", "other")]
    plot_history([{"iteration": 10, **dict.fromkeys(keys, 0.5)}], tmp_path / "h.png")
    assert [line.get_label() for line in axes[0].lines] == keys


def test_history_without_metrics_is_no_error(tmp_path, axes):
    plot_history([{"iteration": 100}], tmp_path / "h.png")
    assert_picture(tmp_path / "h.png")
    assert all(not ax.lines for ax in axes)


def test_bars_are_the_means_in_groups(tmp_path, axes):
    rows = [
        {"network": n, "anchors": a, "seed": seed, "test/x": value + 0.1 * seed}
        for n, a, value in (("r50", "default", 0.2), ("r50", "own", 0.4), ("vgg", "default", 0.6))
        for seed in (0, 1)
    ]
    plot_bars(rows, ["network", "anchors", "seed"], {"mAP": "test/x"}, tmp_path / "b.png")
    assert_picture(tmp_path / "b.png")
    (ax,) = axes
    default, own = ax.containers[1], ax.containers[3]  # each after its error lines
    assert [bar.get_height() for bar in default] == pytest.approx([0.25, 0.65])
    assert [bar.get_height() for bar in own] == pytest.approx([0.45, np.nan], nan_ok=True)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["r50", "vgg"]
    assert [text.get_text() for text in axes[0].figure.legends[0].get_texts()] == [
        *("anchors default", "anchors own"),
    ]


def test_a_search_shows_each_seed_the_means_and_the_pick(tmp_path, axes):
    rows = [{"alpha": a, "seed": s, "val/x": a / 100 + s} for a in (100, 1) for s in (0, 1)]
    plot_search(rows, "alpha", {"mAP": "val/x"}, 100, tmp_path / "s.png")
    assert_picture(tmp_path / "s.png")
    assert axes[0].get_xscale() == "log"
    lines = curves(axes[0])
    assert lines["seeds"].tolist() == [[1, 1, 100, 100], [0.01, 1.01, 1, 2]]
    assert lines["mean"].tolist() == [[1, 100], [0.51, 1.5]]
    assert lines["picked: 100"][0].tolist() == [100, 100]


def test_curves_have_a_line_for_each_method_and_a_band_over_seeds(tmp_path, axes):
    rows = [
        {"name": name, "threshold": t, "recall mean": 1 - t, "recall std": std}
        for name, std in (("a", 0.1), ("b", np.nan))
        for t in (0.2, 0.5)
    ]
    plot_curves(rows, ["recall"], tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    assert curves(axes[0])["a"].tolist() == [[0.2, 0.5], [0.8, 0.5]] and "b" in curves(axes[0])
    band = axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.4, 0.9))


def test_no_two_of_twenty_curves_look_alike(tmp_path, axes):
    rows = [
        {"name": f"m{i}", "threshold": t, "recall mean": t, "recall std": np.nan}
        for i in range(20)
        for t in (0.2, 0.5)
    ]
    plot_curves(rows, ["recall"], tmp_path / "c.png")
    assert len({(line.get_color(), line.get_linestyle()) for line in axes[0].lines}) == 20


def test_pictures_stand_side_by_side(tmp_path, axes):
    pictures = [np.full((40, 40, 3), value, dtype=np.uint8) for value in (0, 200)]
    titles = ("found", "missed", "odd")
    rows = [(title, pictures) for title in titles]
    plot_pictures(rows, ["one", "two"], tmp_path / "p.png")
    assert_picture(tmp_path / "p.png")
    assert len(axes) == 8  # two slices in a row
    assert [ax.get_title() for ax in axes] == [
        *(f"{name}\n{title}" for title in titles for name in ("one", "two")),
        *("", ""),
    ]
    assert [int(ax.images[0].get_array().max()) for ax in axes[:6]] == [0, 200] * 3
    assert not any(ax.axison for ax in axes)
