# `make demo` and `make test` need only python3 (3.10 or later) with pip and venv; everything is installed in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_FLAGS ?=
# One thread for each worker: the tests run on all cores at once.
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-full test-gpu matrix check docs picture tables results setup clean

demo: $(VENV)/.installed-viz
	$(BIN)/landmark demo

test: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto $(PYTEST_FLAGS)

test-full: $(VENV)/.installed-test
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto -m "not gpu" $(PYTEST_FLAGS)

# On a machine with a GPU, with the Python (PYTHON=...) that has its build of torch; installs nothing.
test-gpu:
	$(ONE_THREAD) PYTHONPATH=src $(PYTHON) -m pytest -m gpu $(PYTEST_FLAGS)

# Every version that the tests run with, each in an environment of its own; SESSIONS="oldest between" runs these alone.
matrix: $(VENV)/.installed-test
	$(BIN)/nox $(addprefix --session ,$(SESSIONS))

check: $(VENV)/.installed-test
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --no-cache --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

# The site, into build/site; a link that leads nowhere is an error. Nothing is loaded from elsewhere.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# README's picture, and the tables of README and docs/ from benchmarks/results.
picture:
	$(PYTHON) docs/picture.py

tables: $(VENV)/.installed-test
	$(BIN)/python benchmarks/tables.py

# Every result that this machine can measure, anew: make results DATA=books
results: $(VENV)/.installed-test
	$(BIN)/python benchmarks/run_all.py --data $(DATA)

setup: $(VENV)/.installed-test

clean:
	rm -rf $(VENV) .nox .pytest_cache .mypy_cache .ruff_cache build dist

# torch first and alone: pip then takes a CPU build from a local index where there is one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@
