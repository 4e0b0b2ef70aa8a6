"""A node from receiving to sending: what it takes, what it answers, and what it refuses."""

import contextlib
import io
import json
import logging
import socket
import sqlite3
import ssl
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import CTImageStorage

from ich_det2.dicom_out import KINDS
from ich_det2.serve import sender
from ich_det2.serve.config import Receive, ServeConfig, Tls, _build
from ich_det2.serve.dicomweb import Dicomweb
from ich_det2.serve.journal import Journal
from ich_det2.serve.log import JsonFormatter, study_key
from ich_det2.serve.receiver import Receiver
from ich_det2.serve.worker import Worker, clean, sweep

REAL = Path(__file__).parents[3] / "shared/data/dicom"


def states(node):
    return {s.uid: s.state for s in node.journal.studies()}


def test_a_study_goes_in_and_its_answer_comes_back_once(node, pacs, study, wire):
    one = node()
    acknowledged, refused = wire.send(one.receiver.port, study())
    assert len(acknowledged) == 4 and not refused
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    (report,) = pacs.reports()
    assert report.StudyInstanceUID == "1.2.3.1" and report.PatientID == "PID1"
    assert len(pacs.sent) == 1
    # Again the same: nothing is diagnosed or sent anew.
    wire.send(one.receiver.port, study())
    assert one.receiver.counts["repeated"] == 4 and states(one) == {"1.2.3.1": "sent"}


def test_all_kinds_go_where_they_are_asked_for(node, pacs, study, wire, settings):
    to = settings()["send"][0] | {"objects": list(KINDS)}
    one = node(send=[to])
    wire.send(one.receiver.port, study(n=2))
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    found = sorted(ds.Modality for ds in pacs.received.values())
    assert found == ["KO", "OT", "OT", "PR", "SR"]


def test_masks_go_back_as_a_segmentation(node, pacs, study, wire, settings):
    to = settings()["send"][0] | {"objects": ["seg", "sr"]}
    one = node(masks=True, send=[to])
    wire.send(one.receiver.port, study())
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    (seg,) = (ds for ds in pacs.received.values() if ds.Modality == "SEG")
    assert seg.StudyInstanceUID == "1.2.3.1" and seg.NumberOfFrames == 4
    assert np.unpackbits(np.frombuffer(seg.PixelData, np.uint8)).sum() == 4 * 34 * 29
    assert len(pacs.reports()) == 1 and not one.worker.counts["without_segmentation"]


@pytest.mark.parametrize("masks", [False, True])
def test_a_report_goes_where_there_can_be_no_segmentation_and_the_log_says_so(
    node, pacs, study, wire, settings, caplog, masks
):
    to = settings()["send"][0] | {"objects": ["sr", "seg"]}
    slices = study(n=2)
    for ds in slices if masks else ():
        del ds.FrameOfReferenceUID
    one = node(masks=masks, send=[to])
    wire.send(one.receiver.port, slices)
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert [ds.Modality for ds in pacs.received.values()] == ["SR"]
    assert one.worker.counts["without_segmentation"] == 1
    (record,) = (r for r in caplog.records if r.getMessage() == "no segmentation")
    assert ("where they lie" if masks else "boxes and no masks") in record.reason
    assert "1.2.3.1" not in JsonFormatter().format(record)


def test_files_are_kept_as_they_were_sent(node, study, wire):
    one = node()
    ds = study(n=1)[0]
    wire.send(one.receiver.port, [ds])
    (path,) = one.journal.instances("1.2.3.1")
    assert pydicom.dcmread(path) == ds
    if REAL.is_dir():
        real = pydicom.dcmread(REAL / "cq500_693/693_J2KR.dcm")
        assert wire.send(one.receiver.port, [real])[0]
        (path,) = one.journal.instances(real.StudyInstanceUID)
        kept = pydicom.dcmread(path)
        assert kept.file_meta.TransferSyntaxUID == real.file_meta.TransferSyntaxUID
        assert kept.PixelData == real.PixelData


def test_a_late_slice_reopens_a_study_and_its_report_takes_the_place_of_the_first(
    node, pacs, study, wire
):
    one = node()
    wire.send(one.receiver.port, study()[:3])
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    (first,) = pacs.reports()
    wire.send(one.receiver.port, study()[3:])
    assert states(one) == {"1.2.3.1": "receiving"}
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    (second,) = [ds for ds in pacs.reports() if ds.SOPInstanceUID != first.SOPInstanceUID]
    reference = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
    assert reference.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert len(pacs.sent) == 2


