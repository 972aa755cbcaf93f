# Every target makes .venv and installs into it by itself, once; `make clean` starts over.

BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/aegpo train --output-dir runs/demo --overwrite

test: $(INSTALLED_DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

clean:
	rm -rf .venv runs dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in python3 python3.13 python3.12 python3.11; do \
		if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	done; \
	echo "aegpo needs Python 3.11 or newer, and none was found as python3, python3.13, python3.12 or python3.11" >&2; \
	exit 1

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into .venv: a minute or two, 1.6 GB"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
