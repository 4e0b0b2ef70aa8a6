"""Predictions read from files, and the page made of them."""

import json
import re

import numpy as np
import pytest

from ich_det2.evaluation.analysis import Settings, analyse, compare
from ich_det2.evaluation.evaluator import write_evaluation
from ich_det2.evaluation.intervals import wilson_by_group, wilson_interval
from ich_det2.evaluation.operating_point import OperatingPoint, Rule
from ich_det2.evaluation.predictions import Predictions, read_predictions
from ich_det2.evaluation.report import Model, worst_cases, write_report

SETTINGS = Settings([0.25, 0.5], 0.5, patient_rules=("any", "at_least_2"), n_resamples=50)


def make(seed=0, n=24, label=None, boxes=True):
    """Six patients of four images; every other patient bleeds, with a box on two of them."""
    rng = np.random.default_rng(seed)
    patients = [f"p{i // 4}" for i in range(n)]
    labels = np.array([(i // 4) % 2 * (i % 2) if label is None else label for i in range(n)])
    scores = np.clip(0.3 * labels + 0.7 * rng.random(n), 0, 1)
    ids = [f"image_{i:02}" for i in range(n)]
    if not boxes:
        return Predictions(ids, patients, ids, labels, scores)
    true = [np.array([[4.0, 4, 10, 10]] * y).reshape(-1, 4) for y in labels]
    predicted = [np.array([[s, 5, 4, 10, 10], [s / 2, 20, 20, 6, 6]]) for s in scores]
    types = [["EDH" if i % 4 == 1 else "SAH"] * y for i, y in enumerate(labels)]
    return Predictions(ids, patients, ids, labels, scores, predicted, true, types)


def coco_files(folder, predictions):
    images = [{"id": i, "file_name": i, "patient_id": p, "width": 40, "height": 40}
              for i, p in zip(predictions.image_ids, predictions.patients)]  # fmt: skip
    names = {"EDH": 1, "SAH": 2}
    truth = {
        "images": images,
        "categories": [{"id": v, "name": k} for k, v in names.items()],
        "annotations": [
            {"id": n, "image_id": i, "category_id": names[t], "bbox": b.tolist(), "area": 100,
             "iscrowd": 0}
            for n, (i, b, t) in enumerate(
                (i, b, t)
                for i, rows, types in zip(
                    predictions.image_ids, predictions.true_boxes, predictions.types
                )
                for b, t in zip(rows, types)
            )
        ],
    }  # fmt: skip
    results = [
        {"image_id": i, "category_id": 1, "bbox": b[1:].tolist(), "score": float(b[0])}
        for i, rows in zip(predictions.image_ids, predictions.boxes)
        for b in rows
    ]
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "coco_instances_results.json").write_text(json.dumps(results))
    return folder / "truth.json", folder / "coco_instances_results.json"


def assert_same(a, b):
    assert (a.image_ids, a.patients, a.types) == (b.image_ids, b.patients, b.types)
    np.testing.assert_allclose(a.scores, b.scores)
    assert (a.labels == b.labels).all()
    for mine, other in ((a.boxes, b.boxes), (a.true_boxes, b.true_boxes)):
        assert all((x == y).all() for x, y in zip(mine, other, strict=True))


# ---- predictions -------------------------------------------------------------------------------


def test_what_an_evaluation_wrote_reads_back_the_same(tmp_path):
    predictions = make()
    write_evaluation(tmp_path, predictions, SETTINGS)
    coco_files(tmp_path, predictions)
    assert_same(read_predictions(tmp_path), predictions)
    alone = read_predictions(tmp_path / "image_scores.csv")
    assert alone.boxes is None and (alone.scores == predictions.scores).all()


def test_coco_results_of_any_detector_are_enough(tmp_path):
    predictions = make()
    truth, results = coco_files(tmp_path, predictions)
    assert_same(read_predictions(results, truth=truth), predictions)
    (tmp_path / "patients.csv").write_text("image,patient\nimage_00,other\n")
    read = read_predictions(results, truth=truth, patients=tmp_path / "patients.csv")
    assert read.patients[:2] == ["other", "p0"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "hold no image"),
        ("a,a,p,1,0.5\na,a,p,1,0.5\n", "'a' is there 2 times"),
        ("a,a,p,1,nan\n", "score of image 'a' is NaN"),
        ("a,a,p,1,high\n", "could not convert string to float: 'high'"),
        ("a,a,p,2,0.5\n", "label is 2, expected 0 or 1"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, rows, message):
    path = tmp_path / "image_scores.csv"
    path.write_text(f"image_id,file_name,patient_id,label,score\n{rows}")
    with pytest.raises(ValueError, match=rf"image_scores\.csv: .*{re.escape(message)}"):
        read_predictions(path)


def test_a_missing_file_or_column_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; expected a folder"):
        read_predictions(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no image_scores\.csv"):
        read_predictions(tmp_path)
    (tmp_path / "image_scores.csv").write_text("image_id,score\na,0.5\n")
    with pytest.raises(ValueError, match="has no column file_name, patient_id, label"):
        read_predictions(tmp_path)
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match="give --truth too"):
        read_predictions(tmp_path / "r.json")


# ---- analysis ----------------------------------------------------------------------------------


def test_analysis_holds_every_part():
    result = analyse(make(), SETTINGS, temperature=2.0)
    assert (result["n_images"], result["n_patients"]) == (24, 6)
    assert [len(result["levels"][k]["wilson"]) for k in ("image", "patient")] == [5, 5]
    how = result["intervals"]
    assert (how["n_resamples"], how["seed"]) == (SETTINGS.n_resamples, SETTINGS.seed)
    assert set(result["patient_rules"]) == {"any", "at_least_2"}
    assert result["types"]["image"]["EDH"]["n"] == result["types"]["image"]["SAH"]["n"] == 3
    cases = np.array(["EDH" in entry for entry in make().types])
    hits = cases & (make().scores >= SETTINGS.operating_threshold)
    by_patient = wilson_by_group(hits, cases, make().patients)
    assert result["types"]["image"]["EDH"]["wilson"] == pytest.approx(by_patient, nan_ok=True)
    # The first box of each image has IoU 90 / 110 with the lesion and is scored highest.
    froc = result["lesions"]["froc"]["image_iou"]
    assert froc["sensitivity"][-1] == 1 and result["lesions"]["n_lesions"] == 6
    assert set(result["calibration"]["image"]) == {"as_scored", "scaled"}
    for level in result["levels"].values():
        low, high = level["intervals"]["recall"]
        assert low <= level["recall"] <= high


def test_recall_by_size_is_that_of_slices_by_their_largest_box():
    # Six bleeding slices of areas 1, 4, 9, 16, 25, 36: thirds at 4 + 2/3 x 5 and 16 + 1/3 x 9. The
    # second has a smaller box beside, the last slice bleeds without a box. Half of six healthy
    # slices score 0.5, so a specificity of 0.90 needs a threshold above.
    sides = (1, 2, 3, 4, 5, 6)
    true = [np.array([[0.0, 0, a, a]]) for a in sides] + [np.zeros((0, 4))] * 7
    true[1] = np.array([[0.0, 0, 1, 1], [0, 0, 2, 2]])
    labels = np.array([1] * 6 + [0] * 6 + [1])
    scores = np.array([0.1, 0.55, 0.2, 0.7, 0.8, 0.9] + [0.0, 0.5] * 3 + [0.0])
    ids = [f"i{n}" for n in range(13)]
    found = Predictions(ids, ids, ids, labels, scores, None, true, [["IPH"] * len(b) for b in true])
    rows = analyse(found, Settings([0.5], 0.6, n_resamples=5))["sizes"]
    assert [(r["size"], r["n"], r["tp"], r["recall"]) for r in rows] == [
        *(("small", 2, 0, 0.0), ("medium", 2, 1, 0.5), ("large", 2, 2, 1.0))
    ]
    assert [r["recall_at_specificity_0.90"] for r in rows] == [0.5, 0.5, 1.0]
    assert [r["from"] for r in rows] == pytest.approx([1, 4 + 2 / 3 * 5, 16 + 1 / 3 * 9])
    assert rows[1]["wilson"] == pytest.approx(wilson_interval(1, 2).tolist())
    assert analyse(make(boxes=False), SETTINGS)["sizes"] == []


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("n", [1, 4, 12])
def test_one_class_and_one_patient_are_reported_as_undefined(tmp_path, label, n):
    model = Model("m", make(n=n, label=label), SETTINGS)
    content = write_report(tmp_path, [model], dataset="d")
    image = content["models"][0]["analysis"]["levels"]["image"]
    assert np.isnan(image["auc"]) and np.isnan(image["recall" if label == 0 else "specificity"])
    text = (tmp_path / "report.json").read_text()
    assert "draws, seed 0." in (tmp_path / "report.html").read_text()
    assert "NaN" not in text and json.loads(text)["models"][0]["name"] == "m"
    assert "nan" not in re.sub(r'src="[^"]*"', "", (tmp_path / "report.html").read_text()).lower()


def test_worst_cases_are_the_most_wrong_and_one_of_a_patient():
    predictions = Predictions(
        list("abcdef"), ["1", "1", "2", "3", "3", "4"], list("abcdef"),
        np.array([1, 1, 1, 0, 0, 0]), np.array([0.3, 0.1, 0.2, 0.7, 0.9, 0.4]),
    )  # fmt: skip
    cases = worst_cases(predictions, 0.5)
    assert [case["image_id"] for case in cases["misses"]] == ["b", "c"]
    assert [case["image_id"] for case in cases["false_alarms"]] == ["e"]


def test_models_on_different_images_are_not_compared():
    first, other = make(), make(n=20)
    with pytest.raises(ValueError, match="'image_20' is in one of the predictions alone"):
        compare(first, other, SETTINGS, SETTINGS)


# ---- the page ----------------------------------------------------------------------------------


def test_page_is_self_contained_and_shows_the_numbers(tmp_path):
    predictions = make()
    point = OperatingPoint.choose(make(seed=1), SETTINGS, Rule("youden"), dataset="ich_val")
    settings = Settings([0.5], point.threshold, patient_rules=("any",), n_resamples=50)
    training = [{"iteration": i, "rpn/ratio_target": 1 + 1 / (i + 1)} for i in range(3)]
    model = Model("cs <b>", predictions, settings, point, training=training)
    asked = []

    def read_image(path):
        asked.append(path)
        return np.full((40, 40, 1), 90, np.uint8)

    content = write_report(tmp_path, [model], dataset="ich_test", read_image=read_image)
    page = (tmp_path / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]
    references = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert references and all(r.startswith("data:") for r in references)
    assert "url(" not in page and "<script" not in page and "@import" not in page
    entry = content["models"][0]
    for level in ("image", "patient"):
        values = entry["analysis"]["levels"][level]
        for name in ("auc", "recall", "specificity"):
            assert f"<b>{values[name]:.3f}</b>" in page
    assert "Chosen on ich_val at image level by the rule <b>youden</b>" in page
    wrong = entry["misses"] + entry["false_alarms"]
    assert wrong and len(asked) == len(wrong)
    open_items = sum(item["answer"] is None for item in entry["checklist"])
    assert page.count('class="open">open</td>') == open_items > 30
    assert "Ratio k and positive scores" in page
    assert "Sizes of bleeds</h2>" in page and "<td>100 to 100</td>" in page


def test_two_models_are_set_side_by_side(tmp_path):
    models = [Model(name, make(seed), SETTINGS) for seed, name in enumerate(("a<x>", "b"))]
    content = write_report(tmp_path, models, dataset="d")
    (pair,) = content["comparisons"]
    assert (pair["first"], pair["other"]) == ("a<x>", "b")
    page = (tmp_path / "report.html").read_text()
    assert "a&lt;x&gt; minus b" in page and "<x>" not in page
    a, b = (entry["analysis"]["levels"]["image"]["auc"] for entry in content["models"])
    assert pair["image"]["bootstrap"]["auc"]["difference"] == pytest.approx(a - b)
    assert pair["image"]["delong"]["difference"] == pytest.approx(a - b)


def test_scores_alone_are_enough_for_a_page(tmp_path):
    write_report(tmp_path, [Model("m", make(boxes=False), SETTINGS)], dataset="d")
    page = (tmp_path / "report.html").read_text()
    assert "Lesions</h2>" not in page and "Sizes of bleeds" not in page
    assert "Metrics with 95 % intervals" in page
