# Two targets that need nothing but Python 3.11+ and pip:
#   make run    set up, then answer with the embedded demo model (a chat when stdin is a terminal)
#   make test   set up, then everything that CI checks
# A second run reuses the environment: it is made anew only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUESTION := How do I quantize a model to 4 bits?

.PHONY: run test check clean

run: $(VENV)/.run-ready
	@if [ -t 0 ]; then $(BIN)/glm4run chat demo; else $(BIN)/glm4run generate "$(QUESTION)" -m demo --temperature 0; fi

test: $(VENV)/.test-ready check
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.test-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.run-ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "glm4run needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test-ready: $(VENV)/.run-ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bitsandbytes,quanto]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
