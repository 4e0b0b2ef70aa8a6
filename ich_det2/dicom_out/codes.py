"""The codes that results are written in (PS3.16)."""

from pydicom.sr.coding import Code

HEMORRHAGE = Code("1386000", "SCT", "Intracranial hemorrhage")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
BRAIN = Code("12738006", "SCT", "Brain")
CT_OF_HEAD = Code("303653007", "SCT", "CT of head")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")
PERCENT = Code("%", "UCUM", "Percent")
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")
COMMENT = Code("121106", "DCM", "Comment")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
SOURCE = Code("121112", "DCM", "Source of Measurement")
OF_INTEREST = Code("113000", "DCM", "Of Interest")

VERDICTS = {
    "present": Code("52101004", "SCT", "Present"),
    "absent": Code("272519000", "SCT", "Absent"),
    "undetermined": Code("373068000", "SCT", "Undetermined"),
}
"""Of :attr:`StudyDiagnosis.verdict`; CID 240, and beyond it what is neither."""
