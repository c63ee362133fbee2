# Without PYTHON: a virtual environment with the pinned dependencies. With PYTHON=python3:
# that existing environment, no installation and no network.
.DEFAULT_GOAL := help
.PHONY: help venv build check-build demo test families conformance matrix clean gpu-check bench tune build-cuda reproduce variants

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/stamp
endif
BASE_PYTHON ?= python3

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24
	@echo "  PYTHON=python3 uses an existing environment: no venv, no network"

venv: $(READY)  ## make .venv with the pinned dependencies

.venv/stamp: requirements.txt requirements-test.txt
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -r requirements-test.txt
	@touch $@

build: $(READY)  ## build this machine's variant into build/
	@$(PYTHON) scripts/build.py

check-build: build  ## hold every variant in build/ against what the Hub asks: ABI, symbols, digest, a bare import (RELEASE=1)
	@$(PYTHON) scripts/check_build.py $(if $(RELEASE),--release) $(if $(TORCH),--torch $(TORCH))

demo: build  ## fine-tune with PEFT alone and kernelized, and compare
	$(PYTHON) examples/finetune.py

# Two workers, as CI has cores, where pytest-xdist is installed. More threads than cores wait for each other.
test: build  ## run the tests
	@parallel=$$($(PYTHON) -c 'import xdist; print("-n 2 --dist loadgroup")' 2>/dev/null); \
	set -x; OMP_NUM_THREADS=1 $(PYTHON) -m pytest $$parallel tests

families: build  ## hold every model family against PEFT and write the README's table of them
	OMP_NUM_THREADS=1 $(PYTHON) scripts/families_table.py --measure

conformance: build  ## run PEFT's own LoRA tests with and without the kernel (SDIST=file: no download)
	$(PYTHON) scripts/conformance.py $(if $(SDIST),--sdist $(SDIST))

matrix: build  ## run some tests with other versions of PEFT, kernels, transformers, and write README's table (ROWS=0,3: those)
	$(PYTHON) scripts/version_matrix.py $(if $(ROWS),--rows $(ROWS))

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

reproduce: $(READY)  ## build the last commit twice, under nothing but the same tools, and compare bytes (AGAINST=dir)
	@$(PYTHON) scripts/reproduce.py $(if $(BACKEND),--backend $(BACKEND)) $(if $(ARCHS),--archs "$(ARCHS)") \
	  $(if $(TORCH),--torch $(TORCH)) $(if $(AGAINST),--against $(AGAINST))

variants: $(READY)  ## print the names of the variants that the flake builds, evaluated where Nix is installed
	@$(PYTHON) scripts/variants.py

clean:  ## remove what was built, not the venv
	rm -rf build _build