def test_a_slice_that_comes_during_the_diagnosis_is_not_lost(node, pacs, study, wire, monkeypatch):
    from ich_det2.serve import worker

    late = []

    def reach(point):
        if point == "detected" and not late:
            late.append(wire.send(one.receiver.port, study()[3:]))

    monkeypatch.setattr(worker, "reach", reach)
    one = node()
    wire.send(one.receiver.port, study()[:3])
    wire.wait_for(lambda: late and states(one) == {"1.2.3.1": "sent"})
    whole = max(pacs.reports(), key=lambda ds: len(_referenced(ds)))
    assert len(_referenced(whole)) == 4


def _referenced(report):
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    return [x for series in evidence for x in series.ReferencedSOPSequence]


def test_a_slice_that_was_changed_at_its_source_takes_the_place_of_the_first(
    node, pacs, study, wire
):
    one = node()
    wire.send(one.receiver.port, study())
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    changed = study()
    for ds in changed:
        ds.PatientID = "CORRECTED"
    wire.send(one.receiver.port, changed)
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    paths = one.journal.instances("1.2.3.1")
    assert len(paths) == 4 == len(list(Path(paths[0]).parent.iterdir()))
    assert {pydicom.dcmread(p).PatientID for p in paths} == {"CORRECTED"}
    # The PACS gets a report of whom the study is now of, in place of the first.
    first, second = pacs.reports()
    assert (first.PatientID, second.PatientID) == ("PID1", "CORRECTED")
    assert "PredecessorDocumentsSequence" in second


def test_an_answer_that_holds_again_takes_the_place_of_the_one_between(node, pacs, study, wire):
    one = node()
    chain = []
    for patient in ("PID1", "OTHER", "PID1", "OTHER"):
        slices = study(n=2)
        for ds in slices:
            ds.PatientID = patient
        wire.send(one.receiver.port, slices)
        wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
        (new,) = [ds for ds in pacs.reports() if ds.SOPInstanceUID not in chain]
        assert new.PatientID == patient
        if chain:
            reference = new.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0]
            (before,) = reference.ReferencedSOPSequence
            assert before.ReferencedSOPInstanceUID == chain[-1]
        chain.append(new.SOPInstanceUID)
    # What says the same of other bytes is no new answer.
    for ds in slices:
        ds.StationName = "ELSEWHERE"
    wire.send(one.receiver.port, slices)
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert pacs.sent == chain


def test_a_study_that_grows_while_others_are_diagnosed_waits_again(tmp_path, monkeypatch):
    cfg = _build(ServeConfig, {"root": str(tmp_path), "complete": {"quiet_s": 0.1}}, "")
    journal, answered = Journal(tmp_path / "journal.sqlite"), []
    for uid in ("1.2.1", "1.2.2"):
        journal.add_instance(f"{uid}.1", uid, "x", 1, "")
    time.sleep(0.2)

    def answer(self, study):
        answered.append(study.uid)
        journal.add_instance("1.2.2.2", "1.2.2", "x", 1, "")

    monkeypatch.setattr(Worker, "answer", answer)
    assert Worker(cfg, journal, None).work() == 1 and answered == ["1.2.1"]


def test_a_study_that_cannot_be_diagnosed_fails_in_sight_and_is_tried_again(
    node, pacs, study, wire
):
    one = node()
    (ds,) = study(n=1)
    whole = ds.PixelData
    ds.PixelData = whole[:100]
    wire.send(one.receiver.port, [ds])
    failed = wire.wait_for(lambda: one.journal.studies("failed"))[0]
    assert "ValueError" in failed.error
    wire.wait_for(lambda: one.journal.study("1.2.3.1").attempts > 1)
    ds.PixelData = whole
    wire.send(one.receiver.port, [ds])
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert one.journal.study("1.2.3.1").error == "" and len(pacs.reports()) == 1


