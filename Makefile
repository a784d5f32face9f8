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

.PHONY: help demo test bench lint clean gpu-check gpu-build gpu-test gpu-memcheck gpu-racecheck gpu-bench

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/metafast.stamp  ## Train and evaluate a few-shot classifier, and draw what it does
	$(BIN)/python -m metafast demo

# The tests share the cores with builds: threads that wait for others are to sleep, not to spin.
test: $(VENV)/metafast.stamp  ## Run the tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --durations=15

bench: $(VENV)/bench.stamp  ## Run the benchmarks
	$(BIN)/python -m bench --out $(OUT)

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
# ninja, numpy and pytest that it has, and pytest-xdist, jax and compute-sanitizer where it has them. On 16 cores the
# build takes a minute and a half, the tests half a minute, the sanitizers one; the benchmarks share what is left of
# seven. Each part says how it ended; its output is in $(OUT) as it comes.

GPU_DIR := $(abspath build/gpu)
GPU_CHECK_SECONDS ?= 420
GPU_BENCH_SECONDS ?= 240
# PYTHONSAFEPATH keeps the checkout's metafast/, which holds no compiled module, from coming before the built one.
ON_GPU = env PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONPATH="$(GPU_DIR):$(CURDIR)"
# Without torch's cache every tensor is an allocation of its own, behind whose end memcheck sees an access.
SANITIZE = $(ON_GPU) PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --target-processes all
WORKERS = $(shell $(PYTHON) -c "import os, xdist; print('-n', min(10, len(os.sched_getaffinity(0))))" 2>/dev/null)

# $(call gpu_part,seconds,command): at most so long, and a line at the end, after what was wrong.
define gpu_part
	@mkdir -p $(OUT); log=$(OUT)/$@.txt; status=0; \
	timeout --kill-after=10 $(1) $(2) > $$log 2>&1 || status=$$?; \
	case $$status in 0) word=passed;; 124) word="ran out of time";; *) word="FAILED ($$status)";; esac; \
	if (( status )); then tail -n 25 $$log; fi; \
	echo "$@: $$word after $$SECONDS s: $$(tail -n 1 $$log)"; exit $$status
endef

gpu-check:  ## Build for the GPU here, run its tests (also under compute-sanitizer) and the benchmarks
	@$(MAKE) --no-print-directory gpu-build; failed=; \
	for part in gpu-test gpu-memcheck gpu-racecheck; do \
	  $(MAKE) --no-print-directory $$part || failed+=" $$part"; done; \
	left=$$(( $(GPU_CHECK_SECONDS) - SECONDS )); \
	$(MAKE) --no-print-directory gpu-bench GPU_BENCH_SECONDS=$$(( left > 60 ? left : 60 )) || failed+=" gpu-bench"; \
	echo "gpu-check: $${failed:+FAILED:}$${failed:-passed} after $$SECONDS s"; test -z "$$failed"

gpu-build:
	@rm -rf $(GPU_DIR)
	$(call gpu_part,300,env METAFAST_CUDA=ON METAFAST_CUDA_ARCHITECTURES=$${METAFAST_CUDA_ARCHITECTURES:-native} \
	  $(PYTHON) -m pip install --no-index --no-build-isolation --no-deps --target $(GPU_DIR) .)

gpu-test:
	$(call gpu_part,120,$(ON_GPU) $(PYTHON) -m pytest -q -m gpu --durations=15 $(WORKERS))

gpu-memcheck gpu-racecheck: gpu-%:
	$(call gpu_part,60,$(if $(shell command -v compute-sanitizer), \
	  $(SANITIZE) --tool $* $(PYTHON) -m pytest -q -m "gpu and sanitizer", \
	  echo "skipped: no compute-sanitizer here"))

gpu-bench:
	$(ON_GPU) $(PYTHON) -m bench --device cuda --seconds $(GPU_BENCH_SECONDS) --out $(OUT)
