"""Rooms of the package: imports point down only, config stops at the factories."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ich_det2

PACKAGE = Path(ich_det2.__file__).parent
REPOSITORY = Path(__file__).parents[1]

PURE = {
    "ich_det2.anchors.clustering",
    "ich_det2.cli",
    "ich_det2.data.audit",
    "ich_det2.data.cache",
    "ich_det2.data.context",
    "ich_det2.data.dicom",
    "ich_det2.data.dicom.body_part",
    "ich_det2.data.dicom.elements",
    "ich_det2.data.dicom.header",
    "ich_det2.data.dicom.identity",
    "ich_det2.data.dicom.pixels",
    "ich_det2.data.dicom.series",
    "ich_det2.data.dicom.window",
    "ich_det2.data.dicom.writing",
    "ich_det2.data.inspection",
    "ich_det2.data.masks",
    "ich_det2.data.pictures",
    "ich_det2.data.prepare",
    "ich_det2.data.splits",
    "ich_det2.data.voc",
    "ich_det2.data.tree",
    "ich_det2.data.tree_writer",
    "ich_det2.data.volumes",
    "ich_det2.dicom_out",
    "ich_det2.dicom_out.capture",
    "ich_det2.dicom_out.codes",
    "ich_det2.dicom_out.equipment",
    "ich_det2.dicom_out.key_objects",
    "ich_det2.dicom_out.presentation",
    "ich_det2.dicom_out.report",
    "ich_det2.dicom_out.segmentation",
    "ich_det2.dicom_out.study",
    "ich_det2.dicom_out.write",
    "ich_det2.evaluation.analysis",
    "ich_det2.evaluation.boxes",
    "ich_det2.evaluation.calibration",
    "ich_det2.evaluation.compare",
    "ich_det2.evaluation.diagnosis",
    "ich_det2.evaluation.froc",
    "ich_det2.evaluation.intervals",
    "ich_det2.evaluation.operating_point",
    "ich_det2.evaluation.predictions",
    "ich_det2.evaluation.smoothing",
    "ich_det2.evaluation.worklist",
    "ich_det2.evaluation.visualize",
    "ich_det2.evaluation.volumes",
    "ich_det2.files",
    "ich_det2.inference",
    "ich_det2.inference.outputs",
    "ich_det2.inference.results",
    "ich_det2.inference.slices",
    "ich_det2.inference.viewer",
    "ich_det2.lazy",
    "ich_det2.modeling.components",
    "ich_det2.modeling.cost",
    "ich_det2.modeling.fuzzy_c_means",
    "ich_det2.modeling.level_set",
    "ich_det2.modeling.segmentation",
    "ich_det2.phantom",
    "ich_det2.phantom.bleeds",
    "ich_det2.phantom.dataset",
    "ich_det2.phantom.dicom",
    "ich_det2.phantom.head",
    "ich_det2.phantom.patient",
    "ich_det2.phantom.shapes",
    "ich_det2.version",
    "ich_det2.zoo",
}
"""Modules without Detectron2, which every room may use."""

BELOW = {
    "": set(),
    "config": {"modeling"},
    "anchors": {"anchors"},
    "data": {"data", "config"},
    "modeling": {"modeling", "config"},
    "phantom": {"phantom"},
    "evaluation": {"evaluation", "config"},
    "engine": {"engine", "anchors", "data", "modeling", "evaluation", "config"},
    "dicom_out": {"dicom_out"},
    "serve": {"serve", "inference", "dicom_out"},
    "inference": {"inference", "engine", "data", "evaluation", "config"},
    "experiments": {"experiments", "engine", "data", "evaluation", "config"},
}
"""Room -> rooms that it may import, besides the pure modules; "" is ``ich_det2/__init__.py``."""


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name, path):
    """Absolute names of all modules imported, anywhere in a file; submodules resolved."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {n if n in MODULES else base for n in names}
    return found


IMPORTS = {name: imports_of(name, path) for name, path in MODULES.items()}


def room_of(name):
    return (name.split(".") + [""])[1]


