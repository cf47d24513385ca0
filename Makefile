# Every target makes .venv by itself: once, and again when the dependencies change.
# Another Python (3.9-3.12): make PYTHON=python3.12 test

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow chaos check
.DELETE_ON_ERROR:

# The embedded quick start: minutes on two CPU cores.
demo: $(READY)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

# Fifty kills in one training of two processes; other ones with CHAOS_SEED=1, fewer with CHAOS_KILLS=10.
chaos: $(READY)
	$(BIN)/python -m pytest -s -m slow tests/engine/test_chaos.py $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_layers.py

$(READY): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "pip>=22.3"
	$(BIN)/python -m pip install --quiet --editable ".[cpu,dev]"
	touch $@
