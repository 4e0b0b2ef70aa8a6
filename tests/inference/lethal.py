"""Diagnoses an archive by workers of which some are killed at study s1.

    python lethal.py JOBS.json SETTINGS.json ENGINE WORKERS DEATHS

A process of its own, since Ray leaves threads behind. The file that ICH_TEST_MARK names has a byte
for each death.
"""

import json
import os
import signal
import sys
from pathlib import Path

from ich_det2.inference import archive


class Lethal(archive.Reader):
    def _write(self, job, diagnosis):
        mark = Path(os.environ["ICH_TEST_MARK"])
        died = mark.stat().st_size if mark.exists() else 0
        if job.name == "s1" and died < int(os.environ["ICH_TEST_DEATHS"]):
            mark.write_bytes(bytes(died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        super()._write(job, diagnosis)


def main(jobs, settings, engine, workers, deaths):
    import lethal  # by its name, so that workers find it

    os.environ["ICH_TEST_DEATHS"] = deaths
    archive.Reader = lethal.Lethal
    jobs = [archive.Job(name, tuple(paths)) for name, paths in json.loads(Path(jobs).read_text())]
    settings = archive.Settings(**json.loads(Path(settings).read_text()))
    archive.diagnose_archive(jobs, settings, engine=engine, workers=int(workers))


if __name__ == "__main__":
    main(*sys.argv[1:])
