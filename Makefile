# The same steps without make (Windows): see README.md. Each target installs into .venv first if that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a test process (two that spin on the same cores are many times slower), no network, and a cache that is not
# the user's.
TEST_ENV := QLORA_CACHE=$(CURDIR)/.pytest_cache/qlora OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=agg
# What `make test-full` adds: cells and tests marked slow, and those marked gpu where there is one.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu)

.DEFAULT_GOAL := help
.PHONY: help demo test test-full docs lab prepare install clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */|/' | awk -F'|' '{printf "make %-9s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## fine-tune, measure and ask the embedded model (ARGS=--again: once more from the start)
	$(BIN)/qlora demo $(ARGS)

test: $(VENV)/.installed ## the notebooks match the package, each one's tests pass, then tests/ (no network, no GPU)
	$(TEST_ENV) $(BIN)/python .ci/prepare.py --check
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2 --do_print
	$(TEST_ENV) $(BIN)/python -m pytest tests -q -n 2 --dist loadfile -m "not slow and not gpu"

test-full: $(VENV)/.installed ## the same with everything marked slow, and gpu where there is one
	$(TEST_ENV) $(BIN)/python .ci/prepare.py --check
	$(TEST_ENV) $(BIN)/nbdev_test --n_workers 2 --do_print --flags "slow $(GPU)"
	$(TEST_ENV) $(BIN)/python -m pytest tests -q -n 2 --dist loadfile -m "$(if $(GPU),slow or not slow,not gpu)"

docs: $(VENV)/.installed ## the docs site, into _docs/
	$(TEST_ENV) $(BIN)/python .ci/docs.py site

lab: $(VENV)/.installed ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs

prepare: $(VENV)/.installed ## after editing a notebook: export, clean, README.md, copies
	$(TEST_ENV) $(BIN)/python .ci/prepare.py

install: $(VENV)/.installed ## .venv with exactly the tested versions

$(VENV)/.installed: requirements.txt setup.py settings.ini
	@$(PYTHON) .ci/install.py

clean: ## remove build outputs and caches; runs/ and .venv stay
	rm -rf _proc _docs build dist *.egg-info nbs/sidebar.yml nbs/.last_checked .pytest_cache
	find . -name .venv -prune -o -name runs -prune -o -name .git -prune \
		-o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
