"""`pip install -e .`; Detectron2 itself is taken from the environment, see README."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="ich_det2",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "ich_det2/version.py").read_text())[1],
    description="Cost-sensitive Faster R-CNN for intracranial hemorrhage on head CT (Detectron2)",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ich_det2", "ich_det2.*"]),
    package_data={"ich_det2.evaluation": ["*.jinja"]},
    python_requires=">=3.10",
    # Detectron2 is not listed: no official release stands on PyPI.
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "numpy",
        "Pillow",
        "matplotlib",
        "timm>=1.0",
        "pydicom>=3.0",
        "pylibjpeg",
        "pylibjpeg-libjpeg",
        "pylibjpeg-openjpeg",
        "pylibjpeg-rle",
        "opencv-python",
        "scikit-learn",
        "defusedxml",
        "rich",
        "jinja2",
        "nibabel",
        "faster-coco-eval",
        "hydra-core>=1.3",
        "scipy",
        "tabulate",
        "pycocotools",
        "tensorboard",
    ],
    # Where tools/run_experiment.py may run its cells: hydra/launcher=joblib, submitit_slurm, ray.
    extras_require={
        "launchers": ["hydra-joblib-launcher", "hydra-submitit-launcher", "hydra-ray-launcher"],
    },
)
