"""The log: one JSON object a line, without identities."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import traceback

_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def study_key(uid: str) -> str:
    """What tells a study from others in the log, and nobody whose it is: ``status --uids`` leads
    back."""
    return hashlib.sha256(uid.encode()).hexdigest()[:12]


class JsonFormatter(logging.Formatter):
    """Time, level, event and what else was said of it. Of an error where it happened, not its text,
    which may hold names of files or of patients."""

    def format(self, record: logging.LogRecord) -> str:
        said = {k: v for k, v in vars(record).items() if k not in _OWN}
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **said,
        }
        if record.exc_info and record.exc_info[0]:
            frames = traceback.extract_tb(record.exc_info[2])[-5:]
            line["error"] = record.exc_info[0].__name__
            line["at"] = [f"{f.name}:{f.lineno}" for f in frames]
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Sends this package's log, and nobody else's below errors, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.ERROR, force=True)
    logging.getLogger("ich_det2").setLevel(logging.INFO)
    # They name patients, files and addresses.
    for name in ("pynetdicom", "pydicom", "dicomweb_client", "urllib3", "highdicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
