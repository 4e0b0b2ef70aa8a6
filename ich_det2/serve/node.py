"""A node: the receiver, the worker and the sender, and what is said of them over HTTP."""

from __future__ import annotations

import fcntl
import logging
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..inference.diagnoser import Diagnoser
from .config import ServeConfig
from .journal import Journal
from .receiver import Receiver
from .sender import Sender
from .worker import Worker, clean, sweep

_PAUSE_S = 0.5
_CLEAN_S = 60.0

logger = logging.getLogger(__name__)


class Node:
    """Runs until it is told to stop; what is left to do is in the journal."""

    def __init__(self, cfg: ServeConfig, model: Diagnoser):
        """
        Args:
            cfg: of the node.
            model: loaded.

        Raises:
            ValueError: another node runs in the same folder.
        """
        self._cfg = cfg
        cfg.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_file = open(cfg.root / "lock", "w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ValueError(f"{cfg.root}: another node runs there.") from error
        self.journal = Journal(cfg.root / "journal.sqlite")
        (cfg.root / "incoming").mkdir(exist_ok=True)
        if swept := sweep(cfg, self.journal):
            logger.info("files of no instance removed", extra={"files": swept})
        self.worker = Worker(cfg, self.journal, model)
        self.sender = Sender(cfg, self.journal)
        self.receiver = Receiver(cfg.receive, cfg.root, self.journal)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=(name, step), name=name, daemon=True)
            for name, step in (("worker", self.worker.work), ("sender", self.sender.send))
        ]
        self._http = _listen(self) if cfg.http.port else None

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self.receiver.start()
        if self._http is not None:
            threading.Thread(target=self._http.serve_forever, name="http", daemon=True).start()
        logger.info("node started", extra={"port": self.receiver.port})

    def run(self) -> None:
        """Starts, and returns when :meth:`stop` was called."""
        self.start()
        while not self._stop.wait(_CLEAN_S):
            self._step("cleaner", lambda: clean(self._cfg, self.journal))
        self._finish()

    def stop(self) -> None:
        """Lets :meth:`run` return; may be called by a signal's handler."""
        self._stop.set()

    def _finish(self) -> None:
        self.receiver.stop()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        for thread in self._threads:  # a study that is being diagnosed is left to the next start
            thread.join(timeout=5)
        if not any(thread.is_alive() for thread in self._threads):
            self.journal.close()
        self._lock_file.close()
        logger.info("node stopped")

    def _loop(self, name: str, step: Callable[[], int]) -> None:
        while not self._stop.is_set():
            if not self._step(name, step):
                self._stop.wait(_PAUSE_S)

    def _step(self, name: str, step: Callable[[], int]) -> int:
        """A fault of one step ends none of the threads."""
        try:
            return step()
        except Exception:
            logger.exception("%s failed", name)
            return 0

    def faults(self) -> list[str]:
        """Why the node is not well; empty if it is."""
        found = []
        if not self.receiver.alive:
            found.append("receiver is not running")
        found += [f"{t.name} is not running" for t in self._threads if not t.is_alive()]
        free = shutil.disk_usage(self._cfg.root).free
        if free < self._cfg.receive.min_free_mb * 2**20:
            found.append("disk is full: nothing is received")
        try:
            self.journal.totals()
        except Exception:
            found.append("journal cannot be read")
        return found

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Metrics, for prometheus-client."""
        totals = self.journal.totals()
        studies = GaugeMetricFamily("ich_studies", "Studies by state.", labels=["state"])
        for name, value in totals.items():
            if name.startswith("studies_"):
                studies.add_metric([name.removeprefix("studies_")], value)
        yield studies
        yield GaugeMetricFamily("ich_instances", "Instances on disk.", totals["instances"])
        yield GaugeMetricFamily("ich_bytes", "Bytes of instances on disk.", totals["bytes"])
        waiting = totals["deliveries_waiting"]
        yield GaugeMetricFamily("ich_deliveries_waiting", "Objects that are to be sent.", waiting)
        oldest = totals["oldest_delivery_s"]
        yield GaugeMetricFamily("ich_oldest_delivery_seconds", "Age of the oldest of them.", oldest)
        free = shutil.disk_usage(self._cfg.root).free
        yield GaugeMetricFamily("ich_disk_free_bytes", "Free where the node writes.", free)
        for name, text, counts in (
            ("ich_received", "Instances by what became of them.", self.receiver.counts),
            ("ich_diagnosed", "Diagnoses by what became of them.", self.worker.counts),
            ("ich_sent", "Objects by what became of them.", self.sender.counts),
        ):
            family = CounterMetricFamily(name, text, labels=["outcome"])
            for outcome, count in sorted(counts.items()):
                family.add_metric([outcome], count)
            yield family
        seconds = self.worker.seconds
        yield CounterMetricFamily("ich_diagnosis_seconds", "Spent on diagnosing.", seconds)


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each connection in a thread of its own, so that a silent one holds up no other."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        logger.warning("http request failed", extra={"reason": sys.exc_info()[0].__name__})


class _Quiet(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format, *args):
        pass


def _listen(node: Node) -> WSGIServer:
    registry = CollectorRegistry()
    registry.register(node)
    metrics = make_wsgi_app(registry)

    def app(environ: dict, start: Callable) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            return metrics(environ, start)
        if environ["PATH_INFO"] == "/healthz":
            faults = node.faults()
            status = "503 Service Unavailable" if faults else "200 OK"
            start(status, [("Content-Type", "text/plain; charset=utf-8")])
            return ["\n".join(faults or ["ok"]).encode() + b"\n"]
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"/metrics, /healthz\n"]

    http = node._cfg.http
    return make_server(http.bind, http.port, app, server_class=_Server, handler_class=_Quiet)


def load_model(cfg: ServeConfig) -> Diagnoser:
    """The model of a node, with so many threads.

    Raises:
        FileNotFoundError, ValueError: one sentence, if it is not whole.
    """
    return Diagnoser.load(cfg.model, backend=cfg.backend, threads=cfg.threads)
