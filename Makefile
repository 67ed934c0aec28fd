PYTHON ?= python3
BIN := .venv/bin
# Compiling every module of every package takes nearly as long as fetching them; Python compiles what it imports.
PIP = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
DEMO := .venv/demo
INSTALLED := .venv/installed
COMPAT := .venv/compat
BENCHMARKS := arithmetic scaling simulate memory plan loader step instructions unet train start encode encode_again infer equality

.PHONY: help install demo test slow gpu check compat bench format clean
.DEFAULT_GOAL := help

help:  ## list these targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(INSTALLED)  ## prepare .venv with everything pinned; does nothing when nothing changed

$(DEMO): pyproject.toml constraints.txt
	@echo "== Installing into .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) pip  # the one of Python 3.11 knows no groups
	@$(PIP) --group demo -e .
	@mkdir -p .venv/typing && ln -sfn ../.. .venv/typing/ip2p
	@touch $@

$(INSTALLED): $(DEMO)
	@$(PIP) --group test --group dev -e '.[ui]'
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

check: install  ## lint, format, types and licences, as CI runs them
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/reuse lint --quiet

compat:  ## the tests with the oldest versions that are allowed, and on Python 3.12 and 3.13: 20 GB, no part of CI
	@$(PYTHON) -m venv $(COMPAT)/uv && $(COMPAT)/uv/bin/python -m pip install --quiet -c constraints.txt uv
	@for how in '3.11 --resolution=lowest-direct' '3.12 --constraints=constraints.txt' '3.13 --constraints=constraints.txt'; do \
		set -- $$how; echo "== Python $$1 $$2"; \
		$(COMPAT)/uv/bin/uv venv --quiet --clear --seed --python $$1 $(COMPAT)/$$1 && \
		$(COMPAT)/uv/bin/uv pip install --quiet --python $(COMPAT)/$$1 $$2 --group test -e '.[ui]' && \
		$(COMPAT)/$$1/bin/python -m pytest -W default -m "not slow" -n auto --maxprocesses 8 --dist loadfile || exit; done

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
