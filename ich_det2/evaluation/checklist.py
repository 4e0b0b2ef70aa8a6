"""Which items of CLAIM and STARD a report answers by itself, and which are left to its author.

Sources: CLAIM, Mongan, Moy and Kahn, Radiology: AI 2 (2020) e200029; STARD 2015, Bossuyt et al.,
BMJ 351 (2015) h5527. Items are named in own, short words; read the originals before use.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

OPEN = "open"


@dataclass(frozen=True)
class Item:
    """An item of a checklist.

    Attributes:
        standard: "CLAIM" or "STARD".
        number: in the standard.
        topic: in a few words.
        answer: from the report's facts, or None where the author has to answer.
    """

    standard: str
    number: str
    topic: str
    answer: str | None


def _fact(key: str) -> Callable[[dict], str | None]:
    return lambda facts: facts.get(key)


_CLAIM = {
    "1": ("title or abstract names the kind of AI", None),
    "2": ("structured summary", None),
    "3": ("background, intended use", None),
    "4": ("aims and hypotheses", None),
    "5": ("prospective or retrospective", None),
    "6": ("goal of the study", None),
    "7": ("data sources", None),
    "8": ("eligibility of patients", None),
    "9": ("preprocessing", _fact("preprocessing")),
    "10": ("selection of subsets of the data", None),
    "11": ("definitions of data elements", _fact("reference")),
    "12": ("de-identification", None),
    "13": ("missing data", _fact("missing")),
    "14": ("definition of the reference standard", None),
    "15": ("reason for the reference standard", None),
    "16": ("who annotated, with what qualification", None),
    "17": ("annotation tools", None),
    "18": ("variability between annotators", None),
    "19": ("intended sample size", None),
    "20": ("how data were assigned to partitions", _fact("partitions")),
    "21": ("level at which partitions are disjoint", _fact("disjoint")),
    "22": ("model, in detail", _fact("model")),
    "23": ("software", _fact("software")),
    "24": ("initial parameters", _fact("initialization")),
    "25": ("training: augmentation, hyperparameters", _fact("training")),
    "26": ("how the final model was selected", _fact("selection")),
    "27": ("ensembling", _fact("ensembling")),
    "28": ("metrics", _fact("metrics")),
    "29": ("significance and uncertainty", _fact("uncertainty")),
    "30": ("robustness, sensitivity analysis", _fact("robustness")),
    "31": ("explainability", _fact("explainability")),
    "32": ("external test data", None),
    "33": ("flow of participants", None),
    "34": ("demographic and clinical characteristics", None),
    "35": ("performance on all partitions", _fact("all_partitions")),
    "36": ("diagnostic accuracy and its precision", _fact("accuracy")),
    "37": ("analysis of failures", _fact("failures")),
    "38": ("limitations, bias", None),
    "39": ("implications for practice", None),
    "40": ("registration", None),
    "41": ("full protocol", None),
    "42": ("funding", None),
}
_STARD = {
    "1": ("title names diagnostic accuracy", None),
    "2": ("structured abstract", None),
    "3": ("background, intended use and role", None),
    "4": ("objectives and hypotheses", None),
    "5": ("data collected before or after the tests", None),
    "6": ("eligibility criteria", None),
    "7": ("how eligible patients were identified", None),
    "8": ("where and when", None),
    "9": ("consecutive, random or convenience series", None),
    "10a": ("index test, to be repeated", _fact("model")),
    "10b": ("reference standard, to be repeated", None),
    "11": ("reason for the reference standard", None),
    "12a": ("cut-off of the index test, prespecified or not", _fact("cutoff")),
    "12b": ("cut-off of the reference standard", _fact("reference")),
    "13a": ("what the index test's performers knew", _fact("blinding")),
    "13b": ("what the reference's assessors knew", None),
    "14": ("how accuracy was estimated or compared", _fact("uncertainty")),
    "15": ("indeterminate results", _fact("missing")),
    "16": ("missing data", _fact("missing")),
    "17": ("variability, prespecified or exploratory", _fact("robustness")),
    "18": ("intended sample size", None),
    "19": ("flow of participants", None),
    "20": ("characteristics of participants", None),
    "21a": ("severity of the disease", _fact("types")),
    "21b": ("alternative diagnoses without the disease", None),
    "22": ("time between index test and reference", None),
    "23": ("cross tabulation of results", _fact("confusion")),
    "24": ("accuracy with 95 % intervals", _fact("accuracy")),
    "25": ("adverse events", None),
    "26": ("limitations", None),
    "27": ("implications for practice", None),
    "28": ("registration", None),
    "29": ("protocol", None),
    "30": ("funding", None),
}


def checklist(facts: dict[str, str]) -> list[Item]:
    """All items; those that the facts answer are filled, the others open.

    Args:
        facts: of ``facts_of`` (what the numbers say) and of the training run, by name.
    """
    return [
        Item(standard, number, topic, fill(facts) if fill is not None else None)
        for standard, items in (("CLAIM", _CLAIM), ("STARD", _STARD))
        for number, (topic, fill) in items.items()
    ]


def facts_of(analysis: dict, point: dict | None) -> dict[str, str]:
    """What an analysis and its operating point answer.

    Args:
        analysis: of ``analyse``.
        point: an ``OperatingPoint`` as a dict, or None.
    """
    image, patient = (analysis["levels"][level] for level in ("image", "patient"))
    recall, specificity, auc = (
        "undefined" if math.isnan(patient[name]) else f"{patient[name]:.3f}"
        for name in ("recall", "specificity", "auc")
    )
    facts = {
        "reference": "An image is positive if it has an annotated hemorrhage; a patient if an image"
        " is.",
        "missing": "An image without any box scores 0 and is negative; images that could not be"
        " read are not among these.",
        "metrics": "Recall, specificity, precision, NPV, F1, F2, balanced accuracy, MCC, expected"
        " cost, ROC and PR curves, FROC; images and patients.",
        "uncertainty": "95 % intervals by bootstrap over patients"
        f" ({analysis['intervals']['n_resamples']} draws, seed {analysis['intervals']['seed']});"
        " Wilson for proportions and DeLong for AUC. Models are compared by paired bootstrap,"
        " DeLong and exact McNemar.",
        "accuracy": f"Patients: recall {recall}, specificity {specificity}, AUC {auc}; with"
        " intervals above.",
        "confusion": f"{image['n']} images of {patient['n']} patients, tables above.",
        "failures": "The worst misses and false alarms are shown above.",
        "explainability": "Each positive call shows the box that made it.",
        "robustness": "Exploratory: all thresholds, other patient rules, and other rules for the"
        " operating point, above.",
        "blinding": "The model sees the image alone.",
        "ensembling": "None: one model.",
    }
    if point is not None:
        how = (
            "set by the config"
            if point["rule"] == "fixed"
            else (f"chosen by the rule {point['rule']} on {point['dataset']}")
        )
        locked = ", and locked with the weights" if point["weights_sha256"] else ""
        facts["cutoff"] = f"{point['threshold']:.4g}, {how}{locked}."
        facts["all_partitions"] = (
            f"Validation ({point['dataset']}) and this set, above; the training set is not"
            " evaluated."
        )
    named = {name for level in analysis["types"].values() for name in level}
    if len(named) > 1:
        facts["types"] = "Types of hemorrhage with their recall, above."
    return facts
