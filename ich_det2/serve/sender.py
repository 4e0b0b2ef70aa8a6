"""From the outbox to the PACS, again and again until it has it."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from .config import Destination, ServeConfig
from .dicomweb import DUPLICATE, Dicomweb
from .journal import Delivery, Journal
from .log import study_key
from .points import reach
from .worker import backoff, describe

logger = logging.getLogger(__name__)


class Sender:
    """Sends what the journal says is due, to one destination after the other."""

    def __init__(self, cfg: ServeConfig, journal: Journal):
        self._cfg, self._journal = cfg, journal
        self.counts: Counter[str] = Counter()

    def send(self) -> int:
        """Sends what is due now; returns how many objects were tried."""
        return sum(self._send_to(destination) for destination in self._cfg.send)

    def _send_to(self, destination: Destination) -> int:
        due, tried = self._journal.due(destination.name), 0
        # A study's objects go together, in one association.
        by_study: dict[str, list[Delivery]] = defaultdict(list)
        for delivery in due:
            by_study[delivery.study].append(delivery)
        for study, deliveries in by_study.items():
            tried += len(deliveries)
            store = store_by_stow if destination.url else store_by_dimse
            try:
                datasets = [pydicom.dcmread(Path(d.path)) for d in deliveries]
                failed = store(destination, self._cfg, datasets)
            except Exception as error:
                # Down, refusing, a name that does not resolve: it will be tried again.
                failed = {d.result: describe(error) for d in deliveries}
            reach("sent")
            for d in deliveries:
                if d.result in failed:
                    wait = backoff(self._cfg, d.attempts)
                    self._journal.fail_delivery(d, failed[d.result], time.time() + wait)
                else:
                    self._journal.note_sent(d)
            self.counts["sent"] += len(deliveries) - len(failed)
            self.counts["failed"] += len(failed)
            logger.log(
                logging.WARNING if failed else logging.INFO,
                "answer not sent" if failed else "answer sent",
                extra={
                    "study": study_key(study),
                    "destination": destination.name,
                    "objects": len(deliveries),
                    "failed": len(failed),
                },
            )
            if failed:  # or the other destinations would wait for each of the studies to fail
                break
        return tried


def store_by_stow(
    destination: Destination, cfg: ServeConfig, datasets: Sequence[pydicom.Dataset]
) -> dict[str, str]:
    """As :meth:`Dicomweb.store`."""
    service = Dicomweb(destination.url, ca=destination.ca, token_file=destination.token_file)
    return service.store(datasets)


def store_by_dimse(
    destination: Destination, cfg: ServeConfig, datasets: Sequence[pydicom.Dataset]
) -> dict[str, str]:
    """Stores objects by C-STORE.

    Returns:
        Why by SOP Instance UID, for each that was not stored.

    Raises:
        ConnectionError: there was no association.
    """
    ae = AE(ae_title=cfg.receive.ae_title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = cfg.receive.timeout_s
    ae.connection_timeout = cfg.receive.timeout_s
    # Every archive takes one of the plain syntaxes; send_c_store encodes anew what is not
    # compressed.
    plain = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    wanted: dict[tuple[str, str], None] = {}
    for ds in datasets:
        own = ds.file_meta.TransferSyntaxUID
        syntaxes = [own] if own.is_compressed else [own, *plain]
        wanted |= dict.fromkeys((ds.SOPClassUID, syntax) for syntax in syntaxes)
    for sop_class, syntax in wanted:
        ae.add_requested_context(sop_class, syntax)
    ae.add_requested_context(Verification)
    tls = (destination.tls.client(), destination.host) if destination.tls else None
    association = ae.associate(
        destination.host, destination.port, ae_title=destination.ae_title, tls_args=tls
    )
    if not association.is_established:
        rejected = "rejected" if association.is_rejected else "not reached"
        raise ConnectionError(f"{destination.ae_title} was {rejected}")
    failed = {}
    try:
        for ds in datasets:
            try:
                status = association.send_c_store(ds).get("Status")
            except ValueError as error:  # that class is not accepted there
                failed[ds.SOPInstanceUID] = describe(error)
                continue
            # 0xBxxx are warnings: it is stored. So is what is there already: its UID follows from
            # what it says.
            if status is None or status not in (0, DUPLICATE) and status >> 12 != 0xB:
                reason = "no answer" if status is None else f"C-STORE status 0x{status:04X}"
                failed[ds.SOPInstanceUID] = reason
            if status is None:
                left = datasets[datasets.index(ds) :]
                failed |= {other.SOPInstanceUID: "no answer" for other in left}
                break
    finally:
        association.release()
    return failed
