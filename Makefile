# `make demo` and `make test` do all the set-up on a fresh machine: virtual environment, pinned versions, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo docs quick test test-all mutate equations lint bench gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt examples/headgate-lisa/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,lm-eval,ray,slurm]"
	$(BIN)/python -m pip install -q --no-deps -e examples/headgate-lisa
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/headgate demo

# The site, into build/site; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Under a minute: floors, equations, mathematics, settings; nothing that trains.
QUICK := tests/test_floors.py tests/test_equations.py tests/ops tests/experiments/test_statistics.py tests/evaluation/test_scorers.py \
	tests/backward_gate/test_subspace.py tests/backward_gate/test_sketch.py tests/backward_gate/test_head_loss.py \
	tests/backward_gate/test_equations.py tests/schema_bank/test_config.py tests/schema_bank/test_modules.py \
	tests/schema_bank/test_layer.py tests/schema_bank/test_equations.py tests/layer_routing/test_laws.py \
	tests/layer_routing/test_equations.py tests/lora_experts/test_bank.py tests/lora_experts/test_rank_law.py \
	tests/lora_experts_novelty/test_novelty.py tests/lora_experts_novelty/test_equations.py

quick: $(STAMP)
	$(BIN)/python -m pytest $(QUICK)

# A process a core, of one thread each; at most four, since each holds torch and a model. A file stays in one process.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m ""

# Do the tests notice? 200 mutants with a fixed seed; goes on where it stopped. MUTATE="--count 60 --workers 2"
mutate: $(STAMP)
	$(BIN)/python scripts/mutate.py $(MUTATE)

equations: $(STAMP)
	$(BIN)/python scripts/write_equations.py

lint: $(STAMP)
	$(BIN)/ruff check src tests scripts examples
	$(BIN)/ruff format --check src tests scripts examples
	$(BIN)/mypy src/headgate

bench: $(STAMP)
	for name in $$($(BIN)/python -c "from headgate.experiments.benchmarks.frame import benchmark_names as n; print(*n())"); do \
		$(BIN)/headgate bench $$name --json benchmarks/results/$$name.cpu.json || true; done

# What an accelerator must show, nine minutes at a time: run it again until nothing is left. GPU="--device cpu --only quick" stands in.
gpu: $(STAMP)
	$(BIN)/python scripts/gpu_checks.py $(GPU)

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
