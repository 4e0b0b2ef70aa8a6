"""The storage SCP: what it acknowledges is on disk and in the journal."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import shutil
import socket
import threading
import uuid
import zlib
from collections import Counter
from pathlib import Path

import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, Association, evt
from pynetdicom.sop_class import (
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    Verification,
)
from pynetdicom.transport import AssociationSocket, ThreadedAssociationServer

from .config import Receive
from .journal import Journal
from .points import reach

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
"""PS3.4, table B.2-1."""

STORAGE = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
"""What is received: CT images. Of what else a study holds nothing is asked for."""

# Some devices write zeros before a number, which the standard forbids and no path minds.
_UID = re.compile(r"[0-9]+(\.[0-9]+)+", re.ASCII)
_MB = 2**20

logger = logging.getLogger(__name__)


class Refused(Exception):
    """An instance that is not taken; ``status`` is the answer, ``reason`` one word for counting."""

    def __init__(self, status: int, reason: str, text: str):
        super().__init__(text)
        self.status, self.reason = status, reason


class Receiver:
    """Listens for studies."""

    def __init__(self, cfg: Receive, root: Path, journal: Journal):
        """
        Args:
            cfg: where to listen, to whom, and how much to take.
            root: folder of the node; ``incoming/<study>/`` in it takes the files.
            journal: of the node.
        """
        self._cfg, self._journal, self._incoming = cfg, journal, root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        self.counts: Counter[str] = Counter()
        """Instances received, repeated, and refused by reason."""
        ae = AE(ae_title=cfg.ae_title)
        for storage in STORAGE:
            ae.add_supported_context(storage, ALL_TRANSFER_SYNTAXES)
        ae.add_supported_context(Verification)
        ae.require_called_aet = True
        ae.require_calling_aet = list(cfg.calling_ae_titles)
        ae.maximum_associations = cfg.max_associations
        ae.maximum_pdu_size = cfg.max_pdu
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = cfg.timeout_s
        self._ae = ae
        self._server: ThreadedAssociationServer | None = None

    @property
    def port(self) -> int:
        """Where it listens; that of the settings, unless that is 0, which takes any."""
        return self._server.server_address[1] if self.alive else self._cfg.port

    @property
    def alive(self) -> bool:
        """Whether it listens."""
        return self._server is not None and self._server.socket.fileno() >= 0

    def start(self) -> None:
        """Listens, in a thread.

        Raises:
            OSError: the port is taken, or may not be.
        """
        self._server = self._ae.make_server(
            (self._cfg.bind, self._cfg.port),
            server_class=_Server,
            ssl_context=self._cfg.tls and self._cfg.tls.server(),
            evt_handlers=[
                (evt.EVT_CONN_OPEN, lambda event: _bound(event.assoc, self._cfg)),
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_C_ECHO, lambda event: SUCCESS),
            ],
        )
        self._ae._servers.append(self._server)  # as start_server does; its shutdown counts on it
        threading.Thread(target=self._server.serve_forever, name="receiver", daemon=True).start()

    def stop(self) -> None:
        """Takes no more associations, and ends those that there are."""
        if self.alive:
            self._server.shutdown()

    def _store(self, event: evt.Event) -> int:
        """Answers a C-STORE request."""
        try:
            with _budget(event):
                self._take(event)
        except Refused as refusal:
            self.counts[f"refused_{refusal.reason}"] += 1
            logger.warning(
                "instance refused",
                extra={"status": f"0x{refusal.status:04X}", "reason": str(refusal)},
            )
            return refusal.status
        except OSError as error:  # such as a full disk
            self.counts["refused_disk"] += 1
            logger.error(
                "instance refused", extra={"status": "0xA700", "reason": str(error.strerror)}
            )
            return OUT_OF_RESOURCES
        except Exception:  # a journal that cannot be written, for one: nothing is acknowledged
            self.counts["refused_error"] += 1
            logger.exception("instance refused", extra={"status": "0xA700"})
            return OUT_OF_RESOURCES
        return SUCCESS

    def _take(self, event: evt.Event) -> None:
        cfg = self._cfg
        if shutil.disk_usage(self._incoming).free < cfg.min_free_mb * _MB:
            raise Refused(OUT_OF_RESOURCES, "disk", "less than receive.min_free_mb is free")
        content = event.encoded_dataset()
        if len(content) > cfg.max_instance_mb * _MB:
            raise Refused(OUT_OF_RESOURCES, "size", "instance larger than receive.max_instance_mb")
        study, uid = self._identify(event, content)
        digest = hashlib.sha256(content).hexdigest()
        # One at a time, or two copies of an instance could both be the first; and none while its
        # study is removed.
        with self._journal.files:
            known = self._journal.instance(uid)
            if known and known[0] != study:
                raise Refused(MISMATCH, "mismatch", "SOP Instance UID is of another study already")
            if known and known[2] == digest and Path(known[1]).is_file():
                self.counts["repeated"] += 1
                return
            if self._journal.study_bytes(study) + len(content) > cfg.max_study_mb * _MB:
                raise Refused(OUT_OF_RESOURCES, "size", "study larger than receive.max_study_mb")
            path = self._incoming / study / f"{uid}-{digest[:12]}.dcm"
            write_durably(path, content)
            reach("received")
            self._journal.add_instance(uid, study, os.fspath(path), len(content), digest)
            reach("journaled")
            if known and Path(known[1]).name != path.name:
                Path(known[1]).unlink(missing_ok=True)
        self.counts["received"] += 1

    def _identify(self, event: evt.Event, content: bytes) -> tuple[str, str]:
        """Study and SOP Instance UID, which become names of files."""
        syntax = event.context.transfer_syntax
        if syntax == DeflatedExplicitVRLittleEndian:
            _check_inflated(
                event.encoded_dataset(include_meta=False), self._cfg.max_instance_mb * _MB
            )
        try:
            header = pydicom.dcmread(
                io.BytesIO(content),
                stop_before_pixels=True,
                specific_tags=["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"],
            )
            study = str(header.get("StudyInstanceUID", ""))
            series = str(header.get("SeriesInstanceUID", ""))
            uid = str(header.get("SOPInstanceUID", ""))
        except Exception as error:  # the parser answers damage with many kinds of errors
            raise Refused(CANNOT_UNDERSTAND, "unreadable", "no readable DICOM") from error
        for name, value in (("Study", study), ("Series", series), ("SOP", uid)):
            if not _UID.fullmatch(value) or len(value) > 64:
                raise Refused(CANNOT_UNDERSTAND, "unreadable", f"{name} Instance UID is no UID")
        if uid != event.request.AffectedSOPInstanceUID:
            raise Refused(MISMATCH, "mismatch", "SOP Instance UID is not that of the request")
        return study, uid


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that is there, whole, when this returns, whatever happens to the power then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    sync_folder(path.parent.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder last."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_inflated(deflated: bytes, limit: float) -> None:
    """Refuses what would grow beyond the limit when it is read."""
    inflate, size, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, deflated
    while rest and not inflate.eof:
        try:
            size += len(inflate.decompress(rest, _MB))
        except zlib.error as error:
            raise Refused(CANNOT_UNDERSTAND, "unreadable", "not deflated") from error
        if size > limit:
            raise Refused(OUT_OF_RESOURCES, "size", "larger than receive.max_instance_mb, inflated")
        rest = inflate.unconsumed_tail


class _Server(ThreadedAssociationServer):
    """Waits for no peer where others would wait with it, nor for ever.

    The library shakes hands in the thread that accepts connections, and reads the rest of a PDU
    that has begun without a limit of time.
    """

    daemon_threads = True

    def get_request(self) -> tuple[socket.socket, tuple]:
        peer, address = self.socket.accept()
        peer.settimeout(self.ae.network_timeout)
        return peer, address

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        """Of a thread of its own."""
        if self.ssl_context:
            try:
                request = self.ssl_context.wrap_socket(request, server_side=True)
            except OSError as error:  # silent, no TLS, no certificate that is known
                logger.warning("connection refused", extra={"reason": type(error).__name__})
                self.shutdown_request(request)
                return
        super().process_request_thread(request, client_address)


def _bound(association: Association, cfg: Receive) -> None:
    """Lets a connection take no more than it has to.

    The library believes what the other side says of the length of a PDU, and gathers an instance
    whatever its size.
    """
    own = association.dul.socket
    own.recv = _Bounded(own, cfg)


class _Bounded:
    """Reads from a connection as the library does, up to limits."""

    def __init__(self, own: AssociationSocket, cfg: Receive):
        self._recv = own.recv
        # Requests for an association may be longer than PDUs of data.
        self._longest = max(cfg.max_pdu, 2**18) + 64
        self._most = int(cfg.max_instance_mb * _MB) + 2**16
        self.taken = 0

    def __call__(self, nr_bytes: int) -> bytearray:
        if nr_bytes > self._longest:
            raise OSError(f"a PDU claims {nr_bytes} bytes")
        received = self._recv(nr_bytes)
        self.taken += len(received)
        if self.taken > self._most:
            raise OSError("an instance is larger than receive.max_instance_mb")
        return received


@contextlib.contextmanager
def _budget(event: evt.Event):
    """What has been taken of the connection counts for one instance."""
    try:
        yield
    finally:
        own = event.assoc.dul.socket
        if own is not None:
            own.recv.taken = 0
