# `make demo` runs the workflow, `make test` the tests, `make lint` the checks of style and types, and `make docs`
# builds the site of the documentation. All of them set up .venv first.
PYTHON ?= python3
CORES ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs test-cluster clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdp needs Python 3.11 or newer, but this is " + sys.version.split()[0] + "; name another with PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python workflow_scripts/launch.py --cores $(CORES)

test: $(READY)
	$(BIN)/python -m pytest -n $(CORES)

# the extras that only some targets need
$(VENV)/.lint $(VENV)/.docs: $(VENV)/.%: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site:      site/index.html"

# `make test-cluster` needs slurm-wlm and munge; see docs/cluster.md
test-cluster: $(READY)
	$(BIN)/python -m pytest tests/cluster

clean:
	rm -rf results .snakemake
