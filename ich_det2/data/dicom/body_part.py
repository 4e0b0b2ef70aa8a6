"""Body Part Examined (0018,0015) as people fill it in: any language, any spelling."""

from __future__ import annotations

import re

from .identity import words

_HEAD = re.compile(
    "HEAD|BRAIN|SKULL|CRANI|CRANE|FACE|FACIAL|ORBIT|SINUS|NECK|KOPF|SCHADEL|SCHAEDEL|HIRN|CEREB"
    "|ENCEPH|ENCEF|CABEZA|TETE|TESTA|CAPO|HOOFD|HUVUD|HODE|GLOWA|HALS|頭|头|脳|脑|颅"
)
_ELSEWHERE = re.compile(
    # The side, the part of the spine, the modality in front;
    "(?:LEFT|RIGHT|LI|RE|UPPER|LOWER|UP|LOW|[CTLSRB]{0,3})"
    # beginnings of words,
    "(?:CHEST|THORA|TORA[XCK]|TORSO|BRUST|LUNG|PULM|POLMON|POUMON|HEART|HERZ|CARDI|CORONARY|COEUR"
    "|ABDOM|BAUCH|LIVER|LEBER|HEPAT|FOIE|HIGADO|FEGATO|KIDNEY|NIERE|RENAL|PANCREA|SPLEEN|STOMACH"
    "|COLON|BLADDER|PROSTAT|PELVI|BECKEN|BASSIN|BACINO|SPINE|SPINAL|WIRBEL|COLUMN|COLONNE|RACHIS"
    "|LUMB|LENDEN|SACR|COCCY|EXTREMIT|SHOULDER|SCHULTER|EPAULE|HOMBRO|SPALLA|CLAVIC|SCAPULA"
    "|HUMERUS|ELBOW|ELLBOGEN|ELLENBOGEN|COUDE|CODO|GOMITO|FOREARM|UNTERARM|OBERARM|WRIST|HANDGEL"
    "|POIGNET|MUNECA|POLSO|FINGER|THUMB|HUFTE|HUEFTE|HANCHE|CADERA|ANCA|FEMUR|THIGH|KNEE|KNIE"
    "|GENOU|RODILLA|GINOCCHIO|TIBIA|FIBULA|ANKLE|SPRUNGGEL|KNOCHEL|CHEVILLE|TOBILLO|CAVIGLIA"
    "|CALCANE|BREAST|AORTA|胸|腹|骨盤|骨盆|腰|脊|膝|肩|肺|心|肝|腎|肾"
    # and whole words.
    "|(?:ARM|LEG|HIP|RIB|HAND|FOOT|FEET|TOE|BEIN|FUSS|RIPPEN|BRAS|JAMBE|PIED|BRAZO|PIERNA|PIE"
    "|MANO|PIEDE|GAMBA|BRACCIO|ABD|LWS|BWS|HWS|TAP)(?:S|E|EN)?$)"
)


def may_be_head(body_part: str) -> bool:
    """Whether a Body Part Examined leaves open that the head is in the image: False only for one
    that names another part of the body, and not the head or neck beside it."""
    found = words(body_part)
    return bool(_HEAD.search("".join(found))) or not any(map(_ELSEWHERE.match, found))
