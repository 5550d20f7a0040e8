# Everything that a checkout needs; `make` alone says what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo serve-demo lint test test-extras test-all bench native clean

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -e
# Stamps, so that packages are installed again only when what is asked for has changed.
SETUP := $(VENV)/.setup
BENCH := $(VENV)/.setup-bench
EXTRAS := $(VENV)/.setup-extras
RECORD := benchmarks/test-all.txt
# Processes of the tests: one more than cores, for some tests wait, and eight at most, for each has torch in memory.
# Each begins with tests that lie together, which share what is made once for a file, and takes others' when it is done.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores + 1 : 8)))
PYTEST := $(RUN) -m pytest -q -n $(WORKERS) --dist worksteal

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP) ## a virtual environment in .venv with the pinned versions
$(SETUP): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"FlexMoE needs Python 3.10 or newer, and \
	$(PYTHON) is {sys.version.split()[0]}; choose another one with make PYTHON=…")'
	@echo "installing into $(VENV) (torch is large, so this takes minutes)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) '.[test,serve,structured]'
	@touch $@
$(BENCH): $(SETUP)
	@$(INSTALL) '.[test,serve,structured,bench,plot]'
	@touch $@
$(EXTRAS): $(SETUP)
	@$(INSTALL) '.[test,serve,ray,lm-eval]'
	@touch $@

demo: $(SETUP) ## answers of a small real model across all three tiers; ARGS=--synthetic: no download
	@$(RUN) -m scripts.demo $(ARGS)

serve-demo: $(SETUP) ## the server with that model: runs a batch through the openai client; ARGS=--synthetic: no download
	@$(RUN) -m scripts.serving.demo $(ARGS)

lint: $(SETUP) ## form and types of the sources
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

test: lint ## lint and the tests, in minutes
	@$(PYTEST) -m "not slow and not gpu"

test-extras: $(EXTRAS) ## the tests of flexmoe.ray and flexmoe.lm_eval, which install Ray and lm-evaluation-harness
	@$(RUN) -m pytest -q tests/flexmoe/ray tests/flexmoe/lm_eval tests/test_scale_out.py

test-all: lint $(EXTRAS) ## every test that needs no GPU, and its record in benchmarks/
	@mkdir -p build
	@$(PYTEST) --color=no -m "not gpu" | tee build/test-all.log
	@{ date -u '+date      %Y-%m-%d %H:%M UTC'; \
	   echo "machine   $$(uname -sm), $$(nproc) cores"; \
	   echo "versions  $$($(RUN) -c "$$VERSIONS")"; \
	   echo "result    $$(tail -n 1 build/test-all.log)"; } > $(RECORD)
	@cat $(RECORD)

define VERSIONS
import platform
from importlib.metadata import version
names = ("torch", "transformers", "safetensors", "numpy", "pytest")
print(f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names), sep=", ")
endef
export VERSIONS

bench: $(BENCH) ## speed against its limit and against transformers and accelerate
	@$(RUN) -m scripts.bench $(ARGS)

native: $(SETUP) ## compile the CPU attention ahead of its first use
	@$(RUN) -m flexmoe.kernels.native

clean: ## remove what the other targets made, except .venv
	@rm -rf build demo .pytest_cache *.egg-info
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
