"""What a node owes: a journal in SQLite that a loss of power leaves whole.

It is the record of the six promises in docs/serving.md. A study's ``version`` counts the changes of
what was received; it is answered if its ``answered`` version is that one, so what arrives during or
after the diagnosis reopens it, in the same transaction that records it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_SCHEMA = """
CREATE TABLE IF NOT EXISTS studies (
  uid TEXT PRIMARY KEY, first_at REAL NOT NULL, last_at REAL NOT NULL, version INTEGER NOT NULL,
  answered INTEGER NOT NULL DEFAULT 0, expected INTEGER, attempts INTEGER NOT NULL DEFAULT 0,
  next_at REAL NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', verdict TEXT NOT NULL DEFAULT '',
  complete INTEGER NOT NULL DEFAULT 0, removed INTEGER NOT NULL DEFAULT 0,
  gone INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE IF NOT EXISTS instances (
  uid TEXT PRIMARY KEY, study TEXT NOT NULL REFERENCES studies(uid), path TEXT NOT NULL,
  bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS instances_of_study ON instances(study);
CREATE TABLE IF NOT EXISTS results (
  uid TEXT PRIMARY KEY, study TEXT NOT NULL REFERENCES studies(uid), version INTEGER NOT NULL,
  kind TEXT NOT NULL, path TEXT NOT NULL, at REAL NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS results_of_study ON results(study);
CREATE TABLE IF NOT EXISTS deliveries (
  result TEXT NOT NULL REFERENCES results(uid), destination TEXT NOT NULL, sent_at REAL,
  attempts INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0,
  error TEXT NOT NULL DEFAULT '', PRIMARY KEY (result, destination)) STRICT;
CREATE INDEX IF NOT EXISTS deliveries_open ON deliveries(next_at) WHERE sent_at IS NULL;
"""

_STATE = """CASE
  WHEN version > answered AND error <> '' THEN 'failed'
  WHEN version > answered THEN 'receiving'
  WHEN EXISTS (SELECT 1 FROM deliveries d JOIN results r ON r.uid = d.result
               WHERE r.study = studies.uid AND d.sent_at IS NULL) THEN 'answered'
  ELSE 'sent' END"""

STATES = ("receiving", "failed", "answered", "sent")
"""Of a study: something of it is not diagnosed yet; the last try failed, and there will be another;
something of the answer is to be sent; all is done."""


class Study(NamedTuple):
    """A row of the studies, and its state. ``gone`` is how many instances it had when it was
    removed: if fewer come again, it is not complete."""

    uid: str
    first_at: float
    last_at: float
    version: int
    answered: int
    expected: int | None
    attempts: int
    next_at: float
    error: str
    verdict: str
    complete: int
    removed: int
    gone: int
    state: str


class Delivery(NamedTuple):
    """An object that is to be sent."""

    result: str
    destination: str
    study: str
    kind: str
    path: str
    attempts: int


class Journal:
    """Of a node; used by its threads at will."""

    def __init__(self, path: str | Path):
        """
        Args:
            path: of the SQLite file; made if need be.
        """
        self._lock = threading.RLock()
        self._root = Path(path).resolve().parent
        self.files = threading.Lock()
        """Held while files and the rows that name them are changed together."""
        # With a lock of our own: handlers of associations run in threads of theirs.
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)
        columns = {row[1] for row in self._db.execute("PRAGMA table_info(studies)")}
        if "gone" not in columns:  # of an older journal
            self._db.execute("ALTER TABLE studies ADD COLUMN gone INTEGER NOT NULL DEFAULT 0")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _all(self, query: str, *values) -> list[tuple]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _place(self, stored: str) -> str:
        """Where a file is. It is stored as ``incoming/STUDY/NAME`` or ``results/STUDY/NAME``, since
        the node's folder may be moved, or be written otherwise; older journals have more before."""
        return os.fspath(self._root.joinpath(*Path(stored).parts[-3:]))

    # ---- what is received ------------------------------------------------------------------------

    def instance(self, uid: str) -> tuple[str, str, str] | None:
        """Study, path and SHA-256 of an instance that is there."""
        for study, path, sha256 in self._all(
            "SELECT study, path, sha256 FROM instances WHERE uid=?", uid
        ):
            return study, self._place(path), sha256
        return None

    def study_bytes(self, study: str) -> int:
        """Of a study's instances."""
        return self._all("SELECT COALESCE(SUM(bytes), 0) FROM instances WHERE study=?", study)[0][0]

    def add_instance(self, uid: str, study: str, path: str, size: int, sha256: str) -> None:
        """Records an instance that is on disk; its study is not answered from now on."""
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "INSERT INTO studies (uid, first_at, last_at, version) VALUES (?, ?, ?, 1)"
                " ON CONFLICT(uid) DO UPDATE SET last_at=excluded.last_at, version=version+1,"
                " attempts=0, next_at=0, error='', removed=0, expected=NULL",
                (study, now, now),
            )
            db.execute(
                "INSERT INTO instances (uid, study, path, bytes, sha256, at)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT(uid) DO UPDATE SET study=excluded.study,"
                " path=excluded.path, bytes=excluded.bytes, sha256=excluded.sha256, at=excluded.at",
                (uid, study, _stored(path), size, sha256, now),
            )

    def instances(self, study: str) -> list[str]:
        """Paths of a study's instances."""
        rows = self._all("SELECT path FROM instances WHERE study=?", study)
        return [self._place(path) for (path,) in rows]

    # ---- what is to be diagnosed -----------------------------------------------------------------

    def quiet_studies(self, quiet_s: float) -> list[Study]:
        """Those that are not answered, have been quiet for so long, and may be tried (again)."""
        now = time.time()
        return self._studies(
            "version > answered AND last_at <= ? AND next_at <= ? ORDER BY last_at",
            *(now - quiet_s, now),
        )

    def set_expected(self, study: str, expected: int | None, next_at: float) -> None:
        """How many instances the source says there are, and when to look again."""
        with self._transaction() as db:
            db.execute(
                "UPDATE studies SET expected=?, next_at=? WHERE uid=?", (expected, next_at, study)
            )

    def answer(
        self,
        study: str,
        version: int,
        verdict: str,
        complete: bool,
        objects: Iterable[tuple[str, str, str, Iterable[str]]],
    ) -> bool:
        """Records an answer that is on disk, and what of it is to be sent.

        Args:
            study: whose it is.
            version: of the study that was diagnosed.
            verdict: in a word.
            complete: whether all slices were there and were read.
            objects: UID, kind, path and destinations of each.

        Returns:
            Whether nothing has changed since.
        """
        now = time.time()
        with self._transaction() as db:
            for uid, kind, path, destinations in objects:
                db.execute(
                    "INSERT INTO results (uid, study, version, kind, path, at)"
                    " VALUES (?, ?, ?, ?, ?, ?)"
                    " ON CONFLICT(uid) DO UPDATE SET version=excluded.version",
                    (uid, study, version, kind, _stored(path), now),
                )
                db.executemany(
                    "INSERT OR IGNORE INTO deliveries (result, destination) VALUES (?, ?)",
                    [(uid, destination) for destination in destinations],
                )
            db.execute(
                "UPDATE studies SET answered=?, attempts=0, next_at=0, error='', verdict=?,"
                " complete=? WHERE uid=?",
                (version, verdict, int(complete), study),
            )
            return db.execute(
                "SELECT version = answered FROM studies WHERE uid=?", (study,)
            ).fetchone()[0]

    def fail_study(self, study: str, version: int, error: str, next_at: float) -> None:
        """Notes why a study could not be diagnosed, and when it will be tried again; not if more of
        it has come, which is a reason to try at once."""
        with self._transaction() as db:
            db.execute(
                "UPDATE studies SET error=?, attempts=attempts+1, next_at=?"
                " WHERE uid=? AND version=?",
                (error, next_at, study, version),
            )

    def last_reports(self, study: str, before: int) -> list[str]:
        """Paths of the reports of the answer before this version."""
        return [
            self._place(path)
            for (path,) in self._all(
                "SELECT path FROM results WHERE study=? AND kind='sr' AND version=(SELECT"
                " MAX(version) FROM results WHERE study=? AND kind='sr' AND version<?)",
                *(study, study, before),
            )
        ]

    def results(self, study: str) -> list[str]:
        """Paths of a study's answers."""
        rows = self._all("SELECT path FROM results WHERE study=?", study)
        return [self._place(path) for (path,) in rows]

    # ---- what is to be sent ----------------------------------------------------------------------

    def due(self, destination: str, limit: int = 100) -> list[Delivery]:
        """Objects that may be sent there now, the least tried and the oldest first."""
        rows = self._all(
            "SELECT d.result, d.destination, r.study, r.kind, r.path, d.attempts FROM deliveries d"
            " JOIN results r ON r.uid = d.result WHERE d.sent_at IS NULL AND d.destination=?"
            " AND d.next_at <= ? ORDER BY d.attempts, r.at, r.rowid LIMIT ?",
            *(destination, time.time(), limit),
        )
        return [d._replace(path=self._place(d.path)) for d in map(Delivery._make, rows)]

    def note_sent(self, delivery: Delivery) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE deliveries SET sent_at=?, error='' WHERE result=? AND destination=?",
                (time.time(), delivery.result, delivery.destination),
            )

    def fail_delivery(self, delivery: Delivery, error: str, next_at: float) -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE deliveries SET attempts=attempts+1, error=?, next_at=?"
                " WHERE result=? AND destination=?",
                (error, next_at, delivery.result, delivery.destination),
            )

    # ---- what a person asks ----------------------------------------------------------------------

    def studies(self, state: str | None = None) -> list[Study]:
        """All studies, or those of a state, the last first."""
        where = f"{_STATE} = ?" if state else "1"
        return self._studies(f"{where} ORDER BY last_at DESC", *([state] if state else []))

    def study(self, uid: str) -> Study | None:
        return next(iter(self._studies("uid = ?", uid)), None)

    def _studies(self, where: str, *values) -> list[Study]:
        columns = ", ".join(Study._fields[:-1])
        query = f"SELECT {columns}, {_STATE} FROM studies WHERE {where}"
        return [Study(*row) for row in self._all(query, *values)]

    def count_instances(self) -> dict[str, int]:
        """By study."""
        return dict(self._all("SELECT study, COUNT(*) FROM instances GROUP BY study"))

    def totals(self) -> dict[str, float]:
        """Studies by state, and what waits; for the metrics."""
        states = dict(self._all(f"SELECT {_STATE} AS state, COUNT(*) FROM studies GROUP BY state"))
        ((instances, size),) = self._all("SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM instances")
        ((waiting, oldest),) = self._all(
            "SELECT COUNT(*), MIN(r.at) FROM deliveries d JOIN results r ON r.uid = d.result"
            " WHERE d.sent_at IS NULL"
        )
        return {
            **{f"studies_{state}": states.get(state, 0) for state in STATES},
            "instances": instances,
            "bytes": size,
            "deliveries_waiting": waiting,
            "oldest_delivery_s": time.time() - oldest if oldest else 0.0,
        }

    def errors(self) -> list[tuple[str, str, str, int]]:
        """Study, destination ("" of the diagnosis), error and attempts of what failed last time."""
        return self._all(
            "SELECT uid, '', error, attempts FROM studies WHERE error <> '' UNION ALL"
            " SELECT r.study, d.destination, d.error, MAX(d.attempts) FROM deliveries d JOIN"
            " results r ON r.uid = d.result WHERE d.sent_at IS NULL AND d.error <> ''"
            " GROUP BY r.study, d.destination, d.error"
        )

    def retry(self) -> int:
        """Lets everything that failed be tried at once; returns how much that is."""
        with self._transaction() as db:
            studies = db.execute("UPDATE studies SET next_at=0 WHERE error <> ''").rowcount
            sendings = db.execute(
                "UPDATE deliveries SET next_at=0 WHERE sent_at IS NULL AND error <> ''"
            ).rowcount
        return studies + sendings

    # ---- what is removed -------------------------------------------------------------------------

    def removable(self) -> list[tuple[str, float, int]]:
        """Study, when the last of it was done, and bytes, of those that are sent; oldest first."""
        return self._all(
            "SELECT studies.uid, MAX(studies.last_at, COALESCE((SELECT MAX(d.sent_at) FROM"
            " deliveries d JOIN results r ON r.uid = d.result WHERE r.study = studies.uid), 0)) AS"
            " done, (SELECT COALESCE(SUM(bytes), 0) FROM instances i WHERE i.study = studies.uid)"
            f" FROM studies WHERE removed = 0 AND {_STATE} = 'sent' ORDER BY done"
        )

    def forget(self, study: str) -> list[str] | None:
        """Takes a study's files out of the journal; the row of the study stays.

        Returns:
            Paths that may be removed; None if the study is not done (any more).
        """
        with self._transaction() as db:
            state = db.execute(f"SELECT {_STATE} FROM studies WHERE uid=?", (study,)).fetchone()
            if state != ("sent",):
                return None
            paths = [
                self._place(path)
                for table in ("instances", "results")
                for (path,) in db.execute(f"SELECT path FROM {table} WHERE study=?", (study,))
            ]
            db.execute(
                "DELETE FROM deliveries WHERE result IN (SELECT uid FROM results WHERE study=?)",
                (study,),
            )
            db.execute(
                "UPDATE studies SET removed=1, gone=MAX(gone, (SELECT COUNT(*) FROM instances i"
                " WHERE i.study = studies.uid)) WHERE uid=?",
                (study,),
            )
            db.execute("DELETE FROM results WHERE study=?", (study,))
            db.execute("DELETE FROM instances WHERE study=?", (study,))
            return paths


def _stored(path: str) -> str:
    """A path as the journal keeps it: its place in the node's folder."""
    return os.path.join(*Path(path).parts[-3:])
