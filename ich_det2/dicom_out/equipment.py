"""Who wrote an object: this package, and the model that it ran."""

from __future__ import annotations

from highdicom.sr import (
    AlgorithmIdentification,
    DeviceObserverIdentifyingAttributes,
    ObserverContext,
)
from pydicom.sr.codedict import codes

from ..version import __version__
from .codes import ARTIFICIAL_INTELLIGENCE
from .study import NOTICE, StudyDiagnosis

MANUFACTURER = "ich_det2"

# Beside the numbers of what scanners and people make.
SERIES = {"sr": 9001, "gsps": 9002, "sc": 9003, "kos": 9004, "seg": 9005}
"""Series Number by kind of object."""

_TITLES = {
    "sr": "ICH report",
    "gsps": "ICH boxes",
    "sc": "ICH pictures",
    "kos": "ICH key images",
    "seg": "ICH masks",
}


def series_attributes(study: StudyDiagnosis, kind: str, number: int = 1, part: str = "") -> dict:
    """What every object says of itself, for the constructors of highdicom.

    Args:
        study: that it is about.
        kind: of the object, see ``SERIES``.
        number: of the object among those of its kind, from 1.
        part: tells several of a number apart.
    """
    return {
        "series_instance_uid": study.uid(kind, "series"),
        "series_number": SERIES[kind],
        "sop_instance_uid": study.uid(kind, part, number),
        "instance_number": number,
        "series_description": f"{_TITLES[kind]}: {NOTICE.lower()}",
        "manufacturer": MANUFACTURER,
    }


def device(study: StudyDiagnosis) -> dict:
    """The equipment, for the constructors of highdicom; the serial number is of the weights."""
    return {
        "manufacturer_model_name": MANUFACTURER,
        "software_versions": __version__,
        "device_serial_number": study.diagnosis.model.get("sha256", "unknown")[:32],
    }


def algorithm(study: StudyDiagnosis) -> AlgorithmIdentification:
    """The model, for TID 4019."""
    name, version, parameters = algorithm_facts(study)
    return AlgorithmIdentification(
        name=name,
        version=version,
        family=ARTIFICIAL_INTELLIGENCE,
        manufacturer=MANUFACTURER,
        parameters=[f"{key}={value}" for key, value in parameters.items()],
    )


def algorithm_facts(study: StudyDiagnosis) -> tuple[str, str, dict[str, str]]:
    """Name and version of the model, and what its verdicts depend on."""
    model = study.diagnosis.model
    sha256 = model.get("sha256", "")
    name = f"{MANUFACTURER} {model.get('run', '')}".strip()
    version = __version__ + (f"+{sha256[:12]}" if sha256 else "")
    rule = model.get("patient_rule", "any")
    return (
        name,
        version,
        {
            "threshold": f"{study.diagnosis.threshold:.6g}",
            "patient_rule": rule,
        },
    )


def observer(study: StudyDiagnosis) -> ObserverContext:
    """The program as the one that observed."""
    return ObserverContext(
        observer_type=codes.DCM.Device,
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=study.uid("device"),
            name=MANUFACTURER,
            manufacturer_name=MANUFACTURER,
            model_name=study.diagnosis.model.get("run") or MANUFACTURER,
        ),
    )
