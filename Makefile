# quickstart: set up, then P-tune SmolLM2-135M on the shipped facts.    test: set up, then run all tests.
VENV ?= .venv
RANKS ?= 2
export VENV
BIN := $(VENV)/bin

.PHONY: quickstart test test-dist check format bench setup

quickstart: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --num_gpus $(RANKS) megaptune/train.py --config configs/quickstart.yaml

test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

test-dist: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m dist

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/speed.py --save runs/speed
	$(BIN)/python benchmarks/hosting.py
	$(BIN)/python benchmarks/loading.py

setup:
	@launchers/setup_env.sh
