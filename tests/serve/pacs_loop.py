"""A node beside a real Orthanc, in a network of their own; prints what was found as JSON.

    unshare -n sh -c 'ip link set lo up && python pacs_loop.py FOLDER SLICES'

SLICES is a folder of one study. It is stored in Orthanc, which sends it to the node by C-STORE; the
node asks Orthanc by QIDO-RS how many instances there are, and sends the report by C-STORE and the
pictures by STOW-RS. The study is then sent again, which must change nothing.
"""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import yaml

PLUGIN = next(
    (
        str(p)
        for folder in ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/lib")
        for p in Path(folder).rglob("libOrthancDicomWeb.so")
    ),
    None,
)
HTTP, DICOM, NODE = 8042, 4242, 11112
BASE = f"http://127.0.0.1:{HTTP}"


def ask(path, data=None, **headers):
    request = urllib.request.Request(BASE + path, data, headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
    return json.loads(content) if content else None


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except OSError:
            pass
        if time.monotonic() > end:
            sys.exit(f"waited in vain for {condition.__name__}")
        time.sleep(0.2)


def main(folder, slices):
    config = {
        "StorageDirectory": str(folder / "orthanc"),
        "IndexDirectory": str(folder / "orthanc"),
        "HttpPort": HTTP,
        "DicomPort": DICOM,
        "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "Plugins": [PLUGIN],
        "DicomModalities": {
            "ich": {"AET": "ICH_DET2", "Host": "127.0.0.1", "Port": NODE},
        },
        "DicomAlwaysAllowStore": True,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    send = [
        {"name": "c-store", "host": "127.0.0.1", "port": DICOM, "ae_title": "ORTHANC",
         "objects": ["sr", "kos"]},
        {"name": "stow", "url": f"{BASE}/dicom-web", "objects": ["sc", "gsps"]},
    ]  # fmt: skip
    node = {
        "root": str(folder / "node"),
        "receive": {"port": NODE, "min_free_mb": 0, "calling_ae_titles": ["ORTHANC"]},
        "complete": {"quiet_s": 3, "qido": f"{BASE}/dicom-web", "wait_s": 30},
        "send": send,
        "http": {"port": 0},
    }
    (folder / "node.yaml").write_text(yaml.safe_dump(node))
    driver = [sys.executable, str(Path(__file__).with_name("driver.py")), str(folder / "node.yaml")]
    log = open(folder / "log.txt", "w")
    orthanc = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    running = subprocess.Popen(driver, stdout=log, stderr=log)
    try:
        wait_for(lambda: ask("/system"))
        for path in sorted(slices.iterdir()):
            study = ask("/instances", path.read_bytes())["ParentStudy"]
        uid = ask(f"/studies/{study}")["MainDicomTags"]["StudyInstanceUID"]

        def give():
            data = json.dumps({"Resources": [study], "Synchronous": True}).encode()
            return ask("/modalities/ich/store", data)

        def series():
            rows = ask(f"/dicom-web/studies/{uid}/series?includefield=00201209")
            return sorted(
                (row["00080060"]["Value"][0], row.get("00201209", {}).get("Value", [0])[0])
                for row in rows
            )

        def kinds():
            found = series()
            return {"SR", "KO", "PR", "OT"} <= {modality for modality, _ in found} and found

        date = ask(f"/studies/{study}")["MainDicomTags"]["StudyDate"]
        command = [sys.executable, str(Path(__file__).parents[2] / "tools/serve.py"), "reconcile"]
        command += [str(folder / "node.yaml"), "--date", date]

        def reconcile():
            told = subprocess.run(command, capture_output=True, text=True)
            return [told.returncode, told.stdout.splitlines()[-1]]

        wait_for(lambda: (folder / "node/journal.sqlite").is_file())
        reconciled = [reconcile()]
        wait_for(give)
        wait_for(kinds)
        reconciled.append(reconcile())
        time.sleep(6)  # for anything more that might come
        first = series()
        images = [s for s in ask(f"/studies/{study}")["Series"]]
        data = json.dumps({"Resources": images[:1], "Synchronous": True}).encode()
        before = ask("/statistics")["CountInstances"]
        ask("/modalities/ich/store", data)
        time.sleep(6)
        found = {
            "reconciled": reconciled,
            "first": first,
            "again": series(),
            "added": ask("/statistics")["CountInstances"] - before,
            "studies": ask("/statistics")["CountStudies"],
        }
        print(json.dumps(found))
    finally:
        running.terminate()
        orthanc.terminate()
        running.wait(30)
        orthanc.wait(30)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
