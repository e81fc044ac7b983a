# Every target starts from a bare clone and makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_MODEL := build/models/smollm2-135m

.PHONY: venv demo test test-fast lint format clean

venv: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,models,dev]'
	touch $(READY)

$(DEMO_MODEL)/model.onnx: models/export_smollm2.py | $(READY)
	$(BIN)/python models/export_smollm2.py --output $(DEMO_MODEL)

demo: $(READY) $(DEMO_MODEL)/model.onnx
	mkdir -p build/demo
	$(BIN)/zqfp-compile $(DEMO_MODEL)/model.onnx --output build/demo/smollm2-135m.zqfp --target tensorrt-rtx

test: $(READY) $(DEMO_MODEL)/model.onnx
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m 'not slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/core/test_imports.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
