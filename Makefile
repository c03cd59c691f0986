# Each target sets up .venv by itself, the first time and whenever the lock files change.
#   make demo          a running Bursar with sample companies     make demo ARGS="--port 9000 --reset"
#   make serve         the server                                 make serve ARGS="--workers 2"
#   make test          the tests                                  make test ARGS="tests/db -k embedded"
#   make promises      the tests of tests/promises in their full form, for hours
#   make check         ruff, mypy, import-linter and the tests
#   make reference     the pages in docs/reference, from the program itself
.DEFAULT_GOAL := help
.PHONY: help demo serve test promises lint check reference clean

RUN := .venv/installed-run
DEV := .venv/installed-dev
export PYTHON

help:
	@sed -n 's/^#   //p' Makefile

$(RUN): pyproject.toml constraints.txt tools/setup
	@tools/setup run

$(DEV): pyproject.toml constraints-dev.txt tools/setup
	@tools/setup dev

demo: $(RUN)
	@.venv/bin/bursar demo $(ARGS)

serve: $(RUN)
	@.venv/bin/bursar serve $(ARGS)

# Three on two cores: a third of the time a test waits, for a process, a disk or a clock. Where nothing compiled is kept,
# each of the many processes that tests start compiles Bursar anew.
test: $(DEV)
	@PYTHONDONTWRITEBYTECODE= .venv/bin/pytest -q -n 3 $(ARGS)

promises: $(DEV)
	@BURSAR_TEST_FULL=1 .venv/bin/pytest -rP -n 2 -o faulthandler_timeout=0 tests/promises $(ARGS)

lint: $(DEV)
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo

check: lint test

reference: $(DEV)
	@.venv/bin/python docs/generate.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
