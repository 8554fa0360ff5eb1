# `make train` and `make test` work on a fresh machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
TEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test check benchmark clean

help:  ## show this list
	@grep -E '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv and install everything into it

# Installs again only when the requirements change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

train: setup  ## train the agents, prune, finetune and measure: make train ARGS="--algo random --seed 1"
	$(RUN) experiments/train_agents.py $(ARGS)

test: setup  ## run the tests: make test TEST_ARGS="tests/gan -x"
	$(RUN) -m pytest $(TEST_ARGS)

check: setup  ## format, lint and types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

benchmark: setup  ## plans per second and the seconds of every stage
	$(RUN) experiments/benchmark.py $(ARGS)

clean:  ## remove the environment and the caches; run folders stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
