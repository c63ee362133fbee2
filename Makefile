# Without PYTHON: a virtual environment with the pinned dependencies, few for a build and the demo, else those of the
# tests. With PYTHON=python3: that existing environment, no installation and no network.
.DEFAULT_GOAL := help
.PHONY: help venv build check-build demo lint format types test test-all test-compile test-trainers docs compare families conformance matrix clean gpu-check bench tune \
  build-cuda build-noarch reproduce variants public-api release-dry-run

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
REQUIREMENTS ?= $(if $(filter-out build demo compare,$(MAKECMDGOALS)),requirements-test.txt,requirements.txt)
READY := .venv/$(basename $(REQUIREMENTS)).stamp
endif
BASE_PYTHON ?= python3

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24
	@echo "  PYTHON=python3 uses an existing environment: no venv, no network"

venv: $(READY)  ## make .venv with the pinned dependencies

# The tests' dependencies hold the few; others may replace what an earlier stamp stands for.
ifdef READY
$(READY): $(wildcard requirements*.txt)
	$(BASE_PYTHON) -m venv .venv
	@rm -f .venv/*.stamp
	.venv/bin/python -m pip install --quiet -r $(REQUIREMENTS)
	@touch $@ $(if $(filter requirements-test.txt,$(REQUIREMENTS)),.venv/requirements.stamp)
endif

build: $(READY)  ## build this machine's variant into build/
	@$(PYTHON) scripts/build.py

check-build: build  ## hold every variant in build/ against what the Hub asks: ABI, symbols, digest, a bare import (RELEASE=1)
	@$(PYTHON) scripts/check_build.py $(if $(RELEASE),--release) $(if $(TORCH),--torch $(TORCH))

demo: build  ## fine-tune with PEFT alone and kernelized, on a GPU compiled as well, and compare
	$(PYTHON) examples/finetune.py

ifneq ($(if $(MODEL),,$(filter compare,$(MAKECMDGOALS))),)
$(error MODEL is missing: make compare MODEL=folder of a checkpoint, DATA=file for a text of yours)
endif
compare: build  ## the same with a checkpoint of yours: MODEL=folder (DATA=file: a text; COMPILED=1: compiled on a CPU too, COMPILED=0: nowhere)
	$(PYTHON) examples/finetune.py --model "$(MODEL)" $(if $(DATA),--data "$(DATA)") \
	  $(if $(COMPILED),$(if $(filter 0,$(COMPILED)),--no-compiled,--compiled))

# The wheel of clang-format has no module to run, but a function.
CLANG_FORMAT = $(PYTHON) -c 'import sys, clang_format; sys.exit(clang_format.clang_format())'
CXX_FILES = $(shell find kernel-src torch-ext cmake -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

lint: $(READY)  ## check style and formatting of the Python, C++ and CUDA files
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)

format: $(READY)  ## format the Python, C++ and CUDA files, and mend what ruff can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	@$(CLANG_FORMAT) -i $(CXX_FILES)

types: $(READY)  ## check the package's types
	$(PYTHON) -m mypy

# Two workers, as CI has cores, where pytest-xdist is installed. More threads than cores wait for each other.
test: SELECTED := -m "not slow"
test: build  ## run the tests but those marked as slow
test-all: build  ## run all tests
test test-all:
	@parallel=$$($(PYTHON) -c 'import xdist; print("-n 2 --dist loadgroup")' 2>/dev/null); \
	set -x; OMP_NUM_THREADS=1 $(PYTHON) -m pytest $$parallel $(SELECTED) tests

# PYTHONPATH, so that they are beside what the environment has, whose other tests go on without them.
TRAINERS := $(CURDIR)/.trainers

test-trainers: build $(TRAINERS)/stamp  ## install TRL, DeepSpeed and Liger into .trainers/ and run every recipe
	PYTHONPATH=$(TRAINERS) OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/test_recipes.py tests/test_callback.py tests/test_liger.py

$(TRAINERS)/stamp: requirements-trainers.txt | $(READY)
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target $(TRAINERS) -r requirements-trainers.txt
	@touch $@

# Each case takes Inductor some seconds.
test-compile: build  ## run the tests of torch.compile, what is slow too, with Inductor: an hour on two cores (K=words: those that match)
	LORA_FUSED_TEST_INDUCTOR=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q $(if $(K),-k "$(K)") tests/test_compile*.py

families: build  ## hold every model family against PEFT and write the table of them in docs/support.md
	OMP_NUM_THREADS=1 $(PYTHON) scripts/families_table.py --measure

docs: $(READY)  ## write the parts of the pages that are made from results, tests, docstrings and this file
	$(PYTHON) benchmarks/charts.py
	$(PYTHON) scripts/pages.py

conformance: build  ## run PEFT's own LoRA tests with and without the kernel (SDIST=file: no download; COMPILED=1: compiled models; ONLY=modules; PART=2/5)
	$(PYTHON) scripts/conformance.py $(if $(SDIST),--sdist $(SDIST)) $(if $(COMPILED),--compiled) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(PART),--part $(PART))

matrix: build  ## run some tests with other versions of PEFT, kernels, transformers, and write the table of them (ROWS=0,3: those; COMPILED=1: tests of compiled models, with this torch)
	$(PYTHON) scripts/version_matrix.py $(if $(ROWS),--rows $(ROWS)) $(if $(COMPILED),--compiled)

gpu-check: build  ## check parity and gradients on this machine's GPU
	PYTHON=$(PYTHON) scripts/gpu_check.sh

bench: build  ## measure against PEFT and the frozen base on this machine's GPU
	$(PYTHON) benchmarks/run.py

tune: build  ## choose between library and Triton, and tiles, by measurement on this machine's GPU
	$(PYTHON) benchmarks/tune.py
	@$(PYTHON) scripts/build.py

# TORCH: the torch folder of an unpacked CUDA wheel, where the environment's torch is a build without CUDA.
build-cuda: $(READY)  ## build and check the CUDA variant, no GPU needed (ARCHS="9.0a": those alone; TORCH=dir)
	@$(PYTHON) scripts/build.py --backend cuda --archs "$(or $(ARCHS),all)" $(if $(TORCH),--torch $(TORCH)) \
	  $(if $(TIME_LIMIT),--time-limit $(TIME_LIMIT))
	@$(PYTHON) scripts/check_build.py $(if $(TORCH),--torch $(TORCH))
	@$(PYTHON) scripts/check_cuda.py

build-noarch: $(READY)  ## lay out the variants without native code (torch-rocm, torch-xpu), and their source for kernel-builder
	@$(PYTHON) scripts/noarch.py

reproduce: $(READY)  ## build the last commit twice, under nothing but the same tools, and compare bytes (AGAINST=dir)
	@$(PYTHON) scripts/reproduce.py $(if $(BACKEND),--backend $(BACKEND)) $(if $(ARCHS),--archs "$(ARCHS)") \
	  $(if $(TORCH),--torch $(TORCH)) $(if $(AGAINST),--against $(AGAINST))

public-api: build  ## compare the public interface with what docs/api.json keeps (WRITE=1: keep it)
	@$(PYTHON) scripts/public_api.py $(if $(WRITE),--write)

variants: $(READY)  ## print the names of the variants that the flake builds, evaluated where Nix is installed
	@$(PYTHON) scripts/variants.py

# Each line is a step of .github/workflows/release.yml that needs neither Nix nor a token.
release-dry-run: $(READY)  ## all of a release but the Nix build and the upload (TAG=v1.0, RELEASE=1: nothing uncommitted)
	@if $(PYTHON) -c 'import ruff' 2>/dev/null; then $(MAKE) lint; else echo "release: ruff is not installed, no lint"; fi
	@$(MAKE) build-noarch
	@$(MAKE) check-build
	@$(MAKE) public-api
	@$(MAKE) variants
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q tests/test_build.py tests/test_check_build.py tests/test_publish.py tests/test_release.py
	@$(MAKE) reproduce BACKEND=
	@$(PYTHON) scripts/release.py $(if $(TAG),--tag $(TAG))

clean:  ## remove what was built, not the venv
	rm -rf build _build
