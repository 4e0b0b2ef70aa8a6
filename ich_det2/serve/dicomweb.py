"""The other side's DICOMweb service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pydicom
import requests
from dicomweb_client.api import DICOMwebClient

_INSTANCES = "00201209"
"""Number of Series Related Instances."""

_PAGE = 100

DUPLICATE = 0x0111
"""Duplicate SOP Instance (PS3.7, C.5): the archive has an object of that UID already."""


class Dicomweb:
    """Of an archive: asks and stores."""

    def __init__(self, url: str, *, ca: str = "", token_file: str = "", timeout_s: float = 30.0):
        """
        Args:
            url: of the service, such as ``https://pacs/dicom-web``.
            ca: PEM file of who signs its certificate; "" for the public ones.
            token_file: holds a bearer token, which is read anew for each request.
            timeout_s: without a word.
        """
        self._url, self._ca, self._token_file, self._timeout = url, ca, token_file, timeout_s

    def _client(self) -> DICOMwebClient:
        session = requests.Session()
        session.trust_env = False  # no proxy, no .netrc that nobody meant
        session.verify = self._ca or True
        if self._token_file:
            token = Path(self._token_file).read_text(encoding="utf-8").strip()
            session.headers["Authorization"] = f"Bearer {token}"
        send = session.request
        session.request = lambda *args, **kwargs: send(
            *args, **{"timeout": self._timeout, **kwargs}
        )
        return DICOMwebClient(self._url, session=session)

    def count_instances(self, study: str) -> int | None:
        """How many CT images of a study there are; None if that is not known there.

        Of its CT series alone: the number of the study's instances holds reports too, this node's
        among them.
        """
        found = self._client().search_for_series(
            study_instance_uid=study, search_filters={"Modality": "CT"}, fields=[_INSTANCES]
        )
        counts = [row.get(_INSTANCES, {}).get("Value", [None])[0] for row in found]
        return None if not counts or None in counts else sum(map(int, counts))

    def studies_of(self, date: str) -> Iterator[str]:
        """Study Instance UIDs of the CT studies of a day, YYYYMMDD."""
        filters = {"StudyDate": date, "ModalitiesInStudy": "CT"}
        client, offset = self._client(), 0
        while rows := client.search_for_studies(search_filters=filters, limit=_PAGE, offset=offset):
            for row in rows:
                yield row["0020000D"]["Value"][0]
            if len(rows) < _PAGE:
                return
            offset += len(rows)

    def store(self, datasets: Sequence[pydicom.Dataset]) -> dict[str, str]:
        """Stores objects by STOW-RS.

        Returns:
            Why by SOP Instance UID, for each that was not stored.
        """
        answer = self._client().store_instances(datasets=list(datasets))
        failed = {}
        # The sequence may be there and empty.
        for item in answer.get("FailedSOPSequence", ()):
            reason = item.get("FailureReason")
            if reason == DUPLICATE:
                continue
            text = (
                f"STOW-RS failure reason 0x{reason:04X}"
                if reason is not None
                else "STOW-RS failure"
            )
            failed[str(item.ReferencedSOPInstanceUID)] = text
        return failed
