"""A VOC tree to nnU-Net's folders and back: places, labels, splits, and what a result is worth."""

import csv
import importlib.util
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from ich_det2.data.dicom.writing import encode_ct
from ich_det2.data.tree import VocTree
from ich_det2.data.tree_writer import VocWriter, objects_of_mask
from ich_det2.data.volumes import read_nifti
from ich_det2.evaluation.predictions import read_predictions

ROOT = Path(__file__).parents[2]
NAMES = {1: "IPH", 2: "SDH"}
SIZE = (24, 32)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nnunet = load(ROOT / "datasets/nnunet.py")


def truth_of(patient, i):
    """Labels of slice i of a patient: nothing at the bottom, then an IPH, then both."""
    labels = np.zeros(SIZE, np.uint8)
    if i >= 1:
        labels[4:9, 3 + i + patient : 12] = 1
    if i >= 2:
        labels[14:20, 20:25] = 2
        labels[16, 22] = 0
    return labels


def hu_of(patient, i):
    rng = np.random.default_rng([patient, i])
    return rng.integers(-1000, 1000, SIZE).astype(np.float32) + 40 * truth_of(patient, i)


@pytest.fixture
def tree(tmp_path):
    """Factory of a tree of three patients of three slices, one in each list."""

    def make(kind="dicom", *, masks=True, heights=(0, 5, 10)):
        root = tmp_path / "tree"
        with VocWriter(root, database="test") as writer:
            for patient in range(3):
                for i, height in enumerate(heights):
                    name, hu = f"p{patient}_{i}", hu_of(patient, i)
                    content = encode_ct(
                        hu, name=name, series=f"p{patient}", height_mm=height, spacing_mm=(0.5, 0.4)
                    )
                    objects, parts = objects_of_mask(truth_of(patient, i), NAMES.get)
                    writer.add(
                        name,
                        content if kind == "dicom" else (hu % 256).astype(np.uint8),
                        objects,
                        size=SIZE,
                        patient=f"p{patient}",
                        position_mm=height,
                        masks=parts if masks else None,
                    )
        lists = zip(("train", "val", "test"), range(3))
        VocTree(root).write_lists({name: [f"p{p}_{i}" for i in range(3)] for name, p in lists})
        return root

    return make


@pytest.fixture
def out(tmp_path):
    return tmp_path / "nnUNet_raw/Dataset501_ICH"


def export(root, out, *options):
    return nnunet.main(["export", str(root), "--output", str(out), *options])


def bring(predictions, root, out, folder, *options, split="test"):
    args = ["import", predictions, root, split, "--dataset", out, "--output", folder, *options]
    return nnunet.main([str(arg) for arg in args])


def files(out):
    return sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())


def read(out, name):
    return json.loads((out / name).read_text())