@pytest.mark.parametrize("fault", ["down", "refuses"])
def test_a_pacs_that_is_down_or_refuses_gets_it_later(node, pacs, study, wire, fault):
    one = node()
    if fault == "down":
        pacs.stop()
    else:
        pacs.status = 0xA700
    wire.send(one.receiver.port, study())
    wire.wait_for(lambda: one.journal.errors())
    assert states(one) == {"1.2.3.1": "answered"} and not pacs.sent
    ((_, destination, error, _),) = one.journal.errors()
    assert destination == "pacs"
    assert error.startswith("ConnectionError" if fault == "down" else "C-STORE status 0xA700")
    pacs.status = 0
    if fault == "down":
        pacs.start()
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert len(pacs.sent) == 1 and not one.journal.errors()


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_pacs_that_takes_one_plain_syntax_gets_all_kinds(
    node, pacs_of, study, wire, settings, syntax
):
    pacs = pacs_of([syntax])
    to = settings()["send"][0] | {"port": pacs.port, "objects": [*KINDS]}
    one = node(send=[to])
    wire.send(one.receiver.port, study(n=2))
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert sorted(ds.Modality for ds in pacs.received.values()) == ["KO", "OT", "OT", "PR", "SR"]


def test_a_pacs_that_has_an_answer_already_has_been_sent_it(node, pacs, study, wire):
    one = node()
    pacs.status = 0x0111
    wire.send(one.receiver.port, study())
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert not one.sender.counts["failed"]


def test_stow_tells_what_is_there_already_from_what_failed(monkeypatch):
    answer, items = pydicom.Dataset(), []
    for uid, reason in (("1.1", 0x0111), ("1.2", 0xA700)):
        items.append(pydicom.Dataset())
        items[-1].ReferencedSOPInstanceUID, items[-1].FailureReason = uid, reason
    answer.FailedSOPSequence = items
    client = SimpleNamespace(store_instances=lambda datasets: answer)
    monkeypatch.setattr(Dicomweb, "_client", lambda self: client)
    assert Dicomweb("http://x").store([]) == {"1.2": "STOW-RS failure reason 0xA700"}


def test_a_destination_that_fails_is_tried_once_a_round(tmp_path, monkeypatch):
    to = {"name": "hung", "host": "127.0.0.1", "port": 1, "ae_title": "A"}
    cfg = _build(ServeConfig, {"root": str(tmp_path), "send": [to], "retry_s": 1e-3}, "")
    journal, tried = Journal(tmp_path / "journal.sqlite"), []
    for i in range(3):
        journal.add_instance(f"1.1.{i}", f"1.2.{i}", "x", 1, "")
        journal.answer(f"1.2.{i}", 1, "absent", True, [(f"1.3.{i}", "sr", f"{i}", ["hung"])])
    monkeypatch.setattr(pydicom, "dcmread", lambda path: path.name)

    def store(destination, cfg, datasets):
        tried.append(datasets)
        time.sleep(0.01)  # longer than the pause behind a failure
        raise ConnectionError("no answer")

    monkeypatch.setattr(sender, "store_by_dimse", store)
    one = sender.Sender(cfg, journal)
    # By turns, so that none keeps the others from being tried.
    assert [one.send() for _ in range(4)] == [1] * 4
    assert tried == [["0"], ["1"], ["2"], ["0"]]


def test_twenty_associations_at_once(node, pacs, study, wire):
    one = node(complete={"quiet_s": 5})  # they send by turns
    with ThreadPoolExecutor(20) as pool:
        numbers = range(1, 21)
        told = list(pool.map(lambda i: wire.send(one.receiver.port, study(i)), numbers))
    assert all(len(acknowledged) == 4 and not refused for acknowledged, refused in told)
    wire.wait_for(lambda: list(states(one).values()) == ["sent"] * 20, 60)
    assert sorted(ds.StudyInstanceUID for ds in pacs.reports()) == sorted(
        f"1.2.3.{i}" for i in range(1, 21)
    )
    assert len(pacs.sent) == 20


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "receive", "taken"),
    [
        ({"called": "OTHER"}, {}, False),
        ({"calling": "STRANGER"}, {"calling_ae_titles": ["SENDER"]}, False),
        ({"calling": "SENDER"}, {"calling_ae_titles": ["SENDER"]}, True),
    ],
)
def test_titles_are_checked(node, study, wire, title, receive, taken):
    one = node(receive=receive)
    association = wire.associate(one.receiver.port, **title)
    assert association.is_established == taken
    association.release()


