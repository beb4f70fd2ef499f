# `make demo` and `make test` do all the set-up on a fresh machine: virtual environment, pinned versions, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all lint bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt examples/headgate-lisa/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,lm-eval,ray,slurm]"
	$(BIN)/python -m pip install -q --no-deps -e examples/headgate-lisa
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/headgate compare recipes/demo.yaml --workers 2

test: $(STAMP)
	$(BIN)/python -m pytest

test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

lint: $(STAMP)
	$(BIN)/ruff check src tests scripts examples
	$(BIN)/ruff format --check src tests scripts examples
	$(BIN)/mypy src/headgate/ops src/headgate/modules src/headgate/methods

bench: $(STAMP)
	for name in $$($(BIN)/python -c "from headgate.experiments.benchmarks.frame import benchmark_names as n; print(*n())"); do \
		$(BIN)/headgate bench $$name --json benchmarks/results/$$name.cpu.json || true; done

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
