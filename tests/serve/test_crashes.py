"""What was acknowledged is answered, whatever is killed: kill -9 at named points and at any time.

kill -9 leaves the page cache alone, so the order in which things are made to last is looked at in a
record of the calls.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from ich_det2.serve import receiver
from ich_det2.serve.journal import Journal

POINTS = ["received", "journaled", "detected", "stored", "answered", "sent"]


class Process:
    """A node in a process of its own, that is started again in the same folder."""

    def __init__(self, wire, content, folder):
        self.wire, self.folder = wire, folder
        self.content = content
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        content["receive"]["port"] = self.port
        self.file = folder / "node.yaml"
        self.file.write_text(yaml.safe_dump(content))
        self.process = None

    def start(self, *argv):
        command = [sys.executable, str(self.wire.driver), str(self.file), *argv]
        log = open(self.folder / "log.txt", "a")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        log.close()
        self.wire.wait_for(self._listens, 60)

    def _listens(self):
        assert self.process.poll() is None, (self.folder / "log.txt").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def journal(self):
        return Journal(self.content["root"] + "/journal.sqlite")

    def sent(self, studies):
        journal = self.journal()
        try:
            return sorted(s.uid for s in journal.studies("sent")) == sorted(studies)
        finally:
            journal.close()


@pytest.fixture
def process(settings, wire, tmp_path):
    one = Process(wire, settings(), tmp_path)
    yield one
    one.kill()


def check_nothing_is_lost(process, pacs, acknowledged, studies):
    """Every acknowledged instance is on disk, every study answered, every answer there once."""
    journal = process.journal()
    lost = [
        uid
        for uid in acknowledged
        if not (row := journal.instance(uid)) or not os.path.isfile(row[1])
    ]
    journal.close()
    assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged instances are lost"
    answers = {}
    for ds in pacs.reports():
        answers.setdefault(ds.StudyInstanceUID, []).append(ds)
    assert sorted(answers) == sorted(studies)
    for reports in answers.values():
        replaced = {
            ref.ReferencedSOPInstanceUID
            for ds in reports
            for study in ds.get("PredecessorDocumentsSequence", ())
            for series in study.ReferencedSeriesSequence
            for ref in series.ReferencedSOPSequence
        }
        # One is the answer; the others are of parts of the study, and it takes their place.
        assert len([ds for ds in reports if ds.SOPInstanceUID not in replaced]) == 1
        assert len({ds.SOPInstanceUID for ds in reports}) == len(reports)


def send_all(process, slices):
    """As a PACS does: what was not acknowledged is sent again later. Returns what was."""
    acknowledged, _ = process.wire.send(process.port, slices)
    return acknowledged


@pytest.mark.parametrize("point", POINTS)
def test_kill_9_between_two_steps(process, pacs, study, wire, point):
    slices = [*study(1), *study(2)]
    process.start(f"{point}:{3 if point in ('received', 'journaled') else 1}")
    acknowledged = send_all(process, slices)
    assert process.process.wait(timeout=60) == -signal.SIGKILL
    process.start()
    left = [ds for ds in slices if ds.SOPInstanceUID not in acknowledged]
    acknowledged += send_all(process, left)
    assert len(acknowledged) == 8
    wire.wait_for(lambda: process.sent(["1.2.3.1", "1.2.3.2"]), 60)
    check_nothing_is_lost(process, pacs, acknowledged, ["1.2.3.1", "1.2.3.2"])
    if point == "received":  # what was on disk and in no journal is gone, or was sent again
        files = [p for p in (process.folder / "node/incoming").rglob("*.dcm")]
        assert len(files) == 8


def test_kill_9_at_any_time(process, pacs, study, wire):
    rng, acknowledged = random.Random(0), set()
    studies = {f"1.2.3.{i}": study(i) for i in range(1, 5)}
    slices = [ds for own in studies.values() for ds in own]
    for _ in range(4):
        process.start()
        left = [ds for ds in slices if ds.SOPInstanceUID not in acknowledged]
        acknowledged |= {*send_all(process, left[: rng.randint(3, 8)])}
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
    process.start()
    left = [ds for ds in slices if ds.SOPInstanceUID not in acknowledged]
    acknowledged |= {*send_all(process, left)}
    assert len(acknowledged) == 16
    wire.wait_for(lambda: process.sent(studies), 60)
    check_nothing_is_lost(process, pacs, acknowledged, studies)


def resident_mb(process):
    with open(f"/proc/{process.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_memory_stays_flat_over_small_studies_in_a_row(
    settings, wire, tmp_path, pacs, study, request
):
    number = request.config.getoption("--studies")
    process = Process(wire, settings(complete={"quiet_s": 0}), tmp_path)
    try:
        process.start()
        memory = []
        for i in range(1, number + 1):
            assert len(send_all(process, study(i, n=1))) == 1
            if i % (number // 4) == 0:
                studies = [f"1.2.3.{k}" for k in range(1, i + 1)]
                wire.wait_for(lambda studies=studies: process.sent(studies), 120)
                memory.append(resident_mb(process))
        check_nothing_is_lost(
            process, pacs, [f"1.2.3.{i}.1.1" for i in range(1, number + 1)], studies
        )
    finally:
        process.kill()
    print(f"{number} studies: resident MB {memory}")
    # What the first quarter warms up is not counted.
    assert memory[-1] - memory[0] < 40, memory


def test_a_node_that_acknowledges_early_is_found_out(process, pacs, study, wire):
    """The test above has teeth."""
    process.start("--early")
    acknowledged = send_all(process, study(1))
    assert len(acknowledged) == 4
    process.kill()
    process.start()
    wire.wait_for(lambda: process.sent(["1.2.3.1"]), 60)
    with pytest.raises(AssertionError, match="2 of 4 acknowledged instances are lost"):
        check_nothing_is_lost(process, pacs, acknowledged, ["1.2.3.1"])


def test_sigterm_ends_a_node_and_leaves_what_is_to_be_done(process, pacs, study, wire):
    pacs.status = 0xA700
    process.start()
    send_all(process, study(1))
    time.sleep(0.3)
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(timeout=30) == 0
    pacs.status = 0
    process.start()
    wire.wait_for(lambda: process.sent(["1.2.3.1"]), 60)
    assert len(pacs.sent) == 1


def test_a_disk_that_is_full_refuses_and_goes_on_when_there_is_room(
    settings, wire, tmp_path, pacs, study
):
    """On a file system of its own of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    process = Process(wire, settings(root=str(disk / "node")), tmp_path)
    try:
        process.start()
        (disk / "filler").write_bytes(
            bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 60_000)
        )
        acknowledged, refused = wire.send(process.port, [*study(1), *study(2)])
        assert acknowledged and refused and {*refused} == {0xA700}
        (disk / "filler").unlink()
        slices = [*study(1), *study(2)]
        left = [ds for ds in slices if ds.SOPInstanceUID not in acknowledged]
        acknowledged += send_all(process, left)
        assert len(acknowledged) == 8
        wire.wait_for(lambda: process.sent(["1.2.3.1", "1.2.3.2"]), 60)
        check_nothing_is_lost(process, pacs, acknowledged, ["1.2.3.1", "1.2.3.2"])
    finally:
        process.kill()
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_file_lasts_before_it_is_in_the_journal_and_before_it_is_acknowledged(
    node, study, wire, monkeypatch
):
    one, calls = node(), []
    fsync, replace, add = os.fsync, os.replace, one.journal.add_instance

    def record(name, call):
        def recorded(*args, **kwargs):
            calls.append(name if name != "fsync" else _kind(args[0]))
            return call(*args, **kwargs)

        return recorded

    monkeypatch.setattr(receiver.os, "fsync", record("fsync", fsync))
    monkeypatch.setattr(receiver.os, "replace", record("replace", replace))
    monkeypatch.setattr(one.journal, "add_instance", record("journal", add))
    wire.send(one.receiver.port, study(n=1))
    calls.append("acknowledged")
    order = ["fsync file", "replace", "fsync folder", "fsync folder", "journal", "acknowledged"]
    assert calls[: len(order)] == order
    assert one.journal._all("PRAGMA synchronous") == [(2,)]  # FULL
    assert one.journal._all("PRAGMA journal_mode") == [("wal",)]


def _kind(descriptor):
    return "fsync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync file"
