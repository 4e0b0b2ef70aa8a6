"""Many studies: a folder for each, whole or not at all, and nothing done twice."""

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ich_det2.inference.archive import Job, Settings, diagnose_archive, read_manifest
from ich_det2.phantom import write_exam

REPO = Path(__file__).parents[2]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray")

spec = importlib.util.spec_from_file_location("diagnose", REPO / "tools/diagnose.py")
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)


@pytest.fixture(scope="module")
def exams(tmp_path_factory):
    """Three studies, of four slices each."""
    folder = tmp_path_factory.mktemp("exams")
    for i in range(3):
        for path in write_exam(folder / f"exam{i}", seed=i, size=64)[4:]:
            path.unlink()
    return folder


@pytest.fixture
def jobs(exams):
    return [Job(f"s{i}", (str(exams / f"exam{i}"),)) for i in range(3)]


@pytest.fixture
def settings(run_dir, tmp_path):
    def make(**changed):
        own = {"model": str(run_dir), "output": str(tmp_path / "out"), "overlays": "none"}
        return Settings(**{**own, **changed})

    return make


def table(folder):
    with open(folder / "studies.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_study_has_a_folder_and_a_row(jobs, settings, tmp_path):
    told = []
    rows = diagnose_archive(jobs, settings(), progress=told.append)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        ".states",
        "archive.json",
        "s0",
        "s1",
        "s2",
        "studies.csv",
    ]
    assert [row["study"] for row in table(out)] == ["s0", "s1", "s2"] and told == rows
    for row in table(out):
        content = json.loads((out / row["study"] / "diagnosis.json").read_text())
        (patient,) = content["patients"]
        assert float(row["score"]) == pytest.approx(patient["score"], abs=1e-6)
        assert row["verdict"] == patient["verdict"] and row["n_slices"] == "4"


def test_what_is_done_is_not_done_again_and_what_failed_is_tried_again(
    jobs, settings, tmp_path, exams
):
    broken = tmp_path / "broken"
    jobs = [*jobs[:1], Job("bad", (str(broken),)), *jobs[1:]]
    rows = diagnose_archive(jobs, settings())
    assert [row["status"] for row in rows] == ["done", "failed", "done", "done"]
    assert "no such file" in rows[1]["error"] and not (tmp_path / "out/bad").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("diagnosis.json")}
    shutil.copytree(exams / "exam1", broken)
    told = []
    rows = diagnose_archive(jobs, settings(), progress=told.append)
    assert [row["status"] for row in rows] == ["done"] * 4
    assert sorted(row["status"] for row in told) == ["done", "skipped", "skipped", "skipped"]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_what_has_changed_is_done_anew(jobs, settings, tmp_path, exams):
    place = tmp_path / "studies"
    shutil.copytree(exams, place)
    jobs = [Job(job.name, (str(place / Path(job.paths[0]).name),)) for job in jobs]
    diagnose_archive(jobs, settings())

    def again():
        told = []
        rows = diagnose_archive(jobs, settings(), progress=told.append)
        return {row["study"]: (row["status"], row["n_slices"]) for row in told}, rows

    assert {*again()[0].values()} == {("skipped", 4)}
    late, *_ = (place / "exam0").iterdir()
    os.utime(late, ns=(0, 0))  # another content of the same size
    (place / "exam1/late.dcm").write_bytes(
        write_exam(tmp_path / "x", seed=1, size=64)[4].read_bytes()
    )
    shutil.rmtree(place / "exam2")
    told, rows = again()
    assert told == {"s0": ("done", 4), "s1": ("done", 5), "s2": ("skipped", 4)}
    assert [row["status"] for row in rows] == ["done"] * 3 and table(tmp_path / "out") == [
        {k: str(v) for k, v in row.items()} for row in rows
    ]
    assert {*again()[0].values()} == {("skipped", 4), ("skipped", 5)}
    # One that cannot be read any more is no longer done.
    for path in (place / "exam1").iterdir():
        path.write_bytes(b"no image")
    told, _ = again()
    assert told["s1"][0] == "failed"
    assert again()[0]["s1"][0] == "failed"


