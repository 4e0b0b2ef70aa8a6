#!/usr/bin/env python
"""CT-ICH (PhysioNet, Hssayeni et al.): NIfTI volumes with masks, as a VOC tree of DICOM.

SOURCE holds ct_scans/049.nii, masks/049.nii and hemorrhage_diagnosis_raw_ct.csv. The boxes are
those around the connected parts of the masks, which become SegmentationObject/. A mask does not say
the type: it is that of the slice's diagnosis, and "hemorrhage" where that names several.

    python datasets/prepare_ct_ich.py ct-ich-1.3.1 --output data/ct_ich
"""

from __future__ import annotations

from pathlib import Path

from ich_det2.cli import progress, warn
from ich_det2.data.dicom.writing import encode_ct
from ich_det2.data.prepare import run_preparer
from ich_det2.data.tree import read_table
from ich_det2.data.tree_writer import objects_of_mask
from ich_det2.data.volumes import read_with_mask
from ich_det2.files import walk

DIAGNOSES = "hemorrhage_diagnosis_raw_ct.csv"
TYPES = {
    "Intraventricular": "IVH",
    "Intraparenchymal": "IPH",
    "Subarachnoid": "SAH",
    "Epidural": "EDH",
    "Subdural": "SDH",
}


def main(argv=None) -> int:
    return run_preparer("ct_ich", __doc__, argv, prepare, options=add_options)


def add_options(parser) -> None:
    parser.add_argument(
        "--min-pixels",
        type=int,
        default=4,
        help="smaller parts of a mask are left out (default: 4)",
    )


def prepare(args, tree) -> None:
    diagnoses = read_diagnoses(args.source / DIAGNOSES)
    disagree, guessed = 0, []
    scans = [p for p in walk(args.source / "ct_scans") if ".nii" in p.name.lower()]
    for path in progress(scans, "scans"):
        patient = path.name.split(".")[0]
        if all(f"{patient}_{number:02d}" in tree for number in diagnoses.get(patient, [-1])):
            continue
        scan, mask = read_with_mask(path, args.source / "masks" / path.name)
        guessed += [f"{path.name}: {scan.guessed}"] if scan.guessed else []
        depth, rows, columns = scan.spacing_mm
        for i, hu in enumerate(scan.slices):
            number = i + 1
            types = diagnoses.get(patient, {}).get(number, set())
            label = next(iter(types)) if len(types) == 1 else "hemorrhage"
            objects, masks = objects_of_mask(
                mask[i],
                lambda _: label,  # noqa: B023
                min_pixels=args.min_pixels,
            )
            disagree += bool(objects) != bool(types)
            name = f"{patient}_{number:02d}"
            if not tree.wants(name, objects, masks=masks):
                continue
            content = encode_ct(
                hu, name=name, series=patient, height_mm=i * depth, spacing_mm=(rows, columns)
            )
            tree.add(
                *(name, content, objects),
                size=hu.shape,
                patient=patient,
                position_mm=i * depth,
                masks=masks,
            )
    if guessed:
        warn(f"the orientation of {len(guessed)} volumes is a guess ({guessed[0]}).")
    if disagree:
        warn(f"on {disagree} slices mask and diagnosis disagree; the mask was followed.")


def read_diagnoses(path: Path) -> dict[str, dict[int, set[str]]]:
    """Types of each slice, by patient ("049") and slice number, from 1.

    Raises:
        ValueError: naming the file, if it is not the diagnosis table.
    """
    diagnoses: dict[str, dict[int, set[str]]] = {}
    for line, row in read_table(path, ("PatientNumber", "SliceNumber", *TYPES), fold=str):
        try:
            patient, number = f"{int(row['PatientNumber']):03d}", int(row["SliceNumber"])
            types = {short for name, short in TYPES.items() if int(row[name] or 0)}
        except ValueError:
            raise ValueError(f"{path}, line {line}: expected whole numbers.") from None
        diagnoses.setdefault(patient, {})[number] = types
    return diagnoses


if __name__ == "__main__":
    raise SystemExit(main())
