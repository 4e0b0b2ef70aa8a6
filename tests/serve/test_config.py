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
