# Two commands do all set-up: `make demo` and `make test`. Each makes its own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
# One exact version: an open range may pull several gigabytes of GPU packages.
TORCH ?= torch==2.13.0
KEEP ?= 0.5
HEAL ?= 100
BIN := $(VENV)/bin
# Waiting threads sleep instead of spinning: on shared machines spinning costs a factor of ten.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint bench claims docs clean

demo: $(VENV)/demo.stamp
	rm -rf demo
	$(BIN)/gramian compress --keep $(KEEP) --heal $(HEAL) --out demo
	@echo "report: $(CURDIR)/demo/report.html"

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check src tests benchmarks claims examples docs
	$(BIN)/ruff format --check src tests benchmarks claims examples docs
	$(BIN)/mypy

bench: $(VENV)/test.stamp
	cd benchmarks && ../$(BIN)/python encoder.py baselines plain free bytes flops
	cd benchmarks && ../$(BIN)/python prediction.py
	cd benchmarks && ../$(BIN)/python speed.py
	cd benchmarks && env -u OMP_WAIT_POLICY ../$(BIN)/python overhead.py    # threads wait as they do in a user's own process
	cd benchmarks && env -u OMP_WAIT_POLICY ../$(BIN)/python structures.py
	cd benchmarks && ../$(BIN)/python spectra.py
	cd benchmarks && env -u OMP_WAIT_POLICY ../$(BIN)/python adapters.py
	cd benchmarks && env -u OMP_WAIT_POLICY ../$(BIN)/python sequence.py
	cd benchmarks && env -u OMP_WAIT_POLICY ../$(BIN)/python state_space.py
	cd benchmarks && ../$(BIN)/python language.py
	cd benchmarks && ../$(BIN)/python encoder.py heal

claims: $(VENV)/test.stamp
	for claim in claims/*.py; do \
	  case $$claim in */record.py|*/tasks.py|*/rotated_digits.py) ;; *) $(BIN)/python $$claim || exit 1 ;; esac; \
	done

docs: $(VENV)/docs.stamp
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv demo site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

.PRECIOUS: $(VENV)/%.stamp
