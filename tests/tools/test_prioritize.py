"""The worklist of a model, from its predictions."""

import csv
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("prioritize", ROOT / "tools/prioritize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "image_scores.csv"
    rows = [
        f"{p}{i},{p}{i}.png,{p},{int(p == 'a')},{0.8 if p == 'a' else 0.1}"
        for p in "abcd"
        for i in "12"
    ]
    path.write_text("\n".join(["image_id,file_name,patient_id,label,score", *rows]) + "\n")
    return path


def test_bleeding_exams_are_read_sooner_by_a_model_that_finds_them(tool, scores, tmp_path, capsys):
    out = tmp_path / "times.csv"
    argv = [str(scores), "--threshold", "0.5", "--worklists", "50", "--output", str(out)]
    assert tool.main(argv) == 0
    assert "4 patients, 1 bleed, 1 called positive" in capsys.readouterr().out
    with open(out, newline="") as file:
        rows = {(r["exams"], r["order"]): float(r["minutes"]) for r in csv.DictReader(file)}
    assert rows["bleeding", "by the model"] < rows["bleeding", "as they come"]
    assert rows["others", "sooner"] < 0 < rows["bleeding", "sooner"]
    assert tool.main([str(scores), "--by", "score", "--worklists", "20"]) == 0
    # Few wait long, so that the one in the middle waits less than they do on average.
    assert tool.main([*argv, "--median"]) == 0
    with open(out, newline="") as file:
        medians = {(r["exams"], r["order"]): float(r["minutes"]) for r in csv.DictReader(file)}
    assert medians["others", "as they come"] < rows["others", "as they come"]


def test_what_is_missing_or_too_much_is_named(tool, scores, capsys):
    assert tool.main([str(scores)]) == 2
    assert "give --threshold, or --by score" in capsys.readouterr().err
    assert tool.main([str(scores), "--threshold", "0.5", "--per-hour", "12"]) == 2
    assert "would grow for ever" in capsys.readouterr().err
    assert tool.main([str(scores), "--threshold", "0.5", "--readers", "0"]) == 2
    assert "by 0 reader(s): expected numbers above 0" in capsys.readouterr().err
    assert tool.main([str(scores), "--by", "score", "--patient-rule", "at_least_3"]) == 2
    error = capsys.readouterr().err
    assert f"{scores}: 4 of 4 patients, 'a' for one, have too few slices" in error
    scores.write_text(scores.read_text().replace(",0,0.1", ",1,0.1"))
    assert tool.main([str(scores), "--threshold", "0.5"]) == 2
    assert f"{scores}: 4 of 4 patients bleed" in capsys.readouterr().err