def test_a_series_becomes_a_volume_of_nnunet(tree, out):
    assert export(tree(), out) == 0
    images = [f"images{w}/p{p}_0_0000.nii.gz" for w, p in (("Tr", 0), ("Tr", 1), ("Ts", 2))]
    labels = [f"labels{w}/p{p}_0.nii.gz" for w, p in (("Tr", 0), ("Tr", 1), ("Ts", 2))]
    tables = ["cases.csv", "dataset.json", "splits_final.json"]
    assert files(out) == sorted([*images, *labels, *tables])
    assert read(out, "dataset.json") == {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "IPH": 1, "SDH": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    assert read(out, "splits_final.json") == [{"train": ["p0_0"], "val": ["p1_0"]}]
    with open(out / "cases.csv", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    assert rows[:4] == [("p0_0", str(i), f"p0_{i}") for i in range(3)] + [("p1_0", "0", "p1_0")]
    image = nib.load(out / images[0])
    assert image.shape == (32, 24, 3) and image.get_data_dtype() == np.int16
    assert image.header.get_zooms() == pytest.approx((0.4, 0.5, 5))
    # Voxel (column 4, row 2, slice 1) lies 1.6 mm to the left, 1 mm behind and 5 mm above the
    # first, so 1.6 mm less to the right and 1 mm less to the front.
    assert image.affine @ [4, 2, 1, 1] == pytest.approx([-1.6, -1, 5, 1])
    scan = read_nifti(out / images[0])
    assert not scan.guessed and scan.spacing_mm == pytest.approx((5, 0.5, 0.4))
    mask = read_nifti(out / labels[0], np.uint8)
    for i in range(3):
        assert np.array_equal(scan.slices[i], hu_of(0, i))
        assert np.array_equal(mask.slices[i], truth_of(0, i))


def turn(root, directions, along):
    """Lets each series lie another way: rows and columns, and the steps from slice to slice."""
    for path in (root / "DICOM").iterdir():
        ds = dcmread(path)
        ds.ImageOrientationPatient = directions
        ds.ImagePositionPatient = (float(ds.ImagePositionPatient[2]) * np.array(along)).tolist()
        ds.save_as(path)


ORIENTATIONS = {
    "usual": ([1, 0, 0, 0, 1, 0], [0, 0, 1]),
    "from the right to the left and head first": ([-1, 0, 0, 0, 1, 0], [0, 0, -1]),
    "coronal": ([1, 0, 0, 0, 0, -1], [0, 1, 0]),
    "tilted, each slice moved": ([1, 0, 0, 0, 0.96, 0.28], [0, 0, 1]),
}


@pytest.mark.parametrize("case", ORIENTATIONS)
def test_true_labels_as_results_are_perfect_in_any_orientation(tree, out, tmp_path, case):
    root = tree()
    directions, along = ORIENTATIONS[case]
    turn(root, directions, along)
    assert export(root, out) == 0
    for where in ("imagesTs", "labelsTs"):
        (path,) = (out / where).iterdir()
        affine = nib.load(path).affine
        assert affine[:3, 2] == pytest.approx(np.array(along) * 5 * [-1, -1, 1], abs=1e-4)
        assert affine[:3, 0] == pytest.approx(np.array(directions[:3]) * 0.4 * [-1, -1, 1])
        assert affine[:3, 1] == pytest.approx(np.array(directions[3:]) * 0.5 * [-1, -1, 1])
    found = tmp_path / "found"
    assert bring(out / "labelsTs", root, out, found) == 0
    predictions = read_predictions(found)
    scores = predictions.lesion_scores
    assert scores["coco_ap"] == scores["voc_ap50"] == pytest.approx(1)
    # Slices by their ids, whatever way the volume goes.
    assert dict(zip(predictions.image_ids, predictions.scores)) == {
        "p2_0": 0, "p2_1": 1, "p2_2": 1
    }  # fmt: skip
    assert [len(b) for b in predictions.boxes] == [0, 1, 2]
    rows = json.loads((found / "coco_instances_results.json").read_text())
    assert [(r["image_id"], r["category_id"]) for r in rows] == [
        ("p2_1", 0), ("p2_2", 0), ("p2_2", 1)
    ]  # fmt: skip
    assert rows[2]["bbox"] == [20, 14, 5, 6] and rows[2]["segmentation"]["size"] == list(SIZE)


def test_results_are_evaluated(tree, out, tmp_path, capsys):
    root = tree()
    assert export(root, out) == 0 and bring(out / "labelsTs", root, out, tmp_path / "found") == 0
    assert "3 lesions on 3 slices of 1 cases" in capsys.readouterr().out
    evaluate = load(ROOT / "tools/evaluate.py")
    args = [str(tmp_path / "found"), "--threshold", "0.5", "--resamples", "20"]
    assert evaluate.main(args) == 0
    report = json.loads((tmp_path / "found/report.json").read_text())["models"][0]["analysis"]
    assert report["levels"]["image"]["auc"] == report["levels"]["image"]["accuracy"] == 1
    assert report["lesions"]["coco_ap"] == pytest.approx(1)


def results(out, folder, *, seg=None, **archive):
    """The test's labels as a result, perhaps changed, and what lies in an NPZ beside them."""
    folder.mkdir()
    image = nib.load(out / "labelsTs/p2_0.nii.gz")
    data = np.asanyarray(image.dataobj) if seg is None else seg
    nib.save(nib.Nifti1Image(data, image.affine), folder / "p2_0.nii.gz")
    if archive:
        np.savez_compressed(folder / "p2_0.npz", **archive)
    return folder


def probabilities(sure=0.75):
    """Of background, IPH and SDH as NibabelIO's arrays have them: slices, rows, columns."""
    truth = np.stack([truth_of(2, i) for i in range(3)])
    rest = (1 - sure) / 2
    return np.stack([np.where(truth == c, sure, rest) for c in range(3)]).astype(np.float16)


def test_probabilities_give_scores(tree, out, tmp_path):
    root = tree()
    assert export(root, out) == 0
    found = results(out, tmp_path / "found", probabilities=probabilities())
    assert bring(found, root, out, tmp_path / "scored", "--min-pixels", "5") == 0
    predictions = read_predictions(tmp_path / "scored")
    assert [b[:, 0].tolist() for b in predictions.boxes] == [[], [0.75], [0.75, 0.75]]
    # Where nothing was found the slice is scored by both classes' 0.125; else by 0.75 + 0.125.
    assert predictions.scores.tolist() == pytest.approx([0.25, 0.875, 0.875])
    # Postprocessing has removed a lesion, and another is too small.
    seg = np.asanyarray(nib.load(found / "p2_0.nii.gz").dataobj).copy()
    seg[..., 2][seg[..., 2] == 2] = 0
    again = results(out, tmp_path / "again", seg=seg, probabilities=probabilities())
    assert bring(again, root, out, tmp_path / "less", "--min-pixels", "40") == 0
    assert [len(b) for b in read_predictions(tmp_path / "less").boxes] == [0, 0, 0]


def test_a_result_whose_axes_were_turned_lies_where_it_lay(tree, out, tmp_path):
    root = tree()
    assert export(root, out) == 0
    (tmp_path / "turned").mkdir()
    image = nib.as_closest_canonical(nib.load(out / "labelsTs/p2_0.nii.gz"))
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    nib.save(image, tmp_path / "turned/p2_0.nii.gz")
    assert bring(tmp_path / "turned", root, out, tmp_path / "found") == 0
    assert read_predictions(tmp_path / "found").lesion_scores["coco_ap"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["pictures", "dicom"])
def test_slices_become_pictures(tree, out, tmp_path, kind):
    root = tree(kind)
    assert export(root, out, "--png", "--window", "0", "2000") == 0
    content = read(out, "dataset.json")
    assert content["overwrite_image_reader_writer"] == "NaturalImage2DIO"
    assert content["file_ending"] == ".png" and content["numTraining"] == 6
    assert content["channel_names"] == {"0": "windowed CT"}
    val = [f"p1_{i}" for i in range(3)]
    assert read(out, "splits_final.json") == [{"train": [f"p0_{i}" for i in range(3)], "val": val}]
    grey = np.array(Image.open(out / "imagesTr/p0_2_0000.png"))
    hu = hu_of(0, 2)
    expected = hu % 256 if kind == "pictures" else (hu + 1000).clip(0, 2000) / 2000 * 255
    assert np.abs(grey - expected).max() <= 1
    assert np.array_equal(np.array(Image.open(out / "labelsTr/p0_2.png")), truth_of(0, 2))
    assert bring(out / "labelsTs", root, out, tmp_path / "found") == 0
    assert read_predictions(tmp_path / "found").lesion_scores["coco_ap"] == pytest.approx(1)


def test_pictures_of_known_places_become_volumes(tree, out):
    assert export(tree("pictures"), out, "--pixel-mm", "0.4") == 0
    image = nib.load(out / "imagesTr/p0_0_0000.nii.gz")
    assert image.header.get_zooms() == pytest.approx((0.4, 0.4, 5))
    assert np.array_equal(np.asanyarray(image.dataobj)[..., 1].T, hu_of(0, 1) % 256)
    assert read(out, "dataset.json")["channel_names"] == {"0": "windowed CT"}


def test_without_places_pictures_are_single_slices(tree, out):
    assert export(tree("pictures"), out) == 0
    assert read(out, "dataset.json")["file_ending"] == ".png"


def test_stacks_are_of_neighbours_at_equal_distances():
    def stacks(*gaps, alike=None):
        return nnunet.stacks_of(np.array(gaps, float), alike or [True] * len(gaps))

    assert stacks() == [(0, 1)]
    assert stacks(5, 5, 5) == [(0, 4)]
    assert stacks(5, 5, 10, 5) == [(0, 3), (3, 5)]  # a slice is missing
    assert stacks(5, 5, 0, 5) == [(0, 3), (3, 5)]  # two lie at one place
    assert stacks(2.5, 2.5, 2.5, 5, 5, 5) == [(0, 4), (4, 7)]  # thicker towards the vertex
    assert stacks(50, 5, 5) == [(0, 1), (1, 4)]  # a slice far below the others
    assert stacks(5, 5, 5.4, 5, 5) == [(0, 6)]
    assert stacks(5, 5, 5, alike=[True, False, True]) == [(0, 2), (2, 4)]


def test_a_gap_makes_two_cases(tree, out):
    assert export(tree(heights=(0, 5, 30)), out) == 0
    assert read(out, "splits_final.json") == [{"train": ["p0_0", "p0_2"], "val": ["p1_0", "p1_2"]}]
    assert nib.load(out / "imagesTr/p0_2_0000.nii.gz").shape == (32, 24, 1)


def test_what_bleeds_without_a_known_mask_is_ignored(tree, out, tmp_path, capsys):
    root = tree()
    mask = root / "SegmentationObject/p0_2.png"
    values = np.array(Image.open(mask))
    values[values == 2] = 0  # the SDH's, in the box 20, 14, 25, 20
    Image.fromarray(values).save(mask)
    rows = [f"p{p}_{i},{int(i > 0 or p == 2)}" for p in range(3) for i in range(3)]
    (root / "labels.csv").write_text("\n".join(["image,label", *rows]))
    assert export(root, out) == 0
    assert "2 slices bleed where no mask is known" in capsys.readouterr().err
    labels = read(out, "dataset.json")["labels"]
    assert labels == {"background": 0, "IPH": 1, "SDH": 2, "ignore": 3}
    found = np.asanyarray(nib.load(out / "labelsTr/p0_0.nii.gz").dataobj)[..., 2].T
    expected = np.where(truth_of(0, 2) == 1, 1, 0)
    expected[14:20, 20:25] = 3
    assert np.array_equal(found, expected)
    # p2_0 bleeds by its label alone; as a result it would say nothing of it.
    assert (np.asanyarray(nib.load(out / "labelsTs/p2_0.nii.gz").dataobj)[..., 0] == 3).all()
    assert bring(out / "labelsTs", root, out, tmp_path / "found") == 0
    assert read_predictions(tmp_path / "found").scores.tolist() == [0, 1, 1]


def test_all_types_as_one(tree, out):
    assert export(tree(), out, "--classes", "hemorrhage") == 0
    assert read(out, "dataset.json")["labels"] == {"background": 0, "hemorrhage": 1}
    found = np.asanyarray(nib.load(out / "labelsTr/p0_0.nii.gz").dataobj)
    assert np.array_equal(found[..., 2].T, truth_of(0, 2) > 0)


def test_folds_are_nnunets_splits(tree, out):
    root = tree()
    ids = [[f"p{p}_{i}" for i in range(3)] for p in range(3)]
    folds = {f"fold{k}_val": ids[k] for k in range(3)}
    folds |= {f"fold{k}_train": [i for p in range(3) if p != k for i in ids[p]] for k in range(3)}
    VocTree(root).write_lists(folds)
    (root / "ImageSets/Main/test.txt").unlink()
    pairs = [f"fold{k}_train:fold{k}_val" for k in range(3)]
    assert export(root, out, "--splits", *pairs) == 0
    splits = read(out, "splits_final.json")
    assert [s["val"] for s in splits] == [["p0_0"], ["p1_0"], ["p2_0"]]
    assert splits[0]["train"] == ["p1_0", "p2_0"] and not (out / "imagesTs").exists()


def patients(root, text):
    path = root / "patients.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line.replace(",p1,", text, 1) for line in lines[1:])]))


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda root: None, ["--classes", "IPH", "EDH"], "has objects 'SDH', expected one of"),
        (lambda root: None, ["--classes", "ignore"], "none of nnU-Net's"),
        (lambda root: None, ["--splits", "train:test"], "patients are in two lists"),
        (lambda root: patients(root, ",p0,"), [], "1 patients are in two lists"),
        (lambda root: (root / "ImageSets/Main/val.txt").unlink(), [], "there is no such list"),
    ],
)
def test_an_export_that_would_fail_later_is_refused(tree, out, capsys, change, options, message):
    root = tree()
    change(root)
    assert export(root, out, *options) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() and not list(out.parent.glob("*"))


