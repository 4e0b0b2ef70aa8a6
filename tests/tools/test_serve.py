"""The command tools/serve.py, without a network: what is told of a journal."""

import importlib.util
import os
from pathlib import Path

import pytest
import yaml

from ich_det2.serve.journal import Delivery, Journal
from ich_det2.serve.log import study_key

spec = importlib.util.spec_from_file_location("serve", Path(__file__).parents[2] / "tools/serve.py")
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "node").mkdir()
    path = tmp_path / "node.yaml"
    path.write_text(yaml.safe_dump({"root": str(tmp_path / "node")}))
    return path


@pytest.fixture
def journal(tmp_path, config):
    one = Journal(tmp_path / "node/journal.sqlite")
    for study in ("1.1", "1.2", "1.3"):
        one.add_instance(f"{study}.9", study, f"/x/{study}", 10, "00")
    one.fail_study("1.1", 1, "ValueError: no slice", 9e12)
    one.answer("1.2", 1, "present", True, [("1.2.5", "sr", "/y", ["pacs"])])
    one.fail_delivery(Delivery("1.2.5", "pacs", "1.2", "sr", "/y", 0), "ConnectionError: x", 9e12)
    one.answer("1.3", 1, "absent", True, [])
    yield one
    one.close()


def test_status_tells_what_is_not_done_and_why(config, journal, capsys):
    assert serve.main(["status", str(config)]) == 0
    text = capsys.readouterr().out
    assert "0 receiving, 1 failed, 1 answered, 1 sent; 1 objects to be sent" in text
    assert f"{study_key('1.1')}: not diagnosed (1 tries): ValueError: no slice" in text
    assert f"{study_key('1.2')}: not sent to pacs (1 tries): ConnectionError: x" in text
    assert "1.2" not in text.replace(study_key("1.2"), "") and study_key("1.3") not in text
    assert serve.main(["status", str(config), "--all", "--uids"]) == 0
    text = capsys.readouterr().out
    assert "1.3" in text and "absent" in text


def test_retry_lets_what_failed_be_tried_at_once(config, journal, capsys):
    assert not journal.quiet_studies(0) and not journal.due("pacs")
    assert serve.main(["retry", str(config)]) == 0
    assert "2 failed studies and sendings" in capsys.readouterr().out
    assert [s.uid for s in journal.quiet_studies(0)] == ["1.1"]
    assert [d.result for d in journal.due("pacs")] == ["1.2.5"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["status", "{missing}"], "nothere.yaml: No such file or directory"),
        (["status", "{config}"], "the node has not run yet"),
        (["run", "{bad}"], "there is no key prot"),
    ],
)
def test_errors_of_the_user_are_one_sentence(tmp_path, config, capsys, argv, message):
    (tmp_path / "bad.yaml").write_text("root: x\nprot: 1\n")
    paths = {"missing": tmp_path / "nothere.yaml", "config": config, "bad": tmp_path / "bad.yaml"}
    assert serve.main([x.format(**paths) for x in argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_reconcile_asks_for_what_it_needs(config, journal, capsys):
    assert serve.main(["reconcile", str(config)]) == 2
    assert "complete.qido is missing" in capsys.readouterr().err
    content = yaml.safe_load(config.read_text()) | {"complete": {"qido": "http://127.0.0.1:9"}}
    config.write_text(yaml.safe_dump(content))
    assert serve.main(["reconcile", str(config), "--date", "today"]) == 2
    assert "expected YYYYMMDD" in capsys.readouterr().err
    assert serve.main(["reconcile", str(config)]) == 2  # nobody listens there
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert os.listdir(config.parent / "node")