@pytest.mark.parametrize(
    "uid",
    ["../../../tmp/evil", "/etc/passwd", "1.2/../3", "", "1..2", "1.2.", "1." + "1" * 63],
)
@pytest.mark.parametrize("which", ["StudyInstanceUID", "SOPInstanceUID", "SeriesInstanceUID"])
def test_uids_that_are_none_become_no_paths(node, study, wire, uid, which, tmp_path):
    one = node()
    (ds,) = study(n=1)
    ds[which] = pydicom.DataElement(which, "UI", uid, validation_mode=0)
    before = sorted(tmp_path.rglob("*.dcm"))
    association = wire.associate(one.receiver.port)
    try:
        assert association.send_c_store(ds).get("Status") != 0
    except ValueError:
        pass  # the sender's own library refuses it
    association.abort()
    assert sorted(tmp_path.rglob("*.dcm")) == before and not states(one)
    assert wire.send(one.receiver.port, study())[0]


def test_an_instance_of_two_studies_is_refused(node, study, wire):
    one = node()
    wire.send(one.receiver.port, study(n=1))
    (ds,) = study(n=1)
    ds.StudyInstanceUID = "1.2.3.9"
    assert wire.send(one.receiver.port, [ds]) == ([], [0xA900])


def test_what_is_too_large_is_refused_and_the_next_is_taken(node, study, wire):
    one = node(receive={"max_study_mb": 0.02, "max_instance_mb": 0.02})
    slices = study()  # of 9 KB each
    acknowledged, refused = wire.send(one.receiver.port, slices)
    assert len(acknowledged) == 2 and refused == [0xA700] * 2
    (large,) = study(2, n=1)
    large.PixelData = bytes(200_000)
    association = wire.associate(one.receiver.port)
    assert association.send_c_store(large).get("Status") != 0
    association.abort()
    assert wire.send(one.receiver.port, study(3, n=1))[0]


def test_less_disk_than_asked_for_refuses_all(node, study, wire):
    one = node(receive={"min_free_mb": 1e9})
    assert wire.send(one.receiver.port, study(n=1)) == ([], [0xA700])
    assert one.receiver.counts["refused_disk"] == 1 and "disk is full" in one.faults()[0]


def test_a_disk_that_is_full_refuses_and_loses_nothing(node, pacs, study, wire, monkeypatch):
    from ich_det2.serve import receiver

    one, full = node(), [True]
    write = receiver.write_durably

    def fill(path, content):
        if full[0]:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(receiver, "write_durably", fill)
    assert wire.send(one.receiver.port, study()) == ([], [0xA700] * 4)
    assert not states(one)
    full[0] = False
    assert len(wire.send(one.receiver.port, study())[0]) == 4
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})


def deflate(ds, tail):
    """The slice in the deflated syntax, with so much behind its pixels."""
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.add_new(0x00091010, "OB", bytes(tail))
    ds.add_new(0x00090010, "LO", "X")
    return ds


def test_zip_bombs_are_refused_and_honest_deflated_slices_taken(node, study, wire):
    one = node(receive={"max_instance_mb": 4})

    def ask(ds):
        ae = AE(ae_title="SENDER")
        ae.add_requested_context(CTImageStorage, DeflatedExplicitVRLittleEndian)
        association = ae.associate("127.0.0.1", one.receiver.port, ae_title="ICH_DET2")
        try:
            return association.send_c_store(ds).get("Status")
        finally:
            association.release()

    assert ask(deflate(study(1, n=1)[0], 20_000_000)) == 0xA700
    assert ask(deflate(study(2, n=1)[0], 10)) == 0
    assert list(states(one)) == ["1.2.3.2"]


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def test_a_pdu_that_claims_gigabytes_ends_its_connection(node, study, wire):
    one = node()
    for kind in (1, 4, 7):
        with connect(one.receiver.port) as peer:
            peer.sendall(struct.pack(">BBL", kind, 0, 0xFFFFFFFF) + b"x" * 1000)
            peer.settimeout(15)
            with contextlib.suppress(ConnectionError):
                while peer.recv(4096):
                    pass
    assert wire.send(one.receiver.port, study())[0]


@pytest.mark.parametrize("begun", [b"\x01\x00\x00", struct.pack(">BBL", 1, 0, 200) + b"\x00\x01"])
def test_pdus_that_stall_give_their_associations_back(node, study, wire, begun):
    one = node(receive={"timeout_s": 1, "max_associations": 2})
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connect(one.receiver.port)).sendall(begun)
        wire.wait_for(lambda: len(wire.send(one.receiver.port, study())[0]) == 4, 15)


