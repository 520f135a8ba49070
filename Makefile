# Two commands: `make demo` and `make test`. Each sets up .venv by itself.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check install clean

demo: install
	$(BIN)/reroll demo

test: check
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: install
	$(BIN)/pytest -m slow

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# torch first and pinned, from where pip is configured to look: asked for by a range, through
# another package, it could bring several gigabytes of CUDA libraries that the tests do not need
install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv
