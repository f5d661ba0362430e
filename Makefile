# Every target sets up what it needs, from a fresh clone on; an existing .venv is used as it is.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.localize-ready
DEMO := runs/demo

# Threads that wait do not spin: on a machine with other work to do, small models train many times as fast.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install check format test test-all demo bench docs clean

help:  ## Shows this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(READY)  ## Makes .venv with the package and its development tools

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

check: $(READY)  ## Lints (ruff) and checks types (mypy)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: $(READY)  ## Orders imports and mends what ruff can mend
	$(BIN)/python -m ruff check --fix .

test: check  ## Runs the checks and the whole test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: check  ## The test suite with its slow tests
	$(BIN)/python -m pytest -m ''

demo: $(READY)  ## Converts examples/model.py, trains it on digits, shows each exit's accuracy beside bp
	$(BIN)/localize convert examples/model.py --method al --parts 4 -o $(DEMO)/al
	$(BIN)/localize train $(DEMO)/al --data digits --epochs 15 --lr 2e-3 > /dev/null
	$(BIN)/localize convert examples/model.py --method bp --parts 4 -o $(DEMO)/bp --quiet
	$(BIN)/localize train $(DEMO)/bp --data digits --epochs 15 --lr 2e-3 > /dev/null
	@echo; echo "Associated Learning, four parts, no gradient between them: every exit is a model"
	@$(BIN)/localize evaluate $(DEMO)/al --data digits
	@echo; echo "The same model and budget, end to end (bp)"
	@$(BIN)/localize evaluate $(DEMO)/bp --data digits

bench: $(READY)  ## Runs the benchmarks that need no GPU
	@for file in benchmarks/*.py; do test -e "$$file" || continue; echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

docs: $(READY)  ## Writes the generated pages of docs/ (the table of methods, the commands' help)
	$(BIN)/python docs/generate.py

clean:  ## Removes what the targets made, the environment apart
	rm -rf runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