def test_results_of_other_settings_are_not_mixed(jobs, settings, tmp_path):
    diagnose_archive(jobs[:1], settings())
    with pytest.raises(ValueError, match="another threshold .None, now 0.3."):
        diagnose_archive(jobs, settings(threshold=0.3))
    config = Path(settings().model) / "config.yaml"
    text = config.read_text()
    for key, value in (("OPERATING_THRESHOLD", 0.123), ("MIN_SIZE_TEST", 96)):
        config.write_text(re.sub(rf"({key}): [\d.]+", rf"\1: {value}", text))
        word = "operating_threshold .*now 0.123" if "THRESHOLD" in key else "config"
        with pytest.raises(ValueError, match=f"was begun with another {word}"):
            diagnose_archive(jobs, settings())
    config.write_text(text)
    weights = Path(settings().model) / "model_best.pth"
    state = torch.load(weights, weights_only=True)
    state["model"]["roi_heads.box_predictor.cls_score.bias"] += 1
    torch.save(state, weights)
    with pytest.raises(ValueError, match="another sha256"):
        diagnose_archive(jobs, settings())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no archive"):
        diagnose_archive(jobs, settings(output=str(tmp_path / "mine")))
    with pytest.raises(ValueError, match="lie in one another"):
        diagnose_archive(jobs, settings(output=str(Path(jobs[0].paths[0]) / "out")))


def test_errors_in_the_table_name_no_file(jobs, settings, tmp_path):
    folder = tmp_path / "ZWICKY_JANUSZ"
    folder.mkdir()
    (folder / "PID4711.dcm").write_bytes(b"no image")
    told = []
    jobs = [Job("a", (str(folder),)), Job("b", (str(folder / "PID4711.dcm"),))]
    diagnose_archive(jobs, settings(), progress=told.append)
    assert "PID4711" in told[1]["error"]
    text = (tmp_path / "out/studies.csv").read_text()
    assert [row["status"] for row in table(tmp_path / "out")] == ["failed", "failed"]
    assert not any(secret in text for secret in ("ZWICKY", "PID4711", str(tmp_path)))


@pytest.mark.parametrize("text", ["", '{"patients": [', "[]", '{"patients": [{}]}'])
def test_a_damaged_study_is_diagnosed_anew(jobs, settings, tmp_path, caplog, text):
    rows = diagnose_archive(jobs[:2], settings())
    (tmp_path / "out/s1/diagnosis.json").write_text(text)
    told = []
    assert diagnose_archive(jobs[:2], settings(), progress=told.append) == rows
    assert [row["status"] for row in told] == ["skipped", "done"]
    assert "s1: diagnosis.json is damaged" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_record_is_named(jobs, settings, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/archive.json").write_text(text)
    with pytest.raises(ValueError, match="out/archive.json: is damaged .*; restore it from a copy"):
        diagnose_archive(jobs, settings())


@pytest.mark.parametrize("place", ["out", "out/objects"])
def test_dicom_objects_lie_apart(jobs, settings, tmp_path, place):
    own = settings(dicom=("sr",), dicom_output=str(tmp_path / place))
    with pytest.raises(ValueError, match="--dicom-output .* lie in one another"):
        diagnose_archive(jobs, own)
    assert not (tmp_path / "out").exists()


def test_dicom_objects_of_each_study(jobs, settings, tmp_path):
    objects = tmp_path / "objects"
    own = settings(dicom=("sr",), dicom_output=str(objects))
    diagnose_archive(jobs[:2], own)
    assert len(list(objects.glob("s*/patient-001/study-01/sr-001.dcm"))) == 2
    diagnose_archive(jobs, own)
    assert len(list(objects.rglob("*.dcm"))) == 3


@pytest.fixture
def run_lethal(jobs, settings, tmp_path):
    """Function that runs lethal.py on the three studies, of which s1 kills so many workers."""
    (tmp_path / "jobs.json").write_text(json.dumps([[job.name, job.paths] for job in jobs]))
    (tmp_path / "settings.json").write_text(json.dumps(asdict(settings())))
    here = Path(__file__).parent
    files = [str(tmp_path / "jobs.json"), str(tmp_path / "settings.json")]

    def run(*, workers, deaths, engine="local"):
        return subprocess.run(
            [sys.executable, str(here / "lethal.py"), *files, engine, str(workers), str(deaths)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(here), str(REPO)]),
                "ICH_TEST_MARK": str(tmp_path / "killed"),
            },
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=needs_ray)])
def test_two_workers_give_what_one_gives_and_a_lost_one_costs_no_study(
    jobs, settings, tmp_path, run_lethal, engine
):
    diagnose_archive(jobs, settings(output=str(tmp_path / "one")))
    told = run_lethal(engine=engine, workers=2, deaths=1)
    assert told.returncode == 0, told.stderr[-3000:]
    assert (tmp_path / "killed").stat().st_size == 1
    assert table(tmp_path / "out") == table(tmp_path / "one")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_that_kills_each_worker_fails_alone(run_lethal, tmp_path, workers):
    told = run_lethal(workers=workers, deaths=99)
    if workers == 1:  # it was this very process, but the next knows
        assert told.returncode == -signal.SIGKILL
        told = run_lethal(workers=workers, deaths=99)
    assert told.returncode == 0, told.stderr[-3000:]
    rows = table(tmp_path / "out")
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert "ended by the system 3 times" in rows[1]["error"]
    assert (tmp_path / "killed").stat().st_size == 4


