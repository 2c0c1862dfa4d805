# Needs Python 3.11 or later and make; everything else comes from the lock files. Another interpreter: make PYTHON=python3.13
ifndef PYTHON
PYTHON := $(firstword $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python; done) python3)
endif
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check fmt bench lock clean runtime development environment

help:
	@echo "make demo    set up and judge the sample projects with the simulator"
	@echo "make test    set up and run every test"
	@echo "make check   format, lint, types, import contracts and the quick tests"
	@echo "make fmt     sort imports and format"
	@echo "make bench   run the benchmarks"
	@echo "make lock    pin the newest dependencies allowed, for every platform"
	@echo "make clean   remove the virtual environment and all caches; ./data stays"

demo: runtime
	$(BIN)/llm-orchestrator run project_selection --provider simulator

# Most tests wait for something, so two processes take little more than half the time; a file stays in one of them.
test: development
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/unit tests/contract tests/architecture

fmt: development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: development
	$(BIN)/python -m benchmarks

# The files name this target in their header, and neither a path nor a package index.
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile pyproject.toml --quiet --upgrade --universal \
	--python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links
lock: development
	$(COMPILE) --group build --output-file requirements.lock
	$(COMPILE) --group dev --constraint requirements.lock --output-file requirements-dev.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find orchestrator workers providers prompts tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is what its lock says, or it is made anew. The very last step leaves a copy of the lock in it, so one that
# was interrupted half-way does not pass for a good one; nor does one of another interpreter or of a tree that was moved.
# That of developers holds the packages of the other as well and serves both.
current = cmp -s $(1) $(VENV)/$(1) && grep -qF "$(CURDIR)/$(BIN)/python" $(BIN)/pip \
	&& test "$$($(BIN)/python -V 2>/dev/null)" = "$$($(PYTHON) -V)"

runtime:
	@{ $(call current,requirements.lock); } || { $(call current,requirements-dev.lock); } \
		|| $(MAKE) --no-print-directory environment LOCK=requirements.lock

development:
	@{ $(call current,requirements-dev.lock); } \
		|| $(MAKE) --no-print-directory environment LOCK=requirements-dev.lock

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
environment:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; try make PYTHON=...")'
	@echo "Setting up $(VENV) from $(LOCK); this takes half a minute or so."
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --require-hashes --only-binary :all: -r $(LOCK)
	@$(PIP_INSTALL) --no-index --no-deps --no-build-isolation --editable .
	@cp $(LOCK) $(VENV)/$(LOCK)
