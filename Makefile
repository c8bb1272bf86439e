# On a fresh machine `make demo` and `make test` do all set-up themselves.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PEERS  := .venv-parity
RESULTS := benchmarks/results

.PHONY: env demo test test-fast parity check format docs pages bench bench-gpu clean
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

test-fast: env   ## the tests that take no more than a few seconds each
	$(BIN)/python -m pytest -n auto -m "not slow"

parity: $(PEERS)/.ready  ## compare with DeepSpeed and soft-moe-pytorch, installed apart in .venv-parity
	DS_ACCELERATOR=cpu $(PEERS)/bin/python -m pytest -m parity tests/parity/peers

# In an environment of their own: with DeepSpeed installed, accelerate and transformers take other paths.
$(PEERS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[parity]'
	touch $@

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

pages: env       ## write the pages that come from the code and its tests: catalogue, laws, families
	$(BIN)/python tools/catalogue.py docs/catalogue.md
	$(BIN)/python -m pytest -q -n auto tests/laws/test_every_recipe.py --write-laws docs/laws.md
	$(BIN)/python -m pytest -q -n auto tests/hf/test_adopt_every_family.py --write-families docs/families.md

bench: env       ## measure speed and memory on this CPU, about an hour, and write docs/speed.md
	$(BIN)/moesaic native
	$(BIN)/moesaic bench layer --out $(RESULTS)
	$(BIN)/moesaic bench model --out $(RESULTS)
	$(BIN)/moesaic bench decode --case coarse --case fine --case very-fine --case big-fine --out $(RESULTS)
	$(BIN)/moesaic bench memory --out $(RESULTS)
	$(BIN)/moesaic bench scale --dtype bfloat16 --out $(RESULTS)
	$(BIN)/moesaic bench page --results $(RESULTS) --out docs/speed.md

bench-gpu: env   ## the same on a CUDA device
	$(BIN)/moesaic bench layer --device cuda --out $(RESULTS)
	$(BIN)/moesaic bench decode --device cuda --case big-fine --out $(RESULTS)
	$(BIN)/moesaic bench memory --device cuda --out $(RESULTS)
	$(BIN)/moesaic bench scale --device cuda --dtype bfloat16 --out $(RESULTS)
	$(BIN)/moesaic bench page --results $(RESULTS) --out docs/speed.md

clean:           ## remove what the commands above made, runs/ apart
	rm -rf $(VENV) $(PEERS) site build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
