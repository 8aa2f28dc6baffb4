# make quickstart   train and evaluate two networks on real digits, in under five minutes
# make test         the default tests
# make venv         only the environment, .venv

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-deps
RUNS := runs/quickstart
export TF_CPP_MIN_LOG_LEVEL := 3

.PHONY: quickstart test test-slow venv lint format lock

quickstart: venv
	@rm -rf $(RUNS)
	$(BIN)/python train.py --gin_file=configs/digits.gin --workdir=$(RUNS)/static
	$(BIN)/python train.py --gin_file=configs/digits_condconv.gin --workdir=$(RUNS)/condconv
	$(BIN)/python eval.py --workdir=$(RUNS)/static
	$(BIN)/python eval.py --workdir=$(RUNS)/condconv
	$(BIN)/python scripts/compare.py $(RUNS)/static $(RUNS)/condconv --output=$(RUNS)/accuracy.png

test: venv
	$(BIN)/python -m pytest -n 2

test-slow: venv
	$(BIN)/python -m pytest -n 2 -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

venv: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "needs Python 3.11, 3.12 or 3.13; have $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "needs Python's venv module: install the package python3-venv"; exit 2; }
	$(PYTHON) -m venv --clear .venv
	@echo "installing about 90 packages, 2 GB, from requirements.lock; this takes a minute or two"
	$(PIP) --progress-bar=off --require-hashes -r requirements.lock \
	  | sed -u -n 's/^Collecting \([^ ]*\).*/  \1/p; s/^Installing.*/installing them …/p'
	$(PIP) --quiet --no-build-isolation --editable .
	@touch $@

# Needs uv (pip install uv): the locks hold hashes for every supported Python and no index.
lock:
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	  --extra train --extra jax --extra export --extra dev pyproject.toml -o requirements.lock
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-header --python-version 3.11 \
	  --extra tpu pyproject.toml -o requirements-tpu.lock
