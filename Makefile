# Everything a newcomer needs: `make demo` and `make test` make their own environment first.
.DEFAULT_GOAL := help
.PHONY: help demo wheel test-wheel test test-core test-oldest test-newest test-layouts test-pythons test-slow test-browser test-gpu gpu test-faults lint types format bench checkpoint docs clean

PYTHON ?= python3
MINUTES ?= 240
DEVICE ?= cpu
# `make test PYTHON=python3.13` has an environment of its own, so that it never runs another Python's in silence.
ifeq ($(origin PYTHON),command line)
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
else
VENV := .venv
endif
BIN := $(VENV)/bin
# Installed once per change of the dependencies; the stamp remembers it.
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(CORE): $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch -e .
	@touch $@

$(DEV): $(CORE)
	$(PIP) -e ".[dev]"
	@touch $@

demo: $(CORE) ## label pictures of an art style the embedded checkpoint has never seen; writes demo.png
	$(BIN)/siglip-hf demo --out demo.png

test: $(DEV) ## run the tests (a few minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not slow and not browser"

# What has to hold on every version of transformers: models, processors, tokenizers, pipeline, registration, conversion.
TESTS ?= tests/models tests/preprocessing tests/inference/test_pipeline_zero_shot.py tests/test_registration.py \
  tests/integrations/test_convert_big_vision.py tests/peers/test_stock_both_ways.py tests/peers/test_outputs.py \
  tests/peers/test_accelerate.py tests/peers/test_peft.py
CORE_NEEDS := pytest pytest-xdist peft pandas
OLDEST := transformers==5.19.0
NEWEST := transformers tokenizers accelerate peft
# They import torchvision, for which a stand-in serves.
LAYOUTS := open_clip_torch timm ftfy
CLIP_BENCHMARK := clip-benchmark webdataset braceexpand
ONNX_READERS := openvino fastembed loguru mmh3 py-rust-stemmers
PYTHONS ?= python3.11 python3.12 python3.13
# Other versions lie in a folder that is searched before the environment's own packages; torch is shared.
OTHER = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target
# RECORD=--record writes the versions and what came out into docs/compatibility.md.
RUN = OMP_NUM_THREADS=1 $(BIN)/python scripts/checks/versions.py $(RECORD) -n 2 -q -m "not gpu and not slow and not browser" $(TESTS)

test-core: $(CORE) ## run the core tests alone, with little more than the package needs; PYTHON=python3.13
	$(PIP) $(CORE_NEEDS)
	$(RUN)

test-oldest: $(DEV) ## run the core tests on the oldest transformers that we claim
	rm -rf $(VENV)/oldest
	$(OTHER) $(VENV)/oldest $(OLDEST)
	PYTHONPATH=$(CURDIR)/$(VENV)/oldest $(RUN)

test-newest: $(DEV) ## run the core tests on the newest transformers, tokenizers, accelerate and PEFT; TESTS=tests: all
	rm -rf $(VENV)/newest
	$(OTHER) $(VENV)/newest $(NEWEST)
	PYTHONPATH=$(CURDIR)/$(VENV)/newest $(RUN)

test-layouts: $(DEV) ## compare with open_clip, timm, CLIP_benchmark, OpenVINO and fastembed, and run NLLB-CLIP, in folders of their own
	rm -rf $(VENV)/layouts $(VENV)/torchvision $(VENV)/readers
	$(OTHER) $(VENV)/layouts -c constraints.txt $(LAYOUTS) $(CLIP_BENCHMARK)
	PYTHONPATH=$(CURDIR)/$(VENV)/layouts OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/peers/test_layouts.py tests/peers/test_clip_benchmark.py
	$(OTHER) $(VENV)/torchvision -c constraints.txt torchvision
	PYTHONPATH=$(CURDIR)/$(VENV)/layouts:$(CURDIR)/$(VENV)/torchvision OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/apps/test_nllb_clip.py
	$(OTHER) $(VENV)/readers -c constraints.txt $(ONNX_READERS)
	PYTHONPATH=$(CURDIR)/$(VENV)/readers OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/peers/test_onnx_readers.py

test-pythons: ## run demo and tests on every Python that we claim, each in an environment of its own (gigabytes each)
	for python in $(PYTHONS); do $(MAKE) demo test PYTHON=$$python || exit 1; done

wheel: $(CORE) ## build a wheel into dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .

test-wheel: wheel ## install the wheel into a fresh environment and try it in an empty folder
	rm -rf build/try && mkdir -p build/try
	$(PYTHON) -m venv build/try/venv
	build/try/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch dist/*.whl
	cd build/try && venv/bin/siglip-hf --version && venv/bin/siglip-hf demo

test-slow: $(DEV) ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

test-browser: $(DEV) ## try the web pages in a headless Chromium (Debian: chromium, chromium-driver)
	$(BIN)/python -m pytest -m browser

test-gpu: $(DEV) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

# A GPU is often on a machine without a network: scripts/bench/gpu_wheels.sh gathers what to bring; docs/gpu.md.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu: ## measure all that needs a GPU, in 8 minutes; TINY=1: rehearse every step on a CPU; ARGS: options of the script
	PYTHONPATH=$(CURDIR)/gpu_site:$(CURDIR)/src $(GPU_PYTHON) scripts/bench/gpu.py $(if $(TINY),--device cpu --tiny) $(ARGS)

test-faults: $(DEV) ## damage files, kill runs, read hostile texts, huge pictures; prints what became of each (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/checks/damage.py --inputs 3000
	OMP_NUM_THREADS=1 $(BIN)/python scripts/checks/kills.py --kills 20
	OMP_NUM_THREADS=1 $(BIN)/python scripts/checks/memory.py

lint: $(DEV) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV) ## compare with stock transformers and peers on this machine; prints ratios (an hour)
	$(PIP) -e ".[bench]"
	$(PIP) --no-deps $(LAYOUTS)
	for script in $(filter-out %/common.py %/gpu.py %/gpu_steps.py,$(wildcard scripts/bench/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

checkpoint: $(DEV) ## make both embedded checkpoints from nothing; MINUTES=240 of two idle cores, or DEVICE=cuda
	$(PIP) -e ".[data]"
	$(BIN)/python scripts/checkpoints/make_checkpoint.py --minutes $(MINUTES) --device $(DEVICE)

docs: $(DEV) ## build the documentation into site/, run its notebooks and check its links
	RUN_NOTEBOOKS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python scripts/docs/check_links.py site

clean: ## remove what the other targets made
	rm -rf .venv .venv-* build dist site demo.png .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
