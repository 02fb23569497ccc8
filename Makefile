# Needs make and Python 3.10 or newer; everything else goes into .venv.
#
#   make demo    a cohort, a trained network, segmented cases, a report: runs/demo/report/index.html
#   make test    every test: notebooks, pytest, sync of notebooks and package, documentation
#   make docs    the documentation site: _docs/index.html
#   make clean   remove what the others made

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 ...` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# More options for pip, such as an index with CPU builds of torch: make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_ARGS ?=

BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# smalldocs declares Python 3.11; it runs on 3.10 too, where it is installed past that declaration
SMALLDOCS = $(shell sed -n 's/^\(smalldocs==[^;]*\).*/\1/p' constraints.txt)

.PHONY: help demo test docs clean install dev
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   make/  make/p' Makefile

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: found no Python 3.10 or newer (found: $$(python3 --version 2>&1)); name one with make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install them first (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/installed: settings.ini constraints.txt setup.py pyproject.toml | .venv/bin/python
	@echo "installing neuroseg3d into .venv (minutes the first time)"
	@$(PIP) -e .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what development needs into .venv"
	@$(PIP) -e '.[dev]'
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || $(PIP) --no-deps --ignore-requires-python $(SMALLDOCS)
	@touch $@

install: .venv/installed
dev: .venv/installed-dev

demo: .venv/installed
	@$(BIN)/neuroseg3d demo --output_dir runs/demo

test: .venv/installed-dev
	@echo "== notebooks and package in step"
	@$(BIN)/python tools/sync.py
	@echo "== notebooks"
	@$(BIN)/python tools/run_notebooks.py
	@echo "== documentation"
	@$(BIN)/python tools/docs.py
	@echo "== pytest"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 15 tests

docs: .venv/installed-dev
	@$(BIN)/python tools/docs.py

clean:
	rm -rf .venv _docs _proc runs build dist wandb lightning_logs *.egg-info .pytest_cache .hypothesis .quarto
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
