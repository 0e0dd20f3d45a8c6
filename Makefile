# Everything a newcomer or a developer needs. Each target sets up what it uses and can be run again.
.DEFAULT_GOAL := help
.PHONY: help demo test test-long fuzz defects simulate bench check format clean broker

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY  := $(VENV)/.ready

help:  ## Show the targets.
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# torch first and pinned: an unpinned torch pulls gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt requirements-broker.txt
	@echo "Setting up $(VENV): Python packages, about a minute …"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "Install Python's venv module first: apt-get install python3-venv"; exit 1; }
	@$(PIP) --constraint constraints.txt torch
	@$(PIP) --require-hashes --requirement requirements-broker.txt
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## See a simulated fleet train on real data. DEMO_ARGS="--devices 50 --seed 3"
	@$(BIN)/fedtide demo $(DEMO_ARGS)

broker:  ## Install mosquitto where it is missing and this user may.
	@if command -v mosquitto >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo "Installing mosquitto …"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mosquitto; } \
			>/dev/null 2>&1 || echo "mosquitto could not be installed; the tests that need it will be skipped"; \
	else echo "mosquitto is missing; the tests that need it will be skipped. Install it: sudo apt-get install mosquitto"; fi

test: $(READY) broker  ## Run the tests. TEST_ARGS="-k outbox"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" --numprocesses 2 --dist loadfile $(TEST_ARGS)

test-long: $(READY) broker  ## Run all tests, the long ones too: kill loops, fuzzing, convergence.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_ARGS)

fuzz: $(READY)  ## Fuzz a reader of strangers' bytes: make fuzz TARGET=envelope SECONDS=300
	@test -n "$(TARGET)" || { echo "Name one: make fuzz TARGET=NAME SECONDS=300. There are:"; $(BIN)/python tests/fuzz/fuzz.py --list; exit 2; }
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) --only-binary :all: --constraint constraints.txt atheris==3.0.0 >/dev/null 2>&1 || true
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py $(TARGET) --seconds $(or $(SECONDS),60)

defects: $(READY)  ## Plant each known defect in a copy; its test must fail. DEFECTS_ARGS="--only NAME"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/rig/plant_defects.py $(DEFECTS_ARGS)

simulate: $(READY)  ## Simulate a fleet in virtual time: make simulate SEED=7, or SIMULATE_ARGS="--hours 24 --devices 1000"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/rig/simulate.py --seed $(or $(SEED),0) $(SIMULATE_ARGS)

bench: $(READY) broker  ## Run one benchmark: make bench BENCH=straggler BENCH_ARGS="…"
	@test -n "$(BENCH)" || { echo "Name one: make bench BENCH=NAME. There are:"; ls benchmarks | sed -n 's/\.py$$//p'; exit 2; }
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$(BENCH).py $(BENCH_ARGS)

check: $(READY)  ## Lint, format and types.
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(READY)  ## Format the code.
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

clean:  ## Remove what the targets made.
	rm -rf $(VENV) demo-output build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