def test_masks_and_an_empty_folder_of_nnunets_name_are_needed(tree, out, tmp_path, capsys):
    assert export(tree(masks=False), out) == 2
    assert "no object has a mask" in capsys.readouterr().err
    assert not out.exists()
    assert export(tmp_path / "tree", tmp_path / "ICH") == 2
    assert "expected a folder such as nnUNet_raw/Dataset501_ICH" in capsys.readouterr().err
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("kept")
    assert export(tmp_path / "tree", out) == 2
    assert "is not empty" in capsys.readouterr().err and files(out) == ["mine.txt"]


def test_slices_of_one_series_in_two_lists_are_refused(tree, out, capsys):
    root = tree()
    rows = [f"{name},{name}" for name in VocTree(root).images]  # each a patient of its own
    (root / "patients.csv").write_text("\n".join(["image,patient", *rows]))
    lists = {"train": ["p0_0", "p1_0"], "val": ["p0_1", "p0_2", "p1_1"], "test": ["p2_0"]}
    VocTree(root).write_lists(lists, force=True)
    assert export(root, out) == 2
    assert "'p0_0' and 'p0_1' are neighbours in one series, but in two" in capsys.readouterr().err


def shifted(folder):
    image = nib.load(folder / "p2_0.nii.gz")
    affine = image.affine.copy()
    affine[0, 3] += 2
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), affine), folder / "p2_0.nii.gz")


