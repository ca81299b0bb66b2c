# Targets are listed by `make help`. Every target that needs the environment makes it first.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

# A module system's PYTHONPATH and ~/.local would shadow what .venv holds.
unexport PYTHONPATH
export PYTHONNOUSERSITE := 1

BIN := .venv/bin
SIZES := 1 2 3 4
WORKERS := 2
# Asked for explicitly, or the environment that is active, else .venv.
HOROVOD_PYTHON = $(or $(PYTHON),$(if $(VIRTUAL_ENV)$(CONDA_PREFIX),python3,$(BIN)/python))

export PYTHON
# make has a CXX of its own; only one that somebody chose is passed on.
ifneq ($(origin CXX),default)
export CXX
endif

.PHONY: help setup demo test unit faults ranks cluster-smoke test-cluster check format horovod clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: ## Make or renew .venv: torch, an MPI, Horovod, hpctrain (minutes once, then an instant)
	@tools/setup

demo: setup ## Train the built-in run, a CNN on handwritten digits, with 2 ranks
	@tools/launch 2 -- $(BIN)/hpctrain
	@echo "      (these commands need the environment: . $(BIN)/activate)"

test: setup ## Run all tests: unit, faults and ranks
	@times=; for room in unit faults ranks; do \
	  start=$$SECONDS; $(MAKE) $$room; times+=", $$room $$((SECONDS - start)) s"; \
	done; echo "make test: all passed$$times"

unit: setup ## Run the tests of one process, WORKERS=2 at a time (0: none beside the first)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/unit \
	  -n $(WORKERS) --dist loadfile $(ARGS)

faults: setup ## Run the tests that start whole jobs and let something go wrong
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests/faults $(ARGS)

# Ranks always see a terminal under Open MPI, so colour is decided out here.
ranks: setup ## Run the tests under mpirun with 1, 2, 3 and 4 ranks (SIZES="2 4" for fewer)
	@color=no; [ ! -t 1 ] || color=auto; \
	for size in $(SIZES); do \
	  echo "== tests/ranks with $$size rank(s)"; \
	  OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
	    tools/launch $$size -- $(BIN)/python -m pytest --color=$$color tests/ranks $(ARGS) || { \
	    code=$$?; echo "make ranks: failed with $$size rank(s), code $$code" >&2; exit $$code; }; \
	done

# Both need root, and install packages (Debian) where they lack some.
CLUSTER = PATH="$(CURDIR)/$(BIN):$$PATH" HPCTRAIN_REQUIRE_CLUSTER=1 OMP_NUM_THREADS=1 \
  $(BIN)/python -m pytest tests/cluster

cluster-smoke: setup ## On four virtual nodes: train, stop and resume under SLURM (root)
	@$(BIN)/python -m tests.cluster.packages && $(CLUSTER) -m smoke $(ARGS)

test-cluster: setup ## All tests on virtual nodes: SLURM, PBS, Apptainer (root, up to 30 minutes)
	@$(BIN)/python -m tests.cluster.packages && $(BIN)/python -m tests.cluster.images.install && \
	  $(CLUSTER) --durations=15 $(ARGS)

check: setup ## Check format, lint and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

format: setup ## Put the code into its one format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

horovod: ## Build Horovod for the active environment, keep the wheel, install it
	@[ -x "$$(command -v $(HOROVOD_PYTHON))" ] || { \
	  echo "make horovod: no environment is active and .venv does not exist: activate the one that" \
	    "holds hpctrain, name its Python (make horovod PYTHON=...), or run: make setup" >&2; exit 2; }
	@$(HOROVOD_PYTHON) tools/build_horovod.py

clean: ## Remove .venv and what tools left; kept wheels and runs stay
	@rm -rf .venv .venv.old-* .venv.lock .venv.log build dist ./*.egg-info \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
