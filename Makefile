# Every target starts from a bare clone and makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_MODEL := build/models/smollm2-135m

.PHONY: venv demo kernels test test-fast test-tensorrt fuzz-graphs coverage mutation lint format clean optimum-models

venv: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,models,dev]'
	touch $(READY)

EXPORT_PARTS := $(addprefix models/,gguf_export.py gguf_model.py causal_lm_export.py atomic_folder.py)

$(DEMO_MODEL)/model.onnx: models/export_smollm2.py $(EXPORT_PARTS) | $(READY)
	$(BIN)/python models/export_smollm2.py --output $(DEMO_MODEL)

demo: $(READY) $(DEMO_MODEL)/model.onnx
	mkdir -p build/demo
	$(BIN)/zqfp-compile $(DEMO_MODEL)/model.onnx --output build/demo/smollm2-135m.zqfp --target tensorrt-rtx \
		--emit onnxruntime

# libzqfp.so for sm_90a, from a bare clone: needs nvcc, no GPU and no virtual environment.
NVCC ?= nvcc

kernels:
	@command -v $(NVCC) > /dev/null || { echo "make kernels: $(NVCC) is not found; install the CUDA toolkit (12.5 or later) or set NVCC" >&2; exit 1; }
	+$(MAKE) --no-print-directory -C zqfp_compile/kernels/cuda NVCC=$(NVCC) OUT=$(CURDIR)/build/kernels

# optimum-onnx needs an older transformers, so it exports its models from an environment of its own.
OPTIMUM_VENV := .venv-optimum
OPTIMUM_MODELS := build/models/optimum

optimum-models: $(OPTIMUM_MODELS)/gpt2-float16/model.onnx

$(OPTIMUM_VENV)/.ready: models/requirements-optimum.txt
	$(PYTHON) -m venv $(OPTIMUM_VENV)
	$(OPTIMUM_VENV)/bin/python -m pip install --quiet --requirement models/requirements-optimum.txt
	touch $@

$(OPTIMUM_MODELS)/gpt2-float16/model.onnx: models/export_tiny_optimum.py models/tiny_models.py $(OPTIMUM_VENV)/.ready
	$(OPTIMUM_VENV)/bin/python models/export_tiny_optimum.py --output $(OPTIMUM_MODELS)

# A file's tests share expensive fixtures, so they stay in one process.
PYTEST_PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadfile

test: $(READY) $(DEMO_MODEL)/model.onnx optimum-models
	$(BIN)/python -m pytest $(PYTEST_PROCESSES)

test-fast: $(READY)
	$(BIN)/python -m pytest $(PYTEST_PROCESSES) -m 'not slow'

# Random models beyond the 200 of every test run; other ones each week.
fuzz-graphs: $(READY)
	$(BIN)/python tools/fuzz_graphs.py --count 2000 --seed $$(date +%G%V)0000

# Engines that run, wherever TensorRT or TensorRT-RTX, a GPU and torch for CUDA are; the file is worth sending back.
TENSORRT_PYTHON ?= $(BIN)/python
VERDICT := build/test-tensorrt.txt

test-tensorrt:
	@mkdir -p build
	@$(TENSORRT_PYTHON) -m zqfp_compile.cli_doctor > $(VERDICT)
	@$(TENSORRT_PYTHON) -m pytest -v --tb=short --color=no tests/trt/test_engine_verdict.py >> $(VERDICT) 2>&1; \
	status=$$?; tail -n 30 $(VERDICT); echo "the whole verdict: $(VERDICT)"; exit $$status

# Lines of passes/, formats/ and quantize/ that their own tests run; each part has to reach 95%.
COVERED := 'passes/*' 'zqfp_compile/formats/*' 'zqfp_compile/quantize/*'

coverage: $(READY)
	@mkdir -p build
	$(BIN)/coverage run -m pytest -q tests/core/test_formats_*.py tests/core/test_pass_*.py tests/core/test_quantize_*.py
	@for part in $(COVERED); do $(BIN)/coverage report --include="$$part" --fail-under=95 || exit 1; done

# Mutants of formats/ that its tests do not notice. A minute of one core; docs/testing.md lists the equivalent ones.
mutation: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutation]'
	rm -rf mutants
	$(BIN)/mutmut run
	$(BIN)/mutmut results
	@$(BIN)/mutmut export-cicd-stats > /dev/null
	@$(BIN)/python -c "import json; stats = json.load(open('mutants/mutmut-cicd-stats.json')); \
	share = 100 * stats['killed'] / stats['total']; print(f'killed {share:.1f}% of', stats['total']); exit(share < 90)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/core/test_imports.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build mutants .mypy_cache .pytest_cache .ruff_cache

include zqfp_compile/kernels/hosts.mk
