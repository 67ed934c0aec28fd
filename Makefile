PYTHON ?= python3
BIN := .venv/bin
# Compiling every module of every package takes nearly as long as fetching them; Python compiles what it imports.
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
DEMO := .venv/demo
INSTALLED := .venv/installed
BENCHMARKS := arithmetic scaling simulate memory plan loader step instructions unet train start encode encode_again infer equality

.PHONY: help install demo test slow gpu check bench format clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED)  ## prepare .venv with everything pinned; does nothing when nothing changed

$(DEMO): pyproject.toml constraints.txt
	@echo "== Installing into .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -e '.[demo]'
	@mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/ip2p
	@touch $@

$(INSTALLED): $(DEMO)
	@$(PIP) -e '.[test,demo,dev,ui]'
	@touch $@

demo: $(DEMO)  ## encode, train and edit real pictures, and end with a contact sheet
	@$(BIN)/python examples/openmoji/demo.py

test: install  ## all tests but the slow ones
	$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadfile

slow: install  ## the slow tests; none at all (pytest's status 5) is no failure
	$(BIN)/pytest -m slow || test $$? -eq 5

gpu: install  ## on a machine with one: the tests that need it, and bench/gpu.py
	$(BIN)/pytest -m gpu || test $$? -eq 5
	$(BIN)/python bench/gpu.py --out bench/results

check: install  ## lint, format and types, as CI runs them
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

bench: install  ## measure everything from a clean tree, unattended, and write the docs' tables anew
	@failed=; for name in $(BENCHMARKS); do \
		echo "== $$name"; $(BIN)/python bench/$$name.py || failed="$$failed $$name"; done; \
	$(BIN)/python bench/summary.py; test -z "$$failed" || { echo "not measured:$$failed"; exit 1; }

format: install  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