def changed(folder, change):
    image = nib.load(folder / "p2_0.nii.gz")
    data = change(np.asanyarray(image.dataobj))
    nib.save(nib.Nifti1Image(data, image.affine), folder / "p2_0.nii.gz")


def save(folder, **content):
    np.savez(folder / "p2_0.npz", **content)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "p2_0.nii.gz").rename(f / "p9.nii.gz"), "has no mask of 'p2_0.nii.gz'"),
        (lambda f: changed(f, lambda d: d[..., :2]), "has the shape (32, 24, 2), its scan"),
        (lambda f: changed(f, lambda d: d + 5), "has the value 5, expected one of"),
        (lambda f: changed(f, lambda d: d + 0.4), "holds fractions or NaN"),
        (shifted, "lies 2.0 mm beside its scan"),
        (lambda f: (f / "p2_0.nii.gz").write_bytes(b"no"), "is not a NIfTI mask of a head"),
        (lambda f: (f / "p2_0.npz").write_bytes(b"no"), "holds no probabilities of nnU-Net"),
        (lambda f: save(f, softmax=probabilities()), "holds no probabilities of nnU-Net"),
        (lambda f: save(f, probabilities=probabilities()[1:]), "is sized (2, 3, 24, 32), expected"),
        (lambda f: save(f, probabilities=probabilities()[::-1]), "its most probable classes are"),
        (
            lambda f: save(f, probabilities=np.array([{}], dtype=object)),
            "holds no probabilities of nnU-Net",
        ),
    ],
)
def test_a_result_that_is_not_of_the_list_is_one_sentence(tree, out, tmp_path, capsys, change,
                                                          message):  # fmt: skip
    root = tree()
    assert export(root, out) == 0
    found = results(out, tmp_path / "found")
    change(found)
    assert bring(found, root, out, tmp_path / "scored") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert message in told and "p2_0" in told and "Traceback" not in told
    assert not (tmp_path / "scored").exists()


def test_a_result_of_another_list_is_refused(tree, out, tmp_path, capsys):
    root = tree()
    assert export(root, out) == 0
    assert bring(out / "labelsTr", root, out, tmp_path / "found", split="val") == 2
    assert "has a mask of another list's case, or of none, 'p0_0.nii.gz'" in capsys.readouterr().err
    assert bring(out / "labelsTs", root, out, tmp_path / "found", split="val") == 2
    assert "has no mask of 'p1_0.nii.gz'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is no dataset.json of nnU-Net v2"),
        ('{"labels": {"0": "background"}}', "is no dataset.json of nnU-Net v2 ('file_ending')"),
        ('{"labels": {"background": 0, "all": [1, 2]}, "file_ending": ".png"}', "regions"),
        ('{"labels": {"background": 0, "a": 1}, "file_ending": ".nrrd"}', "file_ending is '.nrrd'"),
    ],
)
def test_another_dataset_json_is_one_sentence(tree, out, tmp_path, capsys, content, message):
    root = tree()
    assert export(root, out) == 0
    (out / "dataset.json").write_text(content)
    assert bring(out / "labelsTs", root, out, tmp_path / "found") == 2
    assert message in capsys.readouterr().err