def test_an_error_of_the_user_ends_workers_at_once(jobs, settings):
    with pytest.raises(ValueError, match="threads is 0, expected at least 1"):
        diagnose_archive(jobs, settings(threads=0), workers=2)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_workers_end_with_the_command(run_dir, exams, tmp_path, sent):
    manifest, out = tmp_path / "studies.csv", tmp_path / "out"
    manifest.write_text("study,path\n" + "".join(f"t{i},{exams}/exam0\n" for i in range(400)))
    argv = [sys.executable, str(REPO / "tools/diagnose.py"), str(run_dir), "--workers", "2"]
    run = subprocess.Popen(
        [*argv, "--manifest", str(manifest), "--output", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    until = time.monotonic() + 120
    while not list(out.glob("t*/diagnosis.json")) and time.monotonic() < until:
        time.sleep(0.1)
    assert list(out.glob("t*/diagnosis.json"))
    # As by a terminal, to all processes; or by a supervisor, to the first.
    (os.killpg if sent == signal.SIGINT else os.kill)(run.pid, sent)
    # The pipe is closed by the last process that holds it.
    said = run.communicate(timeout=40)[1]
    if sent == signal.SIGINT:
        assert run.returncode == 130 and "the same command goes on" in said
    assert "Traceback" not in said
    done = len(list(out.glob("t*/diagnosis.json")))
    assert done < 400 and not list(out.glob(".t*"))


def test_ray_that_is_not_there_is_named(jobs, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="engine ray needs Ray"):
        diagnose_archive(jobs, settings(), engine="ray")


# ---- manifests -----------------------------------------------------------------------------------


def test_a_manifest(tmp_path):
    path = tmp_path / "studies.csv"
    path.write_text("study,path,note\na,x/1,\nb,/y,first\na,x/2,\n")
    assert read_manifest(path) == [
        Job("a", (f"{tmp_path}/x/1", f"{tmp_path}/x/2")),
        Job("b", ("/y",)),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,path\n", "expected study and path"),
        ("study,path\n", "names no study"),
        ("study,path\n../x,y\n", "line 2: study '../x' is no name for a folder"),
        ("study,path\n.hidden,y\n", "is no name for a folder"),
        ("study,path\na/b,y\n", "is no name for a folder"),
        ("study,path\n,y\n", "study '' is no name"),
        ("study,path\na,\n", "line 2: the path is missing"),
        ("study,path\na,x\nb,x\0y\n", "line 3: holds a NUL"),
        ("study,path\na,x\nStudies.csv,y\n", "line 3: study 'Studies.csv' is the name of a file"),
        ("study,path\narchive.json,y\n", "line 2: study 'archive.json' is the name of a file"),
        ("study,path\na,x\nA,y\n", "studies a, A differ in case alone"),
    ],
)
def test_manifests_that_are_none(tmp_path, text, message):
    path = tmp_path / "studies.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_the_command(run_dir, exams, tmp_path, capsys):
    path = tmp_path / "studies.csv"
    path.write_text(f"study,path\ns0,{exams}/exam0\nbad,{exams}/nothing\n")
    argv = [str(run_dir), "--manifest", str(path), "--output", str(tmp_path / "out")]
    assert command.main(argv) == 1
    said = capsys.readouterr()
    assert "2 studies: " in said.out and "1 failed, which the same command tries again" in said.out
    assert "bad: failed: " in said.err
    # The table does not tell where the input is, and keeps what is done.
    text = (tmp_path / "out/studies.csv").read_text()
    assert "no such file" in text and str(exams) not in text and "nothing" not in text
    path.write_text(f"study,path\ns1,{exams}/exam1\n")
    assert command.main(argv) == 0
    assert "0 failed. Table" in capsys.readouterr().out
    assert [row["study"] for row in table(tmp_path / "out")] == ["s1", "s0"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["exam"], "give INPUT, or --manifest"), (["--force"], "takes no --key and no --force")],
)
def test_a_manifest_stands_alone(tmp_path, capsys, extra, message):
    with pytest.raises(SystemExit) as stop:
        argv = ["run", *extra, "--manifest", "m.csv", "--output", str(tmp_path / "out")]
        command.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
