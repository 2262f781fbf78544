# Every target works in a fresh clone: what it needs is installed into .venv first, once, and again when pyproject.toml,
# constraints.txt or a C++ source change. Settings: `make test JOBS=4`, `make test T="-k edq"`, `make setup PYTHON=python3.12`.
PYTHON ?= python3
JOBS   ?= 2
T      ?=
SECONDS ?= 60

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := runs/demo
SANITIZED := build/sanitize
KERNELS := CMakeLists.txt $(wildcard csrc/*.hpp csrc/*.cpp csrc/*/*.hpp)
PIP     = $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
PYTEST  = $(BIN)/python -m pytest --numprocesses $(JOBS)

.SILENT:
.DEFAULT_GOAL := help
.PHONY: help setup demo results test test-all fuzz sanitize bench gpu lint check fix clean

help: ## list these targets
	sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(READY) ## install the package (editable) and all tools into .venv

demo: $(READY) ## fine-tune under four precision strategies and write a report (minutes)
	$(BIN)/collage compare --finetune --overwrite --out $(DEMO)
	echo "Report: $(abspath $(DEMO))/report.html"

results: $(READY) ## make the runs behind docs/results.md that have no record, and write that page (says how long first)
	$(BIN)/collage results

test: $(READY) ## run the tests that CI runs
	$(PYTEST) $(T)

test-all: $(READY) ## run all tests, the slow and exhaustive ones too
	$(PYTEST) -m "" $(T)

fuzz: $(READY) ## run random sequences of steps, edits, loads and moves against a float64 model (SECONDS=60)
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

lint: $(READY) ## check format, lint and types; edits nothing
	$(BIN)/ruff format --check --quiet . || { echo "make fix formats these"; exit 1; }
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy --no-error-summary

sanitize: $(READY) ## run the kernels' tests and the fuzzer under AddressSanitizer and UBSan
	cmake -S . -B $(SANITIZED) -DCOLLAGE_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir) > /dev/null
	cmake --build $(SANITIZED) --parallel $(JOBS) > /dev/null
	export COLLAGE_NATIVE=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)"; \
		$(BIN)/python -m pytest tests/test_backends.py $(T) && $(BIN)/python tests/fuzz.py --seconds $(SECONDS)

bench: $(READY) ## time a step of the optimizer against others and against the memory's limit
	$(BIN)/collage bench

gpu: $(READY) ## on a GPU: the kernels' tests, then the benchmark; PLAN=1 only says what it would measure
	$(BIN)/collage bench --device cuda --plan
	$(if $(PLAN),,$(BIN)/python -c "import sys; from collage import backends; sys.exit(backends.missing('triton'))")
	$(if $(PLAN),,TRITON_INTERPRET=0 $(BIN)/python -m pytest --numprocesses $$(nproc) -m "" tests/test_device.py \
		tests/test_backends.py -k "test_device or (triton and not combination)")
	$(if $(PLAN),,$(BIN)/collage bench --device cuda --out runs/gpu)

check: lint test ## lint, then test; edits nothing

fix: $(READY) ## format and repair what ruff can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/ruff check .

clean: ## remove caches and build output; keeps .venv and runs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt $(KERNELS)
	echo "Installing into $(VENV) (minutes the first time) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) scikit-build-core nanobind
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) --no-build-isolation --editable '.[train,dev]'
	touch $@
