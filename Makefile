# `make demo` and `make test` set everything up themselves and are quick the second time.
# Variables: PYTHON=python3.12 (only to create .venv), WORKERS=4, ARGS="-k pattern" (for pytest) or "--epochs 5" (for demo),
# WIDTHS="8 8-pairs" (for widths: float32 lanes of a vector, with or without pairs of bfloat16 numbers)

VENV    := .venv
PY      := $(VENV)/bin/python
WORKERS ?= 2
ARGS    ?=
BUDGET  ?= 15
TORCHES ?= 2.6.0 2.14.1
WIDTHS  ?= 4-pairs 8 16-pairs
PYTHON  ?=
KERNEL_TESTS = tests/kernels tests/compiler tests/bench/test_bench_timing.py
PYTEST   = OMP_NUM_THREADS=1 $(PY) -m pytest -q

export PYTHON
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test fast check lint types widths long arm slow kills workers fuzz gpu wheel site matrix format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/stamp-run ## train the embedded digits dense and with ClickTrain, compare, write a report (about 1 minute)
	$(PY) -m clicktrain demo $(ARGS)

test: $(VENV)/stamp-test ## every test but the slow and the GPU ones
	$(PYTEST) -n $(WORKERS) --dist worksteal $(ARGS)

fast: $(VENV)/stamp-test ## the quickest tests of one package, under 30 s: make fast PKG=methods
	@test -d clicktrain/$(PKG) -a -n "$(PKG)" || { echo "make fast PKG=...: one of" $$(cd clicktrain && ls -d */ | tr -d /); exit 2; }
	$(PYTEST) -n $(WORKERS) --dist worksteal --budget $(BUDGET) $(ARGS) tests/test_layers.py \
	    $(wildcard tests/$(PKG:commands=cli)) $$(grep -rlE '(from|import) clicktrain\.$(PKG)\b' tests --include='test_*.py')

check: lint types test ## what CI runs: lint, types, tests

lint: $(VENV)/stamp-test ## formatting and ruff
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: $(VENV)/stamp-test ## mypy, strict, on the package
	$(PY) -m mypy

widths: $(VENV)/stamp-test ## the tests of generated kernels at 4, 8 and 16 float32 lanes, on any processor
	@passed=; for width in $(WIDTHS); do \
	    lanes=$${width%-pairs}; pairs=$$([ $$width = $$lanes ] && echo 0 || echo 1); \
	    echo "== kernels at $$lanes float32 lanes, CLICKTRAIN_PAIRS=$$pairs"; \
	    CLICKTRAIN_LANES=$$lanes CLICKTRAIN_PAIRS=$$pairs \
	        $(PYTEST) -n $(WORKERS) --dist worksteal $(KERNEL_TESTS) $(ARGS) || exit 1; \
	    passed="$$passed $$width"; \
	done; echo "== kernels passed at these widths:$$passed"

long: $(VENV)/stamp-test ## tests of three seconds and more, which `make check` leaves out and CI runs
	$(PYTEST) -n $(WORKERS) --dist loadscope -m long $(ARGS)

arm: $(VENV)/stamp-test ## the C export on 64-bit ARM, in an emulator, which is installed where root can
	@sh scripts/emulator.sh
	$(PYTEST) -m slow -k on_arm tests/deploy $(ARGS)

slow: $(VENV)/stamp-test ## the slow tests (killed and resumed runs, whole recipes)
	$(PYTEST) -m slow $(ARGS)

kills: $(VENV)/stamp-test ## 150 random SIGKILLs and SIGTERMs over all methods, resumed and compared (ARGS="--moments 500 --seed 2")
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/robustness/kills.py --out $${TMPDIR:-/tmp}/clicktrain-kills $(ARGS)

workers: $(VENV)/stamp-test ## 30 random SIGKILLs of workers and launchers, resumed with as many or other workers (ARGS="--moments 100 --seed 2")
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/robustness/worker_kills.py --out $${TMPDIR:-/tmp}/clicktrain-workers $(ARGS)

fuzz: $(VENV)/stamp-test ## about 1,500 wrong flags, files, data sets and loops (minutes; ARGS="--seed 1 --only data")
	OMP_NUM_THREADS=1 PYTHONPATH=. $(PY) tests/robustness/fuzz.py $(ARGS)

gpu: $(VENV)/stamp-test ## GPU tests and measurements, resumed where they stopped: wants an NVIDIA GPU and a CUDA build of torch
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu wants an NVIDIA GPU that torch can see; " \
	    f"torch {torch.__version__} sees none. For a CUDA build see https://pytorch.org/get-started")'
	$(PYTEST) -m gpu $(ARGS)
	$(PY) scripts/gpu.py

site: .venv-docs/stamp-docs ## build/site: the pages of docs/ and a reference made of docstrings; a warning is an error
	.venv-docs/bin/python -m mkdocs build --quiet --strict

matrix: ## the tests on the oldest and the newest torch, in environments under .matrix/ (gigabytes; TORCHES="2.6.0" ARGS=tests/formats)
	sh scripts/matrix.sh "$(TORCHES)" $(ARGS)

wheel: $(VENV)/stamp-run ## dist/clicktrain-*.whl, which pip installs anywhere
	rm -rf build
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

format: $(VENV)/stamp-test ## rewrite the sources as `make lint` wants them
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove .venv, caches and build products; runs/ stays
	rm -rf $(VENV) .venv-docs .matrix build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find clicktrain tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-docs/stamp-docs: requirements/docs.txt scripts/setup.sh
	@sh scripts/setup.sh docs

$(VENV)/stamp-run: requirements/run.txt pyproject.toml scripts/setup.sh
	@sh scripts/setup.sh run

$(VENV)/stamp-test: requirements/test.txt requirements/run.txt pyproject.toml scripts/setup.sh
	@sh scripts/setup.sh test
