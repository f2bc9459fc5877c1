# Every target makes its own environment: `make test` on a fresh clone needs python 3.11 or newer, git and make.
# The pinned environment is .venv; a change of requirements.lock or pyproject.toml renews it.

SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
READY := .venv/ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pt_jax kernels experiments launch tests

.PHONY: quickstart test test-slow lint format bench setup clean

quickstart: $(READY)  ## SFT cold start, GRPO, held-out evaluation, report: at most 15 minutes on 2 cores
	$(BIN)/python -m launch.local experiments.quickstart

test: $(READY)  ## every test that is not slow, the 8-device ones in processes of their own
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyrefly check

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(READY)
	$(BIN)/python -m launch.bench
	$(BIN)/python -m launch.bench_engine

setup: $(READY)

# The lock names every package, so pip resolves nothing. pycosat, a solver that one family of
# reasoning_gym needs (zebra_puzzles), is published as C source only: without a compiler a module
# that says so takes its place, and everything else works.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: expected python 3.11 or newer on PATH, found none"; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(PIP) --no-deps --requirement requirements.lock
	$(PIP) --no-deps pycosat==0.6.6 2>/dev/null || $(BIN)/python -c "$$NO_PYCOSAT"
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

define NO_PYCOSAT
import pathlib, sysconfig
path = pathlib.Path(sysconfig.get_path("purelib"), "pycosat.py")
text = "pycosat could not be compiled when this environment was made: install a C compiler"
path.write_text(f"def itersolve(*clauses, **options):\n  raise ModuleNotFoundError({text!r})\n")
print(f"note: {text} (only reasoning_gym's zebra_puzzles needs it)")
endef
export NO_PYCOSAT

clean:  ## removes the environment and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info build
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