@settings(max_examples=25)
@given(st.binary(max_size=400), st.sampled_from([None, 1, 2, 4, 5, 7]))
def test_garbage_ends_nothing_but_its_connection(hostile_node, junk, kind):
    one, study, wire = hostile_node
    with connect(one.receiver.port) as peer:
        head = b"" if kind is None else struct.pack(">BBL", kind, 0, len(junk))
        with contextlib.suppress(ConnectionError):
            peer.sendall(head + junk)
    assert one.receiver.alive


@pytest.fixture
def hostile_node(node, study, wire):
    one = node()
    yield one, study, wire
    # Threads of the last connections may still count.
    wire.wait_for(lambda: len(wire.send(one.receiver.port, study())[0]) == 4)


@settings(max_examples=20)
@given(st.data())
def test_damaged_data_sets_are_refused_or_kept_and_end_nothing(hostile_node, data):
    one, study, wire = hostile_node
    (ds,) = study(77, n=1)
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    whole = bytearray(file.getvalue()[ds.file_meta.FileMetaInformationGroupLength + 144 :])
    for _ in range(data.draw(st.integers(1, 5))):
        whole[data.draw(st.integers(0, min(len(whole), 1500) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(whole), 10, 200, 900]))
    ae = AE(ae_title="SENDER")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    ae.dimse_timeout = 3
    association = ae.associate("127.0.0.1", one.receiver.port, ae_title="ICH_DET2")
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CTImageStorage, ds.SOPInstanceUID
    request.DataSet = io.BytesIO(bytes(whole[:cut]))
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    association.dimse.get_msg(block=True)
    association.abort()
    root = one._cfg.root
    assert {p.parent.parent for p in root.rglob("*.dcm")} <= {root / "incoming", root / "results"}
    assert one.receiver.alive


# ---- what waits, what is removed -----------------------------------------------------------------


class Source:
    """Stands for the PACS's QIDO."""

    def __init__(self, expected):
        self.expected = expected

    def count_instances(self, study):
        if isinstance(self.expected, Exception):
            raise self.expected
        return self.expected


def test_half_a_study_waits_and_is_answered_as_incomplete(node, pacs, study, wire):
    one = node(complete={"quiet_s": 0.3, "wait_s": 3.0})
    one.worker._source = Source(4)
    wire.send(one.receiver.port, study()[:2])
    wire.wait_for(lambda: one.journal.study("1.2.3.1").expected == 4)
    assert not pacs.sent
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert one.journal.study("1.2.3.1").complete == 0
    (half,) = pacs.reports()
    (_, text) = half.ContentSequence[-1].ContentSequence
    assert "2 not read or missing" in text.TextValue
    wire.send(one.receiver.port, study()[2:])
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert one.journal.study("1.2.3.1").complete == 1 and len(pacs.reports()) == 2


def test_a_source_that_is_down_keeps_no_study_from_its_answer(node, pacs, study, wire):
    one = node()
    one.worker._source = Source(ConnectionError("down"))
    wire.send(one.receiver.port, study())
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})


def test_studies_are_removed_when_they_are_sent_and_old_and_not_before(
    node, pacs, study, wire, monkeypatch
):
    one = node()
    pacs.status = 0xA700
    wire.send(one.receiver.port, study(1))
    wire.wait_for(lambda: one.journal.errors())
    cfg = _build(ServeConfig, {"root": str(one._cfg.root), "keep": {"days": 1e-9}}, "")
    assert clean(cfg, one.journal) == 0
    pacs.status = 0
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert clean(one._cfg, one.journal) == 0
    assert clean(cfg, one.journal) == 1 and clean(cfg, one.journal) == 0
    assert not list(one._cfg.root.rglob("*.dcm")) and one.journal.study("1.2.3.1").removed
    wire.send(one.receiver.port, study(1, n=1))  # a part of it comes again
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert not one.journal.study("1.2.3.1").complete
    wire.send(one.receiver.port, study(1))  # all of it does
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    assert one.journal.study("1.2.3.1").complete


def test_slices_that_arrive_while_their_study_is_removed_are_kept(
    node, pacs, study, wire, monkeypatch
):
    one = node()
    wire.send(one.receiver.port, study())
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    forget = one.journal.forget
    again = threading.Thread(target=lambda: wire.send(one.receiver.port, study()))

    def slow(uid):
        paths = forget(uid)
        again.start()
        again.join(timeout=1)
        return paths

    monkeypatch.setattr(one.journal, "forget", slow)
    cfg = _build(ServeConfig, {"root": str(one._cfg.root), "keep": {"days": 1e-9}}, "")
    assert clean(cfg, one.journal) == 1
    again.join()
    paths = one.journal.instances("1.2.3.1")
    assert len(paths) == 4 and all(Path(path).is_file() for path in paths)


