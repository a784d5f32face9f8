# `make help` lists the targets. Each sets itself up from nothing: a virtual environment, torch, the build.
#
#   TORCH       the torch to install
#   TORCH_ARGS  more arguments for its pip install. On Linux without an NVIDIA GPU, point it at torch's CPU wheels, else
#               the default index sends the CUDA build, gigabytes of it: make test TORCH_ARGS="--index-url <CPU wheels>"
#   PIP_ARGS    more arguments for every pip install
#   PYTHON      the interpreter the environment is made from; `make gpu-check` runs on it as it is
#   OUT         where `make gpu-check` and `make bench` write

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

TORCH ?= torch==2.13.0
TORCH_ARGS ?=
PIP_ARGS ?=
PYTHON ?= python3
OUT ?= bench/results
ifneq ($(wildcard ../shared/data),)
  METAFAST_DATA ?= $(abspath ../shared/data)
  export METAFAST_DATA
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet $(PIP_ARGS)
SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake csrc -type f)
BENCHMARKS := $(patsubst bench/%/__main__.py,%,$(wildcard bench/*/__main__.py)) overhead

.PHONY: help demo test bench lint clean gpu-check gpu-build gpu-test gpu-memcheck gpu-racecheck gpu-bench

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/metafast.stamp  ## Train and evaluate a few-shot classifier, and draw what it does
	$(BIN)/python -m metafast demo

test: $(VENV)/metafast.stamp  ## Run the tests
	$(BIN)/python -m pytest -q --durations=15

bench: $(VENV)/bench.stamp  ## Run the benchmarks
	mkdir -p $(OUT)
	for name in $(BENCHMARKS); do \
	  $(BIN)/python -m bench.$$name --out $(OUT)/$$name-cpu.json; done

lint: $(VENV)/lint.stamp  ## Check style and format: ruff, clang-format
	PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files

clean:  ## Remove what was built (the environment stays: rm -rf .venv)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis $(VENV)/metafast.stamp

# The environment. A stamp is newer than all that it was made from, so a second run has nothing to do.

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) "$(TORCH)"
	$(PIP) numpy "scikit-build-core>=0.11" "cmake>=3.26" ninja
	touch $@

$(VENV)/metafast.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[test]"
	touch $@

# The peers of the benchmarks: without their dependencies, which would replace torch (torchvision has no build for
# every torch). learn2learn carries C that an old Cython wrote for Python before 3.11; build_ext writes it anew.
$(VENV)/bench.stamp: $(VENV)/metafast.stamp
	$(PIP) --no-build-isolation --editable ".[bench]"
	$(PIP) --no-deps easyfsl pytorch-metric-learning higher torchopt
	$(PIP) --no-deps --no-build-isolation --config-settings=--build-option=build_ext learn2learn
	touch $@

$(VENV)/lint.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(shell sed -nE 's/^lint = \[(.*)\]/\1/p' pyproject.toml | tr ',' ' ')
	touch $@

# On a machine with a GPU: no network and no environment, the Python at hand with the torch, scikit-build-core, cmake,
# ninja, numpy and pytest that it has.

GPU_DIR := $(abspath build/gpu)
# PYTHONSAFEPATH keeps the checkout's metafast/, which holds no compiled module, from coming before the built one.
ON_GPU = PYTHONSAFEPATH=1 PYTHONPATH="$(GPU_DIR):$(CURDIR)" $(PYTHON)
SANITIZE = PYTHONSAFEPATH=1 PYTHONPATH="$(GPU_DIR):$(CURDIR)" compute-sanitizer --error-exitcode 1 --target-processes all

gpu-check: gpu-build  ## Build for the GPU here, run its tests (also under compute-sanitizer) and the benchmarks
	mkdir -p $(OUT)
	$(MAKE) --keep-going gpu-test gpu-memcheck gpu-racecheck gpu-bench

gpu-build:
	rm -rf $(GPU_DIR)
	METAFAST_CUDA=ON METAFAST_CUDA_ARCHITECTURES=$${METAFAST_CUDA_ARCHITECTURES:-native} \
	  $(PYTHON) -m pip install --no-index --no-build-isolation --no-deps --target $(GPU_DIR) .

gpu-test:
	$(ON_GPU) -m pytest -q -m gpu --durations=15 | tee $(OUT)/gpu-test.txt

gpu-memcheck gpu-racecheck: gpu-%:
	@if ! command -v compute-sanitizer; then echo "$@: skipped, no compute-sanitizer here"; exit 0; fi; \
	$(SANITIZE) --tool $* $(PYTHON) -m pytest -q -m "gpu and sanitizer" | tee $(OUT)/$@.txt

gpu-bench:
	for name in $(BENCHMARKS); do \
	  $(ON_GPU) -m bench.$$name --device cuda --out $(OUT)/$$name-cuda.json | tee $(OUT)/$$name-cuda.txt; done
