# On a fresh machine `make demo` and `make test` do all set-up themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

.PHONY: env demo test test-fast check format docs clean
.DEFAULT_GOAL := help

help:            ## what each command does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

env: $(STAMP)    ## build the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: env        ## train a small MoE beside its dense twin and write runs/demo/report.html
	$(BIN)/moesaic train --preset demo --out runs/demo --overwrite

test: env        ## all tests
	$(BIN)/python -m pytest -n auto

test-fast: env   ## the tests that finish in about a minute
	$(BIN)/python -m pytest -n auto -m "not slow"

check: env       ## everything CI asks for: format, lint, types, tests, docs
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE) test
	$(MAKE) docs

format: env      ## let ruff format and mend what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: env        ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:           ## remove what the commands above made, runs/ apart
	rm -rf $(VENV) site build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