def test_the_oldest_go_first_where_they_are_too_many(node, pacs, study, wire):
    one = node()
    for i in (1, 2, 3):
        wire.send(one.receiver.port, study(i))
        wire.wait_for(lambda i=i: states(one).get(f"1.2.3.{i}") == "sent")
    size = one.journal.study_bytes("1.2.3.1")
    keep = {"max_gb": 2.5 * size / 2**30}
    cfg = _build(ServeConfig, {"root": str(one._cfg.root), "keep": keep}, "")
    assert clean(cfg, one.journal) == 1
    assert [s.uid for s in one.journal.studies() if s.removed] == ["1.2.3.1"]


# ---- who may look --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A CA, and certificates of the node and of a stranger."""
    folder = tmp_path_factory.mktemp("tls")

    def run(*argv):
        subprocess.run(["openssl", *argv], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    for ca in ("ca", "other"):
        run(*new, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}")
    for name, ca in (("node", "ca"), ("stranger", "other")):
        sign = (
            "-CA",
            f"{ca}.pem",
            "-CAkey",
            f"{ca}.key",
            "-addext",
            "subjectAltName=DNS:localhost",
        )
        run(*new, *sign, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", "/CN=localhost")
    return folder


def test_tls_with_a_ca_of_ones_own_lets_in_who_has_a_certificate_of_it(
    node, study, wire, certificates
):
    own = {"cert": "node.pem", "key": "node.key", "ca": "ca.pem"}
    tls = {k: str(certificates / v) for k, v in own.items()}
    one = node(receive={"tls": tls})
    friend = Tls(**tls).client()
    assert len(wire.send(one.receiver.port, study(), tls=friend)[0]) == 4
    stranger = tls | {
        k: str(certificates / f"stranger.{v}") for k, v in (("cert", "pem"), ("key", "key"))
    }
    for context in (Tls(**stranger).client(), Tls(ca=tls["ca"]).client(), None):
        acknowledged, _ = wire.send(one.receiver.port, study(2), tls=context)
        assert not acknowledged
    with pytest.raises(ssl.SSLError):
        with connect(one.receiver.port) as peer:
            wrong = Tls(ca=str(certificates / "other.pem")).client()
            wrong.wrap_socket(peer, server_hostname="localhost")
    assert list(states(one)) == ["1.2.3.1"]


def test_a_silent_peer_keeps_no_other_from_tls(node, study, wire, certificates):
    tls = {k: str(certificates / f"node.{v}") for k, v in (("cert", "pem"), ("key", "key"))}
    one = node(receive={"tls": tls, "timeout_s": 5})
    friend = Tls(ca=str(certificates / "ca.pem")).client()
    with connect(one.receiver.port) as silent:
        assert len(wire.send(one.receiver.port, study(), tls=friend)[0]) == 4
        silent.settimeout(15)
        assert silent.recv(1) == b""  # not for ever


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_metrics_and_health(node, pacs, study, wire):
    port = free_port()
    one = node(http={"port": port})
    wire.send(one.receiver.port, study())
    wire.wait_for(lambda: states(one) == {"1.2.3.1": "sent"})
    # What is sent is counted once it is in the journal.
    wire.wait_for(lambda: "ich_sent_total{" in get(port, "/metrics")[1])
    status, text = get(port, "/metrics")
    assert status == 200
    lines = text.splitlines()
    assert 'ich_studies{state="sent"} 1.0' in lines
    assert 'ich_received_total{outcome="received"} 4.0' in lines
    assert 'ich_sent_total{outcome="sent"} 1.0' in lines
    assert "1.2.3.1" not in text and "PID1" not in text
    assert get(port, "/healthz") == (200, "ok\n")
    one.receiver.stop()
    status, text = wire.wait_for(lambda: (found := get(port, "/healthz"))[0] == 503 and found)
    assert "receiver is not running" in text
    assert get(port, "/journal.sqlite")[0] == 404


def test_silent_connections_hold_up_no_question_of_health(node):
    port = free_port()
    node(http={"port": port})
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        start = time.monotonic()
        assert get(port, "/healthz")[0] == 200
        assert time.monotonic() - start < 5


def test_the_log_says_what_happened_and_not_to_whom(node, pacs, study, wire, caplog):
    caplog.set_level(logging.INFO, "ich_det2")
    one = node()
    slices = study()
    for ds in slices:
        ds.PatientName = "ZWICKY^JANUSZ"
    wire.send(one.receiver.port, slices)
    (broken,) = study(2, n=1)
    broken.PixelData = b"00"
    wire.send(one.receiver.port, [broken])
    wire.wait_for(lambda: one.journal.studies("failed") and one.journal.studies("sent"))

    def log():
        return [JsonFormatter().format(r) for r in caplog.records if r.name.startswith("ich_det2")]

    # A step is logged once it is in the journal.
    expected = {"study answered", "answer sent", "study failed"}
    wire.wait_for(lambda: expected <= {json.loads(line)["event"] for line in log()})
    lines = log()
    text = "\n".join(lines)
    for secret in ("ZWICKY", "PID1", "PID2", "1.2.3.1", str(one._cfg.root)):
        assert secret not in text
    assert study_key("1.2.3.1") in text


def test_two_nodes_in_one_folder_are_refused(node):
    node()
    with pytest.raises(ValueError, match="another node runs there"):
        node()


def test_memory_of_pixels_is_not_kept(node, pacs, study, wire):
    """Studies that come and go leave nothing behind but rows of the journal."""
    one = node(keep={"days": 1e-9})
    for i in range(1, 6):
        wire.send(one.receiver.port, study(i))
        wire.wait_for(lambda i=i: states(one).get(f"1.2.3.{i}") == "sent")
        clean(one._cfg, one.journal)
    assert not list(one._cfg.root.rglob("*.dcm"))


# ---- where its folder is -------------------------------------------------------------------------


def received(root, study, wire):
    """A node's folder, with the files of a study that was acknowledged; nothing runs in it."""
    root.mkdir()
    journal = Journal(root / "journal.sqlite")
    receiver = Receiver(Receive(port=0, min_free_mb=0), root, journal)
    receiver.start()
    assert len(wire.send(receiver.port, study())[0]) == 4
    receiver.stop()
    journal.close()


def swept(root):
    """What is left where a node starts in a folder: files, and those that the journal finds."""
    journal = Journal(root / "journal.sqlite")
    sweep(ServeConfig(root=root), journal)
    found = [path for path in journal.instances("1.2.3.1") if Path(path).is_file()]
    journal.close()
    return len(list(root.rglob("*.dcm"))), len(found)


@pytest.mark.parametrize("written", ["relative", "symlink", "moved", "older"])
def test_a_folder_that_is_written_otherwise_or_moved_keeps_what_was_acknowledged(
    study, wire, tmp_path, monkeypatch, written
):
    monkeypatch.chdir(tmp_path)
    root = other = tmp_path / "node"
    received(Path("node") if written == "relative" else root, study, wire)
    if written == "symlink":
        other = tmp_path / "link"
        other.symlink_to(root)
    elif written == "moved":
        other = root.rename(tmp_path / "other")
    elif written == "older":  # which stored paths as they were written
        with contextlib.closing(sqlite3.connect(root / "journal.sqlite")) as db, db:
            db.execute("UPDATE instances SET path = '/var/old/' || path")
            db.execute("ALTER TABLE studies DROP COLUMN gone")
    assert swept(other) == (4, 4)


def test_files_are_left_alone_where_the_journal_misses_some(study, wire, tmp_path):
    received(tmp_path / "node", study, wire)
    first, *_ = sorted((tmp_path / "node/incoming/1.2.3.1").iterdir())
    first.rename(first.with_name("renamed.dcm"))
    assert swept(tmp_path / "node") == (4, 3)


def test_a_slice_that_is_repeated_to_a_folder_written_otherwise_stays(
    study, wire, tmp_path, monkeypatch
):
    received(tmp_path / "node", study, wire)
    (tmp_path / "node/incoming/1.2.3.1").rename(tmp_path / "lost")
    monkeypatch.chdir(tmp_path)
    journal = Journal("node/journal.sqlite")
    receiver = Receiver(Receive(port=0, min_free_mb=0), Path("node"), journal)
    receiver.start()
    assert len(wire.send(receiver.port, study())[0]) == 4
    receiver.stop()
    journal.close()
    assert swept(tmp_path / "node") == (4, 4)
