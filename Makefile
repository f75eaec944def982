# Each target sets up what it needs from a fresh clone; Python 3.11 or newer and pip are enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready
RESULTS := tests/benchmarks/results
DATA ?= ../shared/data
GOLDEN ?= ../shared/golden
PIP := -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check golden bench peers notebooks preview pins clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

setup: $(READY) ## make .venv with the pinned packages

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) install -c constraints.txt -e '.[dev,tensorboard]'
	touch $@

demo: $(READY) ## make phantoms, plan, train, predict, evaluate: demo/report.html
	$(BIN)/medseg demo -o demo

test: $(READY) ## the default tests, under ten minutes on two cores
	$(BIN)/python -m pytest -m 'not slow' -rs

test-all: $(READY) ## every test, the slow ones too
	$(BIN)/python -m pytest -rs

check: $(READY) ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

golden: $(READY) ## only the comparisons with outputs of other programs, kept in ../shared/golden
	$(BIN)/python -m pytest -m golden -rs

bench: $(READY) $(PEERS_READY) ## the measurements of the README, side by side with the peers; QUICK=1 only tries them
	@set -e; for script in tests/benchmarks/goldens.py tests/benchmarks/*_vs_*.py; do \
		name=$$(basename $$script .py); echo "== $$name"; \
		case $$name in goldens) given="--golden $(GOLDEN)";; *) given="--peers $(PEERS)/bin/python --data $(DATA)";; esac; \
		if [ -n "$(QUICK)" ]; then given="$$given --quick"; else given="$$given --out $(RESULTS)/$$name.json"; fi; \
		$(BIN)/python $$script $$given; \
	done
	@[ -n "$(QUICK)" ] || $(BIN)/python tests/benchmarks/table.py --write

peers: $(PEERS_READY) ## make .venv-peers with the programs that we compare with, never a dependency

# nnunetv2 imports every trainer folder when it looks for a trainer by name; `primus` needs timm and so
# torchvision, which does not import beside the CPU build of torch. Nothing we compare with is in it.
$(PEERS_READY):
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) install torch==2.13.0 nnunetv2==2.8.1 MedPy==0.5.2 surface-distance==0.1
	primus=$$($(PEERS)/bin/python -c 'import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec("nnunetv2").origin).parent / "training/nnUNetTrainer/primus")'); \
	if [ -d "$$primus" ]; then mkdir -p $(PEERS)/moved-aside && mv "$$primus" $(PEERS)/moved-aside/; fi
	touch $@

notebooks: $(READY) ## run the notebooks
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=900 notebooks

preview: $(READY) ## draw the picture of the README
	$(BIN)/python datasets/phantom/preview.py datasets/phantom/preview.png

pins: ## write constraints.txt anew from an empty environment
	rm -rf .venv-pins && $(PYTHON) -m venv .venv-pins
	.venv-pins/bin/python $(PIP) install torch==2.13.0 -e '.[dev,tensorboard]'
	@sed -n '/^#/p' constraints.txt > .venv-pins/constraints.txt && echo 'torch==2.13.0' >> .venv-pins/constraints.txt
	.venv-pins/bin/python -m pip freeze --exclude-editable | grep -v '^torch==' >> .venv-pins/constraints.txt
	@grep -E '^(cellpose|stardist|tensorflow)==' constraints.txt >> .venv-pins/constraints.txt # extras, not in it
	mv .venv-pins/constraints.txt constraints.txt && rm -rf .venv-pins

clean: ## remove what the targets made; environments too
	rm -rf .venv .venv-peers .venv-pins demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
