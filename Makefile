# Needs python3 (3.11 or newer), make and git; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# pip, saying only what it fetches; Python compiles what is imported, which is the smaller part
PIP_INSTALL = python -m pip install --disable-pip-version-check --no-input --no-compile -e
INSTALL = $(BIN)/$(PIP_INSTALL)
# neighbours share engines, so each worker takes a stretch; who is done takes half of what another has left
PYTEST_ON_ALL = $(BIN)/pytest -n auto --maxprocesses=4 --dist=worksteal
SHOW = grep --line-buffered -E '^(Collecting|Installing|ERROR)' | cut -c1-100

.PHONY: help demo test lint parity ahead ray bench-doors bench-continuity lock

help:  ## This list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: .venv/installed  ## 64 agents against a real server, and what scheduling gains where memory is short: tables and pictures
	$(BIN)/python scripts/demo.py

test: .venv/installed  ## Every test that needs neither an accelerator nor PyTorch
	$(PYTEST_ON_ALL) -m "not parity and not gpu and not ahead and not ray"

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: .venv/parity  ## Compare with transformers live (installs PyTorch)
	OMP_NUM_THREADS=1 $(PYTEST_ON_ALL) -m parity  # PyTorch's threads would spin where other workers compute

ray: .venv/ray  ## A fleet on a Ray of this machine: right answers, a killed replica, a new version (installs Ray)
	$(BIN)/pytest -m ray -n0

ahead: .venv-ahead/installed  ## Compile the serving step for TPUs that are not here (installs libtpu)
	.venv-ahead/bin/python -m pytest -m ahead tests/ahead

bench-doors: .venv/installed  ## What HTTP and gRPC, constrained decoding and overload cost, beside a CPU and a pretended device
	$(BIN)/python scripts/bench_doors.py
	$(BIN)/python scripts/bench_doors.py --pretend_ms=5

bench-continuity: .venv/installed  ## What turns reuse of earlier ones, what that costs, and what agents that name no session get
	$(BIN)/python scripts/bench_continuity.py
	$(BIN)/python scripts/bench_agents.py

# The one file with exact versions; users get the ranges of pyproject.toml.
lock: .venv/installed  ## Resolve all dependencies anew and pin them for CI in requirements/ci.lock
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report - -e '.[dev,demo,parity,ray,tpu]' \
	  | $(BIN)/python scripts/lock.py > requirements/ci.lock.new
	mv requirements/ci.lock.new requirements/ci.lock

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[dev,demo]' | $(SHOW)
	@touch $@

.venv/parity: .venv/installed
	$(INSTALL) '.[dev,demo,parity]' | $(SHOW)
	@touch $@

.venv/ray: .venv/installed
	$(INSTALL) '.[dev,demo,ray]' | $(SHOW)
	@touch $@

# By itself, so that libtpu never lies beside what the other tests import; the rest it takes from .venv.
.venv-ahead/installed: .venv/installed
	$(PYTHON) -m venv .venv-ahead
	there=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	here=$$(.venv-ahead/bin/python -c 'import site; print(site.getsitepackages()[0])'); \
	echo "import site; site.addsitedir('$$there')" > $$here/0-shared.pth  # sorts before that of the package, which needs what is there
	.venv-ahead/bin/$(PIP_INSTALL) '.[tpu]' | $(SHOW)
	@touch $@
