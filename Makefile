# `make demo`: from nothing to recommendations. `make test`: everything that CI checks. Both install what they need into $(VENV).
#   make demo SIZE=medium                       a larger built-in world
#   make demo KIND=movielens DATA=ml-latest-small.zip
#   make demo EXTRA=gpu VENV=.venv-gpu          faiss-gpu and faiss-cpu must not share an environment

VENV ?= .venv
PYTHON ?= python3.11
EXTRA ?= cpu
SIZE ?= small
KIND ?=
DATA ?=
PEERS ?=
PEER_PYTHON ?=
WORKSPACE ?= $(if $(KIND),workspaces/$(KIND),workspace)

BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
TO_RUN := $(VENV)/.installed-$(EXTRA)
TO_TEST := $(VENV)/.installed-$(EXTRA)-dev
ALL_TESTS := --numprocesses 2 --dist loadfile

.PHONY: demo test coverage lint accept accept-features accept-registry accept-retrieval bench bench-features bench-retrieval bench-quality clean

demo: $(TO_RUN)
	$(BIN)/tandem --workspace "$(WORKSPACE)" demo $(if $(KIND),--kind $(KIND),--size $(SIZE)) $(if $(DATA),--data "$(DATA)")

test: lint
	$(BIN)/pytest $(ALL_TESTS)

coverage: lint  # the same tests, a third slower
	$(BIN)/pytest $(ALL_TESTS) --cov --cov-report=term

lint: $(TO_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

accept: $(TO_TEST)
	$(BIN)/python tests/benchmarks/accept.py

accept-features: $(TO_TEST)  # each real data set: built, checked, and refused when it leaks; killed, and told when busy
	$(BIN)/python tests/benchmarks/accept_features.py

accept-retrieval: $(TO_TEST)  # a million items, built, searched and changed at once: ten minutes, 4 GiB
	$(BIN)/python -P tests/benchmarks/accept_retrieval.py

accept-registry: $(TO_TEST)  # RankLens through the registry: SQLite, and PostgreSQL with a running mlflow server
	$(BIN)/python tests/benchmarks/accept_registry.py

bench: $(TO_TEST)
	$(BIN)/python tests/benchmarks/run.py

bench-features: $(TO_TEST)  # with PEERS=folder, where "ibis-framework[duckdb]" was installed by `pip install --target`
	PYTHONPATH="$(PEERS)" $(BIN)/python tests/benchmarks/features.py

bench-retrieval: $(TO_TEST)  # with PEERS=folder, where hnswlib and usearch were installed by `pip install --target`
	PYTHONPATH="$(PEERS)" $(BIN)/python -P tests/benchmarks/retrieval.py

bench-quality: $(TO_TEST)  # with PEER_PYTHON=.../bin/python of an environment with rectools[torch], implicit, polars, sentence-transformers
	$(BIN)/python tests/benchmarks/quality $(if $(PEER_PYTHON),--peers "$(PEER_PYTHON)")

clean:  # workspaces stay: they hold data
	rm -rf $(VENV) build dist *.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TO_RUN): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, once"
	$(INSTALL) --editable ".[$(EXTRA)]"
	@touch $@

$(TO_TEST): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes, once"
	$(INSTALL) --editable ".[$(EXTRA),dev]"
	@touch $(TO_RUN) $@
