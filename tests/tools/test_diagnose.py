"""The command tools/diagnose.py: scores of the evaluation, privacy, and nothing half done."""

import csv
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from ich_det2.data.datasets import register_ich_datasets
from ich_det2.engine import IchTrainer
from ich_det2.inference import api, outputs, results

REPO = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("diagnose", REPO / "tools/diagnose.py")
diagnose = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagnose)

ORIENTATION = [1, 0, 0, 0, 1, 0]
SECRETS = ("ZWICKY", "JANUSZ", "PID4711", "1.2.826.0.1.3680043.8.498")


@pytest.fixture
def exam(tmp_path, write_ct):
    """Factory of an exam of four slices, whose files are named against their order."""

    def make(name="exam", patient="PID4711", study="1.1.1", **attributes):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(len(name))
        for i in range(4):
            hu = rng.integers(0, 40, (64, 64)).astype(float)
            hu[10 * i : 10 * i + 20, 20:45] = 85
            write_ct(
                folder / f"IM{9 - i}",
                hu,
                PatientID=patient,
                PatientName="ZWICKY^JANUSZ",
                StudyInstanceUID=study,
                SeriesInstanceUID=f"1.2.826.0.1.3680043.8.498.{ord(name[0])}",
                ImagePositionPatient=[0, 0, 5 * i],
                ImageOrientationPatient=ORIENTATION,
                **attributes,
            )
        return folder

    return make


def run(*args):
    return diagnose.main([str(arg) for arg in args])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def result(folder):
    return json.loads((folder / "diagnosis.json").read_text())


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kind", ["png", "dicom"])
def test_scores_are_those_of_the_evaluation(tmp_path, run_dir, full_tree, tiny_cfg, kind):
    root = full_tree(kind)
    cfg = tiny_cfg("OUTPUT_DIR", str(run_dir), "DATASETS.TEST", "('ich_train',)")
    register_ich_datasets(root)
    model = build_model(cfg)
    model.load_state_dict(torch.load(run_dir / "model_best.pth")["model"])
    IchTrainer.test(cfg, model)
    expected = rows(run_dir / "inference/ich_train/image_scores.csv")

    images = [p for p in sorted(root.glob("*/*")) if p.stem in "abcd" and p.suffix != ".xml"]
    assert run(run_dir, *images, "--output", tmp_path / "out") == 0
    got = {Path(row["file"]).stem: float(row["score"]) for row in rows(tmp_path / "out/slices.csv")}
    assert len(expected) == 4 and len(set(got.values())) > 1 and min(got.values()) > 0
    assert got == pytest.approx({r["image_id"]: float(r["score"]) for r in expected}, abs=1e-6)


