# make demo    install into .venv and show pruning on the shipped model
# make test    install into .venv and run ruff, mypy, import-linter and the tests that are not slow
# make test-slow   the slow tests; make test-all   everything
# make test-compat   the suite's core at both ends of the supported torch and transformers; make test-compat-low: one
# make check   ruff, mypy and the rooms' imports alone
# make bench   install into .venv and time pruning against the same model unpruned

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST = $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# pip compiles some hundred packages on one core, in 40 seconds; compileall takes all cores. What no Python reads, such as
# templates, it leaves as pip does, but says so by its exit code.
COMPILE = $(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: demo test test-quick test-slow test-all test-compat test-compat-low check bench clean

demo: $(VENV)/.run
	$(VENV)/bin/hawk-compile demo

test test-quick test-slow test-all: export OMP_NUM_THREADS ?= 1
# Side by side: mypy alone would leave cores idle.
test: $(VENV)/.test
	$(MAKE) --jobs 2 check test-quick

test-quick: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) -m slow

test-all: check
	$(PYTEST)

test-compat: $(VENV)/.test
	$(VENV)/bin/python tests/compat.py low high --workers $(WORKERS)

test-compat-low: $(VENV)/.test
	$(VENV)/bin/python tests/compat.py low --workers $(WORKERS)

check: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/mypy

bench: $(VENV)/.run
	$(VENV)/bin/hawk-compile bench

# A stamp is newer than what it was made from, so a second run installs nothing.
$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	$(COMPILE)
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test]'
	$(COMPILE)
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .compat build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
