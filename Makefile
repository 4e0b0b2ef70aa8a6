# make setup | demo | test | lint | lock. PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Named by the lock's content: the environment is rebuilt when the lock changes and only then.
LOCKS := requirements.lock requirements-detectron2.txt
STAMP := $(VENV)/.built-$(shell cat $(LOCKS) | cksum | tr ' ' '-')
DEMO := output/demo

.PHONY: setup demo test lint lock clean
setup: $(STAMP)

$(STAMP):
	@bash tools/setup_venv.sh "$(PYTHON)" "$(VENV)"
	@touch "$@"

demo: setup
	$(BIN)/python datasets/prepare_phantom.py --output datasets/phantom
	$(BIN)/python tools/train_net.py --resume --config-file configs/quick/csfrcnn_phantom.yaml \
		OUTPUT_DIR $(DEMO)
	sed 's|.*|datasets/phantom/DICOM/&.dcm|' datasets/phantom/ImageSets/Main/test.txt \
		> $(DEMO)/test_files.txt
	$(BIN)/python tools/diagnose.py $(DEMO) @$(DEMO)/test_files.txt --output $(DEMO)/diagnosis \
		--force

test: setup lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Needs `uv` on the PATH; writes one lock for all supported Pythons.
lock:
	uv pip compile --universal --python-version 3.10 --generate-hashes \
		requirements.in -o requirements.lock

clean:
	rm -rf $(VENV)
