# Without PYTHON: a virtual environment with the pinned dependencies. With PYTHON=python3:
# that existing environment, no installation and no network.
.DEFAULT_GOAL := help
.PHONY: help venv build demo test families conformance matrix clean gpu-check bench tune cuda-compile

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/stamp
endif
BASE_PYTHON ?= python3
NVCC ?= $(shell command -v nvcc 2>/dev/null || echo /usr/local/cuda/bin/nvcc)
ARCHS := 80 86 89 90a 100 120

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

cuda-compile: $(READY)  ## compile the CUDA sources for every architecture (nvcc and torch headers)
	@include=$$($(PYTHON) -c "import pathlib, importlib.util as u; print(pathlib.Path(u.find_spec('torch').origin).parent / 'include')"); \
	for source in $$(find kernel-src -name "*.cu" | sort); do \
	  $(NVCC) -std=c++20 -O3 -DUSE_CUDA=1 -DCUDA_KERNEL -DTORCH_TARGET_VERSION=0x20b000000000000ULL \
	    -isystem $$include $(foreach a,$(ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) \
	    -c $$source -o /dev/null && echo "compiled $$source for $(ARCHS)" || exit 1; \
	done

clean:  ## remove what was built, not the venv
	rm -rf build _build