def test_the_walk_sees_what_is_imported():
    assert {"ich_det2.modeling.cost", "ich_det2.modeling.sampling"} < IMPORTS[
        "ich_det2.modeling.rpn"
    ]
    assert "ich_det2.files" in IMPORTS["ich_det2.evaluation.evaluator"]
    assert "ich_det2.modeling" in IMPORTS["ich_det2.config"]
    assert PURE <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down_only(name):
    room = "" if name == "ich_det2" else room_of(name)
    if room in ("cli", "files", "lazy", "version", "zoo"):
        allowed = set()
    else:
        allowed = BELOW[room]
    for target in IMPORTS[name]:
        if target.split(".")[0] == "ich_det2" and target not in PURE:
            assert room_of(target) in allowed, f"{name} imports {target}"
        assert target.split(".")[0] not in ("tools", "datasets", "tests"), f"{name}: {target}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_reach_no_detectron2(name):
    seen, todo = set(), [name]
    while todo:
        current = todo.pop()
        seen.add(current)
        for target in IMPORTS[current]:
            assert target.split(".")[0] not in ("detectron2", "fvcore"), f"{current}: {target}"
            if target.split(".")[0] == "ich_det2":
                assert target in PURE, f"{current} imports {target}"
                todo += {target} - seen


def functions_with_cfg(path):
    """Names of the functions that take a config or read one."""

    def is_cfg(node):
        return isinstance(node, ast.Name) and node.id == "cfg"

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            if any(is_cfg(inner) for inner in ast.walk(node)):
                yield getattr(node, "name", "lambda")


READ_CFG = ("config", "engine", "inference", "experiments", "serve")


@pytest.mark.parametrize("name", [n for n in MODULES if room_of(n) not in READ_CFG])
def test_config_is_read_by_factories_only(name):
    # `_init_box_head` and `_build_res5_block` are parts of Detectron2's ROIHeads.from_config.
    factories = ("from_config", "_init_box_head", "_build_res5_block")
    for function in functions_with_cfg(MODULES[name]):
        known = function.startswith("build_") or function in factories
        assert known, f"{name}.{function} reads cfg"


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=120,
    )


def test_import_without_detectron2_says_so_in_one_sentence():
    result = run(
        """
import sys

class WithoutDetectron2:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

sys.meta_path[:] = [WithoutDetectron2(list(sys.meta_path))]
import ich_det2, ich_det2.data.splits, ich_det2.evaluation.diagnosis
try:
    ich_det2.add_ich_config(None)
except ImportError as error:
    assert error.__cause__ is None and error.__context__ is None
    print(error)
    sys.exit(3)
"""
    )
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("ich_det2 extends Detectron2, which is not installed")
    assert "make setup" in result.stdout and len(result.stdout.splitlines()) == 1


def test_import_registers_every_part_and_nothing_else_happens():
    result = run(
        """
import ich_det2
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
ich_det2.add_ich_config(get_cfg())
from detectron2.modeling import BACKBONE_REGISTRY, PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from ich_det2.modeling import ANCHOR_SAMPLER_REGISTRY

for registry, names in (
    (PROPOSAL_GENERATOR_REGISTRY, ["CostSensitiveRPN"]),
    (RPN_HEAD_REGISTRY, ["CostSensitiveRPNHead"]),
    (ANCHOR_GENERATOR_REGISTRY, ["ClusteredAnchorGenerator"]),
    (ROI_HEADS_REGISTRY, ["CostSensitiveROIHeads", "CostSensitiveRes5ROIHeads"]),
    (BACKBONE_REGISTRY, ["build_timm_backbone"]),
    (ANCHOR_SAMPLER_REGISTRY, ["AdaptiveRatioSampler", "FixedRatioSampler"]),
):
    for name in names:
        print(name, name in registry)
print("datasets", any(name.startswith("ich_") for name in DatasetCatalog.list()))
print("version", ich_det2.__version__)
"""
    )
    assert result.returncode == 0, result.stderr
    lines = dict(line.split() for line in result.stdout.splitlines())
    assert lines.pop("version") == ich_det2.__version__
    assert lines.pop("datasets") == "False"
    assert len(lines) == 8 and set(lines.values()) == {"True"}
