"""A node, a PACS beside it, and studies to send."""

import copy
import importlib.util
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import CTImageStorage

from ich_det2.phantom import write_exam
from ich_det2.serve.config import ServeConfig, _build

DRIVER = Path(__file__).with_name("driver.py")


def load_marked(cfg, masks=False):
    spec = importlib.util.spec_from_file_location("driver", DRIVER)
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    return driver.load_marked(cfg, masks)


@pytest.fixture(scope="session")
def wire():
    """What sends and waits."""
    return SimpleNamespace(send=send, associate=associate, wait_for=wait_for, driver=DRIVER)


class Pacs:
    """A storage SCP that keeps what it is sent, and answers what it is told to."""

    def __init__(self, syntaxes=ALL_TRANSFER_SYNTAXES):
        self.status, self.received, self.sent = 0x0000, {}, []
        self._lock = threading.Lock()
        ae = AE(ae_title="PACS")
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(context.abstract_syntax, syntaxes)
        self._ae, self.port, self._server = ae, 0, None

    def start(self):
        self._server = self._ae.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        self.port = self._server.server_address[1]

    def stop(self):
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _store(self, event):
        if self.status == 0:
            ds = event.dataset
            with self._lock:
                self.sent.append(ds.SOPInstanceUID)
                self.received[ds.SOPInstanceUID] = ds
        return self.status

    def reports(self, study=None):
        return [
            ds
            for ds in self.received.values()
            if ds.Modality == "SR" and study in (None, ds.StudyInstanceUID)
        ]


@pytest.fixture
def pacs():
    server = Pacs()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def pacs_of():
    """Function that starts a PACS that takes these transfer syntaxes; it is stopped behind the
    test."""
    running = []

    def start(syntaxes):
        running.append(Pacs(syntaxes))
        running[-1].start()
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def settings(tmp_path, pacs):
    """Function that gives a node's settings as YAML would; sections are merged."""

    def make(**changed):
        content = {
            "root": str(tmp_path / "node"),
            "receive": {"port": 0, "min_free_mb": 0, "timeout_s": 10},
            # Longer than a busy machine pauses between two slices, or halves would be answered too.
            "complete": {"quiet_s": 1.5},
            "send": [
                {
                    "name": "pacs",
                    "host": "127.0.0.1",
                    "port": pacs.port,
                    "ae_title": "PACS",
                    "objects": ["sr"],
                }
            ],
            "retry_s": 0.2,
            "max_retry_s": 0.5,
            "http": {"port": 0},
        }
        for key, value in changed.items():
            merge = isinstance(value, dict) and key in content
            content[key] = {**content[key], **value} if merge else value
        return content

    return make


@pytest.fixture
def node(settings):
    """Function that starts a node in this process; it is stopped behind the test."""
    from ich_det2.serve.node import Node

    running = []

    def start(*, masks=False, model=None, **changed):
        cfg = _build(ServeConfig, settings(**changed), "")
        one = Node(cfg, model or load_marked(cfg, masks))
        thread = threading.Thread(target=one.run, daemon=True)
        thread.start()
        running.append((one, thread))
        wait_for(lambda: one.receiver.alive)
        return one

    yield start
    for one, thread in running:
        one.stop()
        thread.join(timeout=20)


@pytest.fixture(scope="session")
def exam(tmp_path_factory):
    """Slices of a study, as data sets that are changed at will."""
    folder = tmp_path_factory.mktemp("phantom")
    return [pydicom.dcmread(path) for path in write_exam(folder, size=64)]


@pytest.fixture
def study(exam):
    """Function that gives a study of so many slices, by its number."""

    def make(number=1, n=4):
        slices = []
        for i, ds in enumerate(exam[:n]):
            own = copy.deepcopy(ds)
            own.PatientID = f"PID{number}"
            own.StudyInstanceUID = f"1.2.3.{number}"
            own.SeriesInstanceUID = f"1.2.3.{number}.1"
            own.SOPInstanceUID = f"1.2.3.{number}.1.{i + 1}"
            own.file_meta.MediaStorageSOPInstanceUID = own.SOPInstanceUID
            slices.append(own)
        return slices

    return make


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def associate(port, *, called="ICH_DET2", calling="SENDER", tls=None):
    ae = AE(ae_title=calling)
    ae.add_requested_context(CTImageStorage)
    ae.add_requested_context(CTImageStorage, JPEG2000Lossless)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    return ae.associate("127.0.0.1", port, ae_title=called, tls_args=tls and (tls, "localhost"))


def send(port, slices, **kwargs):
    """Sends slices; returns those that were acknowledged, and the other answers."""
    association = associate(port, **kwargs)
    acknowledged, refused = [], []
    if not association.is_established:
        return acknowledged, [None] * len(slices)
    for ds in slices:
        if not association.is_established:
            refused.append(None)
            continue
        status = association.send_c_store(ds).get("Status")
        if status == 0:
            acknowledged.append(ds.SOPInstanceUID)
        else:
            refused.append(status)
    association.release()
    return acknowledged, refused
