# `make help` lists what there is. Variables: PYTHON (the interpreter the venv is made from), ARGS (see help).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := all,dev
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := $(CURDIR)/build/demo
BUNDLE := bundles/chest_xray

.PHONY: help
help:  ## show this list
	@echo "MONAI-JointDiff. Targets:"
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables:"
	@echo "  PYTHON=python3.12     the interpreter (3.11 or newer) that .venv is made from"
	@echo "  ARGS=\"...\"            further options: make demo ARGS=\"--epochs 1\", make test ARGS=\"-k unet\""

.PHONY: venv
venv: $(STAMP)  ## create .venv from constraints.txt (the targets below do it when needed)

# torch goes first and alone: pip then takes the build its index prefers (a CPU build where one is offered), and the
# second step finds the requirement fulfilled instead of replacing it and pulling the CUDA libraries.
$(STAMP): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "constraints.txt needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
		"choose another with 'make PYTHON=python3.12 ...'." >&2; exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) -V)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing $$(grep '^torch==' constraints.txt) (a large download, some minutes the first time)"
	@$(PIP) install -qq -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@echo "[3/3] installing monai-jointdiff[$(EXTRAS)] and what it needs"
	@$(PIP) install -qq -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

.PHONY: demo
demo: $(STAMP)  ## train the chest x-ray bundle on the embedded phantoms, afresh, into build/demo (minutes)
	@rm -rf "$(DEMO)" && mkdir -p "$(DEMO)"
	$(BIN)/python -m monai.bundle run --config_file $(BUNDLE)/train.json \
		--ckpt_dir "$(DEMO)/models" --output_dir "$(DEMO)/output" $(ARGS)
	@echo; echo "Pictures:"; find "$(DEMO)" -name '*.png' | sort | sed 's/^/  /'
	@echo "Weights, tables and curves: $(DEMO)"
	@echo "Curves and samples as they went: $(BIN)/tensorboard --logdir \"$(DEMO)\""

.PHONY: test
test: $(STAMP)  ## run the tests; those on real data need JOINTDIFF_DATA=<folder>, others skip with a reason
	@$(BIN)/python -m pytest -q -p no:cacheprovider -rs --durations=15 $(ARGS)

.PHONY: lint
lint: $(STAMP)  ## style, and a docstring for every public thing: ruff
	@$(BIN)/python -m ruff check --quiet . && echo "lint: no findings"

.PHONY: types
types: $(STAMP)  ## types: mypy over the package and the benchmarks
	@$(BIN)/python -m mypy

.PHONY: docstrings
docstrings: $(STAMP)  ## the arguments in docstrings match the signatures: pydoclint
	@$(BIN)/pydoclint --quiet monai_jointdiff && echo "docstrings: no findings"

.PHONY: tables
tables: $(STAMP)  ## render the benchmark tables of the README files from benchmarks/results/*.json
	@$(BIN)/python -m benchmarks.render

.PHONY: check
check: lint types docstrings test  ## all of the above checks

.PHONY: clean
clean:  ## remove caches and everything built or trained by demo, but not .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## clean, and remove .venv as well
	@rm -rf $(VENV)
