# headrace: `make` lists what can be made. Needs python3 >= 3.11 with venv, and make; a C++ compiler is used when there is one.

PYTHON ?= python3
VENV   ?= .venv
# Where pip finds the torch wheel. Empty: pip's own default, which on Linux is a CUDA build of several GB.
# For the small CPU build: make serve TORCH_INDEX_URL=<the CPU index named on pytorch.org>. Only torch is installed from it.
TORCH_INDEX_URL ?=
# What `make serve` passes on, e.g. make serve ARGS="--port 9000 --log-level info"
MODEL ?= bundled
ARGS  ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
INPUTS := pyproject.toml constraints.txt
TORCH   = $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
# Tests run two at a time: each runs its model on one thread (tests/conftest.py).
PYTEST  = $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help serve test test-all lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.installed  ## install what is missing and serve the bundled model on port 8000
	$(BIN)/headrace serve $(MODEL) $(ARGS)

test: $(VENV)/.installed-dev  ## the tests, without the slow ones and those that need a GPU
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/.installed-dev  ## every test this machine can run
	$(PYTEST)

lint: $(VENV)/.installed-dev  ## ruff, mypy and the floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/.installed  ## measure the engine against transformers on this machine (minutes)
	$(BIN)/headrace bench engine

clean:  ## remove the virtual environment and every cache of the tools
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests recipes -name __pycache__ -prune -exec rm -rf {} +

# torch goes in first and alone, so that nothing that needs torch can choose another build of it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "headrace needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "python3 cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH) -c constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(INPUTS)
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed $(INPUTS)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
