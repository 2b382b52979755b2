# inkdrop. A fresh machine needs Python 3.11 or newer, make and pip; everything else is installed into $(VENV).
# Overridable: make env PYTHON=python3.12 VENV=/tmp/venv PIP="/tmp/venv/bin/pip --quiet"; make test JOBS=8.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
BIN := $(VENV)/bin
PIP ?= $(BIN)/python -m pip
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
SOURCES := pyproject.toml constraints.txt

.PHONY: help env demo lint check test slow bench-toy docs reference format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1@/' | awk -F@ '{printf "  make %-10s %s\n", $$1, $$2}'

env: $(VENV)/.dev ## make the environment of a developer in .venv, from the pinned constraints

demo: $(VENV)/.runtime ## train, sample and score a model of handwritten digits; writes demo/report.html
	$(BIN)/inkdrop demo --out demo

lint: $(VENV)/.dev ## format, lint, types, floors and line budget
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/line_budget.py

check: lint ## lint and the fast tests
	$(PYTEST) -m "not slow and not app and not long"

test: $(VENV)/.dev ## the whole test suite
	$(PYTEST) -m "not slow"

slow: $(VENV)/.dev ## the tests that take minutes
	$(PYTEST) -m slow

bench-toy: $(VENV)/.runtime ## run one toy comparison again, in 2 minutes; fails if its score is outside the stated interval
	OMP_NUM_THREADS=1 $(BIN)/python bench/toy.py

docs: $(VENV)/.dev ## check the generated reference and build the site into site/
	$(BIN)/python scripts/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: $(VENV)/.dev ## write docs/reference/ again from the code
	$(BIN)/python scripts/reference.py

format: $(VENV)/.dev ## format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove everything that was made here, the environment included
	rm -rf $(VENV) build dist site demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The two stamps run again only when pyproject.toml or constraints.txt change.
$(VENV)/.runtime: $(SOURCES)
	$(call install,plot)
	@touch $@

$(VENV)/.dev: $(SOURCES)
	$(call install,dev,plot,docs)
	@touch $(VENV)/.runtime $@

comma := ,
define install
	@test -n "$(PYTHON)" && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "inkdrop needs Python 3.11 or newer, which was not found; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x "$(BIN)/python" || "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make environments (no ensurepip); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	$(PIP) install -c constraints.txt -e ".[$(1)$(if $(2),$(comma)$(2))$(if $(3),$(comma)$(3))]"
endef
