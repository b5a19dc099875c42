# Every target works as the first command on a fresh clone: what it needs is installed into .venv first.

PYTHON    ?= python3
PIP_ARGS  ?=
TEST_ARGS ?=
WORKERS   ?= 3
DEMO_ARGS ?=
GPU_ARGS  ?=

VENV  := .venv
BIN   := $(VENV)/bin
# Setuptools warns about every editable installation; errors are still shown.
PIP   := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c constraints.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)

# DeepSpeed compiles a small operator when it first starts, and looks for ninja on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-quick check docs gpu-suite clean
# Installations of one environment must not overlap, also under make -j.
.NOTPARALLEL:

help:  ## this list
	@echo "usage: make TARGET"
	@echo
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/\1:\2/p' Makefile | awk -F': *' '{ printf "  %-10s %s\n", $$1, $$2 }'
	@echo
	@echo "  variables: PYTHON=python3.12  TEST_ARGS='-k tokenizer'  DEMO_ARGS='--help'"
	@echo "             WORKERS=4, processes in which tests run"
	@echo "             GPU_ARGS='--dry-run', which needs no GPU"
	@echo "             PIP_ARGS='--extra-index-url URL', for example of a CPU build of torch"

install: $(VENV)/.test.stamp  ## everything for development, into .venv

demo: $(VENV)/.demo.stamp  ## from raw text to a trained, evaluated, talking model, on a CPU
	$(BIN)/python tools/demo.py $(DEMO_ARGS)

test: $(VENV)/.test.stamp  ## all tests; TEST_ARGS goes to pytest
	$(BIN)/python -m pytest -n $(WORKERS) $(TEST_ARGS)

test-quick: $(VENV)/.test.stamp  ## the tests that take less than a second or two, from all packages
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not slow' $(TEST_ARGS)

check: $(VENV)/.test.stamp  ## lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs.stamp  ## the documentation's site, into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu-suite: $(VENV)/.test.stamp  ## a GPU's tests, tuning and benchmarks, in ten minutes
	$(BIN)/python -m benchmarks.gpu_suite --record $(GPU_ARGS)

clean:  ## remove .venv, caches, build and demo output (runs/ stays)
	rm -rf $(VENV) build dist demo *.egg-info .torch_extensions .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, in steps; a change of pyproject.toml or constraints.txt repeats those that it touches.

$(VENV)/.venv.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: Python 3.10 or newer is needed, as $(PYTHON); name another with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) --upgrade pip
	@touch $@

# Without torch and the package: it takes seconds.
$(VENV)/.docs.stamp: $(VENV)/.venv.stamp pyproject.toml
	@echo "installing what the documentation's site needs"
	@$(PIP) --group docs
	@touch $@

$(VENV)/.torch.stamp: $(VENV)/.venv.stamp
	@command -v $${CXX:-c++} >/dev/null || { \
	    echo "error: no C++ compiler (DeepSpeed compiles one small operator when it first starts);" \
	         "on Debian and Ubuntu: apt-get install g++, or set CXX"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; \
	    sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
	    echo "error: $(PYTHON) has no C headers (Python.h); on Debian and Ubuntu: apt-get install python3-dev"; \
	    exit 1; }
	@echo "installing $(TORCH) into $(VENV); this is the largest download"
	@# First and pinned: left to a dependency, pip could fetch another, far larger build.
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo.stamp: $(VENV)/.torch.stamp pyproject.toml setup.py
	@echo "installing megatron_lpa and what the demo needs"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test.stamp: $(VENV)/.demo.stamp
	@echo "installing what the tests need"
	@$(PIP) -e '.[test]'
	@# A peer that tests compare file formats with; its own dependencies are not wanted.
	@$(PIP) --no-deps megatron-core==0.16.1
	@touch $@
