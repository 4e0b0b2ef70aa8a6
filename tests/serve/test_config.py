"""Settings of a node: each key is used or refused, with a sentence that names it."""

import re
from pathlib import Path

import pytest
import yaml

from ich_det2.serve.config import read_config

EXAMPLE = Path(__file__).parents[2] / "examples/serve/node.yaml"
DOCS = Path(__file__).parents[2] / "docs/serving.md"


def read(tmp_path, content):
    path = tmp_path / "node.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_config(path)


def test_the_example_is_whole():
    cfg = read_config(EXAMPLE)
    assert cfg.root == Path("/var/lib/ich_det2") and cfg.receive.calling_ae_titles == ("PACS",)
    assert cfg.send[0].objects == ("sr", "sc") and cfg.complete.quiet_s == 60.0


def test_defaults_listen_on_loopback_and_keep_answers(tmp_path):
    cfg = read(tmp_path, {"root": "x"})
    assert cfg.receive.bind == cfg.http.bind == "127.0.0.1" and cfg.send == ()


DIMSE = {"name": "a", "host": "h", "port": 1, "ae_title": "T"}
STOW = {"name": "a", "url": "http://h/d"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1", "the file is [1], expected keys and values"),
        ("root: [", "is no YAML"),
        ({}, "root is missing"),
        ({"root": ""}, "root is '', expected Path"),
        ({"root": "x", "modle": "y"}, "there is no key modle; known are root, model"),
        ({"root": "x", "receive": {"prot": 1}}, "there is no key receive.prot"),
        ({"root": "x", "receive": {"port": "11112"}}, "receive.port is '11112', expected int"),
        ({"root": "x", "receive": {"port": True}}, "receive.port is True, expected int"),
        ({"root": "x", "receive": {"port": 70000}}, "receive.port is 70000, expected a port"),
        ({"root": "x", "receive": {"ae_title": ""}}, "receive.ae_title is ''"),
        ({"root": "x", "receive": {"ae_title": "A" * 17}}, "expected 1 to 16 characters"),
        ({"root": "x", "receive": {"calling_ae_titles": "PACS"}}, "expected a list"),
        ({"root": "x", "receive": {"max_pdu": 10}}, "receive.max_pdu is 10"),
        ({"root": "x", "receive": {"max_associations": 0}}, "receive.max_associations is 0"),
        ({"root": "x", "receive": {"tls": {}}}, "receive.tls.cert is missing"),
        ({"root": "x", "threshold": 2}, "threshold is 2"),
        ({"root": "x", "sr_class": "2d"}, "sr_class is '2d'"),
        ({"root": "x", "send": [{"host": "h"}]}, "send[0].name is missing"),
        ({"root": "x", "send": [{"name": "a"}]}, "send 'a' needs host, port and ae_title, or url"),
        ({"root": "x", "send": [DIMSE, DIMSE]}, "two destinations in send have one name"),
        ({"root": "x", "send": [DIMSE | {"port": 0}]}, "send 'a' port is 0"),
        ({"root": "x", "send": [DIMSE | {"objects": ["ko"]}]}, "'ko' is none of sr, gsps"),
        ({"root": "x", "send": [{"name": "a", "url": "pacs"}]}, "expected http:// or https://"),
        ({"root": "x", "complete": {"qido": "http://u:p@h"}}, "put a token into token_file"),
        ({"root": "x", "complete": {"quiet_s": -1}}, "complete.quiet_s is -1"),
        ({"root": "x", "keep": {"days": 0}}, "keep.days is 0"),
        ({"root": "x", "retry_s": float("nan")}, "retry_s is nan"),
        ({"root": "x", "retry_s": float("inf")}, "retry_s is inf, expected"),
        ({"root": "x", "receive": {"min_free_mb": float("inf")}}, "min_free_mb is inf, expected"),
        ({"root": "x", "complete": {"wait_s": -5}}, "complete.wait_s is -5.0, expected 0 or more"),
        (
            {"root": "x", "receive": {"max_instance_mb": 9000, "max_study_mb": 10}},
            "receive.max_instance_mb is 9000, expected at most receive.max_study_mb, 10",
        ),
        ({"root": "x", "send": [DIMSE | {"name": ""}]}, "has the name '', expected some"),
        ({"root": "x", "send": [DIMSE | {"objects": []}]}, "send 'a' objects is [], expected at"),
        ({"root": "x", "send": [DIMSE | {"ca": "c"}]}, "send 'a' ca is 'c', expected none"),
        ({"root": "x", "send": [DIMSE | {"token_file": "t"}]}, "token_file is 't', expected none"),
        ({"root": "x", "send": [STOW | {"port": 99}]}, "send 'a' port is 99, expected none"),
        ({"root": "x", "send": [STOW | {"tls": {"ca": "c"}}]}, "send 'a' tls is Tls("),
        ({"root": "x", "send": [STOW | {"ca": "/no/c"}]}, "ca is '/no/c', expected a file"),
        ({"root": "x", "send": [STOW | {"url": "http://h:99999"}]}, "expected a port from 0 to"),
        (
            {"root": "x", "send": [DIMSE | {"tls": {"ca": "/no/c"}}]},
            "send 'a' tls.ca is '/no/c', expected a file that exists",
        ),
        ({"root": "x", "complete": {"ca": "c"}}, "complete.ca is 'c', expected none without"),
        ({"root": "x", "receive": {"tls": {"cert": "/no/c"}}}, "receive.tls.cert is '/no/c'"),
        ("root: x\nthreads: 2\nthreads: 4", "threads is there 2 times in what begins in line 1"),
        ("root: x\nkeep:\n  days: 1\n  days: 2", "days is there 2 times in what begins in line 3"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(str(tmp_path / "node.yaml"))


def test_every_key_is_in_the_docs():
    import dataclasses

    from ich_det2.serve import config

    text = DOCS.read_text()
    for kind in (config.ServeConfig, config.Receive, config.Complete, config.Destination,
                 config.Keep, config.Http, config.Tls):  # fmt: skip
        for field in dataclasses.fields(kind):
            assert re.search(rf"[`.]{field.name}\b", text), field.name
