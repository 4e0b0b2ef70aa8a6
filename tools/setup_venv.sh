#!/usr/bin/env bash
# Builds the virtual environment for `make`: setup_venv.sh PYTHON VENV
#
# If PYTHON imports detectron2, that Detectron2 and its torch are used and only what is missing is
# added. Otherwise everything comes from requirements.lock, and Detectron2 from the wheel pinned in
# requirements-detectron2.txt, whose file name says cp310 though it is pure Python.
set -euo pipefail
python=$1
venv=$2
cd "$(dirname "$0")/.."

if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))'; then
    echo "ich_det2 needs Python 3.10 to 3.13, but '$python' is $("$python" -V 2>&1);" \
        "name another by 'make setup PYTHON=python3.11'." >&2
    exit 2
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if "$python" -c 'import detectron2' 2>/dev/null; then
    echo "Detectron2 is taken from the environment of '$python'."
    "$python" -m venv --clear --system-site-packages "$venv"
    # PYTHON may be that of a virtual environment itself, whose packages the above leaves out.
    purelib=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import site, sysconfig
for path in dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("platlib")]):
    print(f"import site; site.addsitedir({path!r})")' \
        > "$purelib/environment.pth"
    # Versions of the environment stay; what is missing comes in the locked version.
    sed -n 's/^\([A-Za-z0-9._-]*==[^ \\]*\)\( ;[^\\]*\)\{0,1\}.*$/\1\2/p' requirements.lock \
        | grep -v -E '^(torch|torchvision|triton|nvidia-|cuda-|numpy|setuptools)' \
        > "$venv/constraints.txt"
    pip install --quiet -c "$venv/constraints.txt" -r requirements-test.in 'setuptools<81'
    pip install --quiet --no-build-isolation -c "$venv/constraints.txt" -e .
else
    echo "Building $venv from requirements.lock; the first time this downloads some gigabytes."
    "$python" -m venv --clear "$venv"
    pip install --quiet --require-hashes -r requirements.lock
    purelib=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    pip install --quiet --no-deps --require-hashes --only-binary=:all: --python-version 3.10 \
        --implementation cp --abi none --platform any --upgrade --target "$purelib" \
        -r requirements-detectron2.txt
    pip install --quiet --no-deps --no-build-isolation -e .
fi
"$venv/bin/python" -W ignore -c 'import ich_det2, detectron2, torch
print(f"ich_det2 {ich_det2.__version__}, Detectron2 {detectron2.__version__}, torch {torch.__version__}")'