def test_batch_size_changes_nothing(tmp_path, run_dir, exam):
    folder = exam()
    for n in (1, 3):
        assert run(run_dir, folder, "--output", tmp_path / f"out{n}", "--batch-size", n) == 0
    one, three = result(tmp_path / "out1"), result(tmp_path / "out3")
    for a, b in zip(one["patients"][0]["slices"], three["patients"][0]["slices"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert len(a["boxes"]) == len(b["boxes"])


def test_files(tmp_path, run_dir, exam):
    assert run(run_dir, exam(), "--output", tmp_path / "out") == 0
    slices, (patient,) = rows(tmp_path / "out/slices.csv"), rows(tmp_path / "out/patients.csv")
    # Position along the normal, against the names.
    assert [row["file"] for row in slices] == ["IM9", "IM8", "IM7", "IM6"]
    assert [row["slice"] for row in slices] == ["0", "1", "2", "3"]
    assert {(row["patient"], row["series"]) for row in slices} == {("patient-001", "series-01")}
    worst = max(slices, key=lambda row: float(row["score"]))
    assert patient["n_slices"] == "4" and patient["n_slices_failed"] == "0"
    assert (patient["score"], patient["worst_slice_file"]) == (worst["score"], worst["file"])

    content = result(tmp_path / "out")
    assert content["model"]["run"] == "run" and content["model"]["weights"] == "model_best.pth"
    assert "research" in content["notice"] and content["threshold"] == 0.5
    for entry in content["patients"][0]["slices"]:
        scores = [box["score"] for box in entry["boxes"]]
        assert max(scores) == entry["score"]
        for box in entry["boxes"]:
            x0, y0, x1, y1 = box["box"]
            assert 0 <= x0 <= x1 <= 64 and 0 <= y0 <= y1 <= 64
            assert box["class"] == "hemorrhage"
        overlay = entry["overlay"] and Image.open(tmp_path / "out" / entry["overlay"])
        positive = entry["verdict"] == "positive"
        assert bool(overlay) == (positive or entry["file"] == worst["file"])
    assert not leftovers(tmp_path)


def test_a_score_equal_to_the_threshold_is_positive(tmp_path, run_dir, exam):
    folder = exam()
    run(run_dir, folder, "--output", tmp_path / "a")
    scores = sorted(s["score"] for s in result(tmp_path / "a")["patients"][0]["slices"])
    run(run_dir, folder, "--output", tmp_path / "b", "--threshold", repr(scores[2]))
    slices = rows(tmp_path / "b/slices.csv")
    assert [r["score"] for r in slices if r["verdict"] == "positive"] == [
        f"{s['score']:.6f}"
        for s in result(tmp_path / "b")["patients"][0]["slices"]
        if s["score"] >= scores[2]
    ]
    assert all((r["verdict"] == "positive") == (r["n_boxes"] != "0") for r in slices)
    assert rows(tmp_path / "b/patients.csv")[0]["n_positive_slices"] == "2"


def test_all_overlays(tmp_path, run_dir, exam):
    args = (run_dir, exam(), "--threshold", 1)
    assert run(*args, "--output", tmp_path / "a") == 0
    assert len(list(tmp_path.glob("a/overlays/*/*.png"))) == 1  # the highest scored
    assert run(*args, "--output", tmp_path / "b", "--all-overlays") == 0
    assert len(list(tmp_path.glob("b/overlays/*/*.png"))) == 4


def all_text(folder):
    """Every byte and every name of a result, and the pictures' own texts."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.suffix == ".png":
            assert not Image.open(path).info
    names = " ".join(p.relative_to(folder).as_posix() for p in paths).encode()
    return names + b"".join(p.read_bytes() for p in paths if p.is_file())


def test_no_identity_unless_asked_for(tmp_path, run_dir, exam):
    folder = exam("in")
    # As hospitals name exports.
    for path in list(folder.iterdir()):
        uid = dcmread(path).SOPInstanceUID
        target = folder / "Zwicky_Janusz-pid4711" / f"CT.{uid}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    (folder / "Zwicky_Janusz-pid4711" / "report of JANUSZ.txt").write_text("x")
    assert run(run_dir, folder, "--output", tmp_path / "out") == 0
    text = all_text(tmp_path / "out").lower()
    for secret in (*SECRETS, str(tmp_path), "1.1.1"):
        assert secret.lower().encode() not in text, secret

    assert run(run_dir, folder, "--output", tmp_path / "identified", "--identify") == 0
    text = all_text(tmp_path / "identified")
    for secret in SECRETS[2:]:
        assert secret.encode() in text
    row = rows(tmp_path / "identified/slices.csv")[0]
    assert row["patient_id"] == "PID4711" and row["sop_uid"].startswith("1.2.826")
    assert row["patient"] == "patient-001"
    assert str(tmp_path).encode() not in text


def test_patients_are_numbered_by_id(tmp_path, run_dir, exam):
    exams = exam("one", patient="Z9"), exam("two", patient="A1", study="1.1.2")
    assert run(run_dir, *exams, "--output", tmp_path / "out", "--identify") == 0
    patients = rows(tmp_path / "out/patients.csv")
    assert [(r["patient"], r["patient_id"]) for r in patients] == [
        ("patient-001", "A1"),
        ("patient-002", "Z9"),
    ]


def test_patients_csv_of_a_tree(tmp_path, run_dir, voc_tree):
    root = voc_tree({"a": [], "b": [], "c": []}, patients=["image,patient", "a,p", "c,p", "b,q"])
    assert run(run_dir, root / "JPEGImages", "--output", tmp_path / "out") == 0
    assert [(r["patient"], r["file"]) for r in rows(tmp_path / "out/slices.csv")] == [
        ("patient-001", "a.png"),
        ("patient-001", "c.png"),
        ("patient-002", "b.png"),
    ]


def test_images_without_a_list_are_one_patient_each(tmp_path, run_dir, voc_tree):
    root = voc_tree({"s_10": [], "s_9": []})
    assert run(run_dir, root / "JPEGImages", "--output", tmp_path / "out") == 0
    assert [r["worst_slice_file"] for r in rows(tmp_path / "out/patients.csv")] == [
        "s_9.png",
        "s_10.png",
    ]


def test_arguments_from_a_file(tmp_path, run_dir, exam):
    folder = exam()
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted(folder.iterdir()))) + "\n\n")
    assert run(run_dir, f"@{tmp_path / 'list.txt'}", "--output", tmp_path / "out") == 0
    # Files of one series given one by one are in order, too.
    assert [r["file"] for r in rows(tmp_path / "out/slices.csv")] == ["IM9", "IM8", "IM7", "IM6"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def damage(path):
    """A compressed slice that looks whole and cannot be decoded."""
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.PixelData = encapsulate([b"\xff\x4f\xff\x51" + bytes(500)])
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)


def erase(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("break_file", [truncate, damage, erase])
def test_a_lost_slice_marks_its_patient(tmp_path, run_dir, exam, capsys, break_file):
    folder = exam()
    break_file(folder / "IM7")
    (folder / "notes.txt").write_text("no slice")
    assert run(run_dir, folder, "--output", tmp_path / "out", "--threshold", 1) == 0
    (patient,) = rows(tmp_path / "out/patients.csv")
    assert (patient["n_slices"], patient["n_slices_failed"]) == ("3", "1")
    content = result(tmp_path / "out")
    assert content["patients"][0]["complete"] is False
    skipped = {entry["file"]: entry for entry in content["skipped"]}
    assert set(skipped) == {"IM7", "notes.txt"} and all(e["reason"] for e in skipped.values())
    assert skipped["IM7"]["patients"] == ["patient-001"] and skipped["IM7"]["lost_slice"]
    assert not skipped["notes.txt"]["lost_slice"]
    out = " ".join(capsys.readouterr().out.split())
    assert "incomplete" in out
    assert "Skipped files: 2, of these slices that could not be read: 1" in out


def test_a_patient_without_a_readable_slice_is_not_negative(tmp_path, run_dir, exam):
    lost, fine = exam("lost", patient="A1"), exam("fine", patient="B2", study="1.1.2")
    for path in lost.iterdir():
        truncate(path)
    assert run(run_dir, lost, fine, "--output", tmp_path / "out") == 0
    first, second = rows(tmp_path / "out/patients.csv")
    assert (first["n_slices"], first["n_slices_failed"], first["verdict"]) == (
        "0", "4", "undetermined",
    )  # fmt: skip
    assert second["n_slices"] == "4"


def test_a_repeated_image_is_no_lost_slice(tmp_path, run_dir, exam):
    folder = exam()
    shutil.copy(folder / "IM7", tmp_path / "copy")
    assert run(run_dir, folder, tmp_path / "copy", "--output", tmp_path / "out") == 0
    assert rows(tmp_path / "out/patients.csv")[0]["n_slices_failed"] == "0"
    (entry,) = result(tmp_path / "out")["skipped"]
    assert "repeats the image IM7" in entry["reason"]


def test_what_is_noticed_is_said_on_the_terminal(tmp_path, run_dir, exam, write_ct, capsys):
    folder = exam()
    (folder / "IM8").unlink()  # 10 mm between the first and the second
    write_ct(folder / "knee", np.zeros((64, 64)), PatientID="PID4711", BodyPartExamined="KNIE")
    options = ("--threshold", 1, "--key", tmp_path / "key.csv")
    assert run(run_dir, folder, "--output", tmp_path / "out", *options) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "incomplete" in out
    assert "patient-001: series-01: 1 slice(s) seem to be missing between IM9 and IM7" in out
    assert "1 of them for their Body Part Examined; --any-body-part reads them" in out
    key = rows(tmp_path / "key.csv")
    assert [row["patient_id"] for row in key] == ["PID4711"] * 4
    assert Path(key[0]["path"]) == folder / "IM9"
    shutil.rmtree(tmp_path / "out")
    assert run(run_dir, folder, "--output", tmp_path / "out", *options) == 2  # the key is there
    options = (*options, "--force", "--any-body-part")
    assert run(run_dir, folder, "--output", tmp_path / "out", *options) == 0
    assert len(rows(tmp_path / "out/slices.csv")) == 4


@pytest.mark.parametrize("break_file", [truncate, damage, erase])
def test_a_given_file_that_cannot_be_read(tmp_path, run_dir, exam, capsys, break_file):
    folder = exam()
    break_file(folder / "IM7")
    assert run(run_dir, folder / "IM8", folder / "IM7", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "IM7" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_nothing_readable(tmp_path, run_dir, exam, capsys):
    folder = exam()
    for path in folder.iterdir():
        damage(path)
    assert run(run_dir, folder, "--output", tmp_path / "out") == 2
    (tmp_path / "empty").mkdir()
    assert run(run_dir, tmp_path / "empty", "--output", tmp_path / "out") == 2
    (tmp_path / "empty/x.txt").write_text("x")
    assert run(run_dir, tmp_path / "empty", "--output", tmp_path / "out") == 2
    assert run(run_dir, tmp_path / "none", "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("error:") == 4
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_an_image_of_more_than_8_bit_is_refused(tmp_path, run_dir, capsys):
    Image.fromarray(np.full((64, 64), 1000, np.uint16)).save(tmp_path / "deep.png")
    assert run(run_dir, tmp_path / "deep.png", "--output", tmp_path / "out") == 2
    assert "8 bit" in capsys.readouterr().err


def test_an_existing_output_is_kept(tmp_path, run_dir, exam, capsys):
    folder, out = exam(), tmp_path / "out"
    out.mkdir()
    assert run(run_dir, folder, "--output", out) == 0  # empty
    before = (out / "slices.csv").read_bytes()
    assert run(run_dir, folder, "--output", out) == 2
    assert "--force" in capsys.readouterr().err
    (out / "stale").touch()
    assert run(run_dir, folder, "--output", out, "--force") == 0
    assert (out / "slices.csv").read_bytes() == before and not (out / "stale").exists()
    for foreign in (run_dir, folder):
        assert run(run_dir, folder / "IM7", "--output", foreign, "--force") == 2
    (run_dir / "diagnosis.json").write_text('{"operating_threshold": 0.5}')  # an evaluation's
    assert run(run_dir, folder, "--output", run_dir, "--force") == 2
    assert run(run_dir, folder, "--output", folder / "out") == 2
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("error, code", [(ValueError("x"), 2), (KeyboardInterrupt(), 130)])
def test_an_interrupted_run_leaves_nothing(tmp_path, run_dir, exam, monkeypatch, error, code):
    def fail(*args, **kwargs):
        raise error

    folder = exam()
    monkeypatch.setattr(results, "draw_overlay", fail)
    assert run(run_dir, folder, "--output", tmp_path / "out") == code
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exam", "run"]


def test_model_dir(tmp_path, run_dir, exam, capsys):
    folder, out = exam(), tmp_path / "out"

    def error(model=run_dir, *args):
        assert run(model, folder, "--output", out, *args) == 2
        assert not out.exists()
        text = capsys.readouterr().err
        assert "Traceback" not in text
        return text

    assert "no such folder" in error(tmp_path / "none")
    assert "config.yaml" in error(folder)
    assert "threshold is 1.5" in error(run_dir, "--threshold", 1.5)
    assert "threshold is nan" in error(run_dir, "--threshold", "nan")
    assert "batch_size is 0" in error(run_dir, "--batch-size", 0)

    config, weights = run_dir / "config.yaml", run_dir / "model_best.pth"
    text, saved = config.read_text(), torch.load(weights)
    config.write_text("!!python/object/apply:os.system ['true']")
    assert "config.yaml" in error()
    config.write_text(text.replace("FC_DIM: 16", "FC_DIM: 8"))
    assert "does not fit" in error()
    config.write_text(text)
    weights.rename(run_dir / "model_final.pth")
    assert run(run_dir, folder, "--output", out) == 0
    assert "model_final.pth" in capsys.readouterr().err
    assert result(out)["model"]["weights"] == "model_final.pth"
    shutil.rmtree(out)
    (run_dir / "model_final.pth").write_bytes(b"no checkpoint")
    assert "model_final.pth" in error()
    saved["model"]["roi_heads.box_predictor.cls_score.bias"][0] = float("nan")
    torch.save(saved, run_dir / "model_final.pth")
    assert "NaN" in error()
    (run_dir / "model_final.pth").unlink()
    assert "neither" in error()


def test_dicom_objects_are_written_beside_if_asked_for(tmp_path, run_dir, exam, capsys):
    folder, out = exam(), tmp_path / "out"
    argv = [str(run_dir), str(folder), "--output", str(out)]
    assert diagnose.main(argv) == 0 and not (tmp_path / "out_dicom").exists()
    assert diagnose.main([*argv, "--force", "--dicom", "sr", "kos", "sr"]) == 0
    assert "with the identity of their source" in capsys.readouterr().out
    files = sorted(p.name for p in (tmp_path / "out_dicom").rglob("*.dcm"))
    assert files == ["kos-001.dcm", "sr-001.dcm"]
    report = dcmread(next((tmp_path / "out_dicom").rglob("sr-001.dcm")))
    assert report.PatientID == "PID4711"
    assert not any(secret.encode() in p.read_bytes() for secret in SECRETS for p in out.glob("*.*"))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["--dicom", "sr", "--dicom-output", "{out}/dicom"], "lie in one another"),
        (["--dicom", "sr", "--dicom-output", "{exam}/dicom"], "lie in one another"),
        (["--dicom", "sr", "--dicom-output", "{run}"], "holds something already"),
    ],
)
def test_dicom_objects_have_a_folder_of_their_own(tmp_path, run_dir, exam, capsys, opts, message):
    folder, out = exam(), tmp_path / "out"
    opts = [opt.format(out=out, exam=folder, run=run_dir) for opt in opts]
    assert diagnose.main([str(run_dir), str(folder), "--output", str(out), *opts]) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("option", ["--output", "--key", "--dicom-output"])
def test_rights_are_looked_at_before_the_work(tmp_path, run_dir, exam, capsys, monkeypatch, option):
    shut = tmp_path / "shut"
    shut.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shut and access(path, mode))
    monkeypatch.setattr(api, "find_slices", None)  # is not come to
    given = {"--output": tmp_path / "out", "--key": tmp_path / "key.csv"}
    given |= {"--dicom-output": tmp_path / "dicom", option: shut / "x"}
    argv = [text for pair in given.items() for text in pair]
    assert run(run_dir, exam(), *argv, "--dicom", "sr") == 2
    said = capsys.readouterr().err
    assert f"{option} {shut / 'x'}: there is no right to write in {shut}" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exam", "run", "shut"]


def test_nothing_is_written_unless_everything_is(tmp_path, run_dir, exam, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(outputs, "WRITERS", (fail,))
    argv = ("--output", tmp_path / "out", "--key", tmp_path / "key.csv", "--dicom", "sr")
    assert run(run_dir, exam(), *argv) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exam", "run"]


def test_an_output_that_is_a_link_to_itself(tmp_path, run_dir, exam, capsys):
    (tmp_path / "loop").symlink_to("loop")
    folder = exam()
    assert run(run_dir, folder, "--output", tmp_path / "loop") == 2
    assert "--output" in (said := capsys.readouterr().err) and "back to itself" in said
    assert run(run_dir, tmp_path / "loop", "--output", tmp_path / "out") == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_pictures_are_no_source_of_dicom_objects(tmp_path, run_dir, voc_tree, capsys, monkeypatch):
    monkeypatch.setattr(api, "find_slices", None)  # is not come to
    root = voc_tree({"a": []}) / "JPEGImages"
    assert run(run_dir, root, "--output", tmp_path / "out", "--dicom", "sr") == 2
    assert "the inputs are PNG or JPEG" in capsys.readouterr().err


def test_dicom_output_without_dicom_is_refused(tmp_path, run_dir, exam, capsys):
    with pytest.raises(SystemExit) as stop:
        argv = [str(run_dir), str(exam()), "--output", str(tmp_path / "out")]
        diagnose.main([*argv, "--dicom-output", str(tmp_path / "d")])
    assert stop.value.code == 2 and "give both" in capsys.readouterr().err
