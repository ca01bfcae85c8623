# make install | demo | test | lint | bench
PYTHON ?= python3.11
VENV := .venv
# Files of tests that run beside each other: much of a cluster's test is waiting.
TESTS_AT_ONCE ?= 2
BIN := $(VENV)/bin
# Small machines: one thread per process, because the processes already share the cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo test lint bench clean

install: $(VENV)/.installed

# DeepSpeed's build looks for torch, so torch comes first and the build sees it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25" wheel "setuptools>=77,<82"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/captune run sample

test: install
	$(BIN)/python -m pytest --numprocesses $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_documents.py

bench: install
	@for file in tests/bench/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf runs
