# Every target sets up what it needs the first time, and says so; the second time there is nothing to set up.

export FREEDRAFT_CACHE ?= $(CURDIR)/.cache
export HF_HUB_OFFLINE ?= 1
PYTEST := .venv/bin/pytest
STAMP := .venv/.ready

.PHONY: help setup demo test test-all test-oldest lint bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

setup: $(STAMP) ## make .venv and convert the chat model (minutes, once)

$(STAMP): pyproject.toml requirements/setup.sh requirements/development.txt requirements/overrides.txt
	@bash requirements/setup.sh
	@touch $(STAMP)

demo: $(STAMP) ## a chat model answers three inputs, plain and with freedraft (some five minutes)
	@.venv/bin/freedraft demo

test: $(STAMP) ## all tests but the slow ones, in two processes
	@$(PYTEST) -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(STAMP) ## all tests, the slow ones too
	@$(PYTEST)

test-oldest: $(STAMP) ## the tests of generate on transformers 4.57, in an environment of its own
	@bash requirements/oldest.sh

lint: $(STAMP) ## ruff and mypy --strict
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

bench: $(STAMP) ## the benchmarks that need no model; results in bench/results
	@for name in drafting adversarial cache_lines fusion vllm_proposer; do .venv/bin/python bench/$$name.py || exit 1; done

clean: ## remove what was built; .cache with the model stays
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
