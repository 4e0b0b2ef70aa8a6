"""Diagnoses an archive by workers of which one is killed at study s1, once.

    python lethal.py JOBS.json SETTINGS.json ENGINE

A process of its own, since Ray leaves threads behind. The file that ICH_TEST_MARK names says that
one was killed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from ich_det2.inference import archive


def die_once(job):
    mark = Path(os.environ["ICH_TEST_MARK"])
    if job.name == "s1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Lethal(archive.Reader):
    def __call__(self, job):
        die_once(job)
        return super().__call__(job)


def lethal_read(job):
    die_once(job)
    return archive._reader(job)


def main(jobs, settings, engine):
    import lethal  # by its name, so that workers find it

    archive._read, archive.Reader = lethal.lethal_read, lethal.Lethal
    jobs = [archive.Job(name, tuple(paths)) for name, paths in json.loads(Path(jobs).read_text())]
    settings = archive.Settings(**json.loads(Path(settings).read_text()))
    archive.diagnose_archive(jobs, settings, engine=engine, workers=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
