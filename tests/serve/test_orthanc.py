"""The loop with a real PACS: Orthanc (Debian: orthanc, orthanc-dicomweb)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ich_det2.phantom import write_exam

LOOP = Path(__file__).with_name("pacs_loop.py")
NETWORK = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def missing():
    if shutil.which("Orthanc") is None:
        return "Orthanc is not installed (Debian: orthanc, orthanc-dicomweb)"
    if not list(Path("/usr").glob("*/orthanc/**/libOrthancDicomWeb.so")):
        return "Orthanc's DICOMweb is not installed (Debian: orthanc-dicomweb)"
    # It listens on all addresses, whatever it is told.
    if shutil.which("unshare") is None or subprocess.run([*NETWORK, "true"]).returncode:
        return "no network of its own can be made here"
    return ""


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_a_study_of_orthanc_is_answered_once_by_c_store_and_by_stow(tmp_path):
    write_exam(tmp_path / "exam", size=64)
    for path in sorted((tmp_path / "exam").iterdir())[4:]:
        path.unlink()
    argv = [*NETWORK, sys.executable, str(LOOP), str(tmp_path), str(tmp_path / "exam")]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=150)
    assert told.returncode == 0, told.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    found = json.loads(told.stdout.splitlines()[-1])
    (before, text), (after, _) = found["reconciled"]
    assert (before, after) == (1, 0) and ", 1 of them not whole here." in text
    # A report, key images, a presentation state and a picture of each slice, in the study.
    assert found["first"] == [["CT", 4], ["KO", 1], ["OT", 4], ["PR", 1], ["SR", 1]]
    assert found["again"] == found["first"] and found["added"] == 0 and found["studies"] == 1
