# layerfuse: everything runs inside .venv, which is made on first use and renewed when pyproject.toml changes.
#
#   make demo                                          train, compare and report (CPU, minutes)
#   make demo FUSERS="select average mmfuser"          other fusers
#   make demo SEEDS="0 1 2"                            more than one seed
#   make demo IMAGE=photo.jpg PROMPT="How many ..."    also answer a question about a photograph
#   make test | check | assets | build

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The values reach the shell through the environment, unexpanded, so that spaces, quotes and $ in a prompt survive.
override FUSERS := $(value FUSERS)
override SEEDS := $(value SEEDS)
override IMAGE := $(value IMAGE)
override PROMPT := $(value PROMPT)
export FUSERS SEEDS IMAGE PROMPT

.DEFAULT_GOAL := help
.PHONY: help demo test check assets build clean

help:
	@sed -n 's/^#   //p' Makefile

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), once; this takes some minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[all,dev]"
	touch $@

demo: $(INSTALLED)
	@set -- ; \
	[ -z "$$FUSERS" ] || set -- "$$@" --fusers $$FUSERS ; \
	[ -z "$$SEEDS" ] || set -- "$$@" --seeds $$SEEDS ; \
	[ -z "$$IMAGE" ] || set -- "$$@" --image "$$IMAGE" ; \
	[ -z "$$PROMPT" ] || set -- "$$@" --prompt "$$PROMPT" ; \
	exec $(BIN)/python -m integrations.llava demo "$$@"

# One thread a worker: two workers with two threads each would fight over two cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) tests

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_form.py

assets: $(INSTALLED)
	$(BIN)/python -m integrations.llava assets

build: $(INSTALLED)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
