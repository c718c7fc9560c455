# layerfuse: everything runs inside .venv, which is made on first use and renewed when pyproject.toml or the versions
# that the tests have passed with (requirements/tested.txt) change.
#
#   make demo                                          train, compare and report (CPU, minutes)
#   make demo FUSERS="select average mmfuser"          other fusers
#   make demo SEEDS="0 1 2"                            more than one seed
#   make demo IMAGE=photo.jpg PROMPT="How many ..."    also answer a question about a photograph
#   make demo FEATURE_CACHE=runs/features              feature maps on disk, which all runs share
#   make test | test-slow | check | assets | build
#   make eval-fixtures                                 made-up data of all benchmarks and two tiny checkpoints to try tables with
#   make models                                        try every backbone and fuser anew, and write docs/models.md
#   make test-latest                                   the tests with the newest versions that pyproject.toml allows
#   make test-oldest PYTHON=python3.10                 the tests with the lowest ones
#   make test-lmms                                     the tests of and against lmms-eval, in an environment of its own
#   make versions                                      write requirements/*.txt anew: the newest versions, the lowest ones

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
EVAL_FIXTURES ?= runs/eval-fixtures
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RESOLVE := $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra all --extra dev --no-annotate --no-header pyproject.toml

# The values reach the shell through the environment, unexpanded, so that spaces, quotes and $ in a prompt survive.
override FUSERS := $(value FUSERS)
override SEEDS := $(value SEEDS)
override IMAGE := $(value IMAGE)
override PROMPT := $(value PROMPT)
override FEATURE_CACHE := $(value FEATURE_CACHE)
export FUSERS SEEDS IMAGE PROMPT FEATURE_CACHE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow eval-fixtures models test-latest test-oldest test-lmms versions check assets build clean

help:
	@sed -n 's/^#   //p' Makefile

# $(1): the environment's folder; $(2): pip's options that choose versions. What builds the project is chosen by them, too.
define install
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "installing into $(1), once; this takes some minutes"
	$(1)/bin/python -m pip install --disable-pip-version-check --quiet $(2) hatchling
	$(1)/bin/python -m pip install --disable-pip-version-check --quiet $(2) --no-build-isolation -e ".[all,dev]"
	touch $(1)/.installed
endef

$(INSTALLED): pyproject.toml requirements/tested.txt
	$(call install,$(VENV),-c requirements/tested.txt)

.venv-latest/.installed: pyproject.toml
	$(call install,.venv-latest,--upgrade --upgrade-strategy eager)

.venv-oldest/.installed: pyproject.toml requirements/oldest.txt
	$(call install,.venv-oldest,-c requirements/oldest.txt)

demo: $(INSTALLED)
	@set -- ; \
	[ -z "$$FUSERS" ] || set -- "$$@" --fusers $$FUSERS ; \
	[ -z "$$SEEDS" ] || set -- "$$@" --seeds $$SEEDS ; \
	[ -z "$$IMAGE" ] || set -- "$$@" --image "$$IMAGE" ; \
	[ -z "$$PROMPT" ] || set -- "$$@" --prompt "$$PROMPT" ; \
	[ -z "$$FEATURE_CACHE" ] || set -- "$$@" --feature-cache "$$FEATURE_CACHE" ; \
	exec $(BIN)/python -m integrations.llava demo "$$@"

# One thread a worker: two workers with two threads each would fight over two cores. Each begins with one half of the
# tests as they stand, so that what a file's tests share is made once.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow tests

eval-fixtures: $(INSTALLED)
	$(BIN)/python -m tests.integrations.llava.evaluation.make_fixtures $(EVAL_FIXTURES)

models: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.model_table

test-latest test-oldest: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests

# lmms-eval pins what the ordinary environment has in other versions. latex2sympy2, which it brings, installs its own
# tests as a package `tests`, which would stand in front of ours.
.venv-lmms/.installed: pyproject.toml
	test -x .venv-lmms/bin/python || $(PYTHON) -m venv .venv-lmms
	@echo "installing into .venv-lmms, once; this takes some minutes"
	.venv-lmms/bin/python -m pip install --disable-pip-version-check --quiet -e ".[eval]" hypothesis pytest pytest-xdist
	rm -rf "$$(.venv-lmms/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/tests"
	touch .venv-lmms/.installed

test-lmms: .venv-lmms/.installed
	OMP_NUM_THREADS=1 .venv-lmms/bin/python -m pytest -n $(JOBS) --dist worksteal \
	    tests/integrations/llava/harness tests/integrations/llava/evaluation/test_against_lmms_eval.py \
	    tests/integrations/llava/evaluation/metrics

# uv reads the versions of every Python and system at once, and the lowest ones too; pip can do neither.
versions: $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet uv
	$(RESOLVE) --upgrade -o requirements/tested.txt
	$(RESOLVE) --upgrade --resolution lowest-direct -o requirements/oldest.txt

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py tests/test_form.py
	$(BIN)/python -m tools.model_table --check

assets: $(INSTALLED)
	$(BIN)/python -m tools.make_demo_assets

build: $(INSTALLED)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest .venv-lmms dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
