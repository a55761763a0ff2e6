# make demo: the main job on the bundled model.  make test: lint, docs and all tests.  Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint docs format sanitize clean

demo: $(VENV)/.demo
	$(BIN)/cats demo --out demo-out --force

# whole files to each worker, in the order of tests/conftest.py; a worker has one thread
test: lint docs
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# into docs/_build; a link or a name in a docstring that leads nowhere fails
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the CPU kernels' own test, without torch, under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize:
	src/cats_llm/kernels/cpu/csrc/sanitize.sh

# torch first and by the exact version of the constraints: a range would take the newest build, with gigabytes of CUDA
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(shell grep '^torch==' constraints.txt)
	$(PIP) scikit-build-core cmake ninja
	touch $@

# without build isolation: the extension is built against this torch, not against another one that isolation downloads
SOURCES := $(wildcard src/cats_llm/kernels/cpu/csrc/*) CMakeLists.txt pyproject.toml

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[report]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo-out docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
