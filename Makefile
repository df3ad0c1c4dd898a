# `make` lists the commands. Each one makes the virtual environment it needs, once, and again when what it is made
# from changes. Needs: Python 3.10 or newer with venv, make, and a package index. No Hugging Face Hub.

PYTHON ?= python3
VENV ?= .venv
MINIMUM_VENV ?= .venv-minimum

# Test processes, threads of a demo, and anything to add to the command that a target runs.
JOBS ?= 2
THREADS ?= 1
ARGS ?=

BIN := $(VENV)/bin
MINIMUM_BIN := $(MINIMUM_VENV)/bin
METADATA := setup.py hf_semckd/version.py
PIP_INSTALL := -m pip --disable-pip-version-check --quiet install

# Everything said, or `accelerate launch` lists the defaults it took. --quiet: a failing script shows its own
# traceback and not the launcher's as well.
LAUNCH := accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)
# One thread for each test process: they share the cores already.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo demo-text benchmark-step benchmark-accuracy test test-slow test-distributed test-faults test-hub test-matrix test-text test-properties test-minimum quality style docs clean

help: ## Print this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) (test processes) THREADS=$(THREADS) (of a demo)'
	@echo 'ARGS="..." goes to the command, e.g. make test ARGS="-k cache -x"'

demo: $(VENV)/.demo ## Distill a small ViT on real scans of digits (scikit-learn's), with a picture of what was learned
	$(BIN)/$(LAUNCH) examples/distill_vit.py $(ARGS)

# A pretrained teacher is large enough for two threads; the digits' models are not, and only get in their own way.
demo-text: THREADS = 2
demo-text: $(VENV)/.demo ## Fetch a pretrained BERT and labeled sentences, and distill it
	$(BIN)/python scripts/fetch_text_parts.py --only minilm-l6
	$(BIN)/python scripts/fetch_text_parts.py --only movie_snippets
	$(BIN)/$(LAUNCH) examples/distill_text.py $(ARGS)

benchmark-step: $(VENV)/.demo ## Measure what a distillation step costs, against plain training and logit distillation
	$(BIN)/python scripts/benchmark_step.py --threads $(THREADS) $(ARGS)

benchmark-accuracy: $(VENV)/.demo ## Compare methods on a small protocol, in minutes (ARGS="..." for others)
	$(BIN)/python scripts/benchmark_accuracy.py $(or $(ARGS),scripts/protocols/smoke.yaml)

test: $(VENV)/.dev ## Run the tests, without the slow ones
	$(PYTEST) $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

test-slow: $(VENV)/.dev ## Run the slow tests
	$(PYTEST) $(BIN)/python -m pytest -n $(JOBS) -m "slow and not network and not matrix and not engines and not faults" $(ARGS)

test-distributed: $(VENV)/.engines ## Train on every engine in two processes, and write docs/results/engines.md
	ENGINES_PAGE=docs/results/engines.md $(PYTEST) $(BIN)/python -m pytest -n $(JOBS) -m "engines or slow" \
		tests/engines tests/training/test_distributed.py tests/training/test_sharded.py $(ARGS)

test-faults: $(VENV)/.dev ## Inject faults (kills, damage, full disks, bad rows), and write docs/results/faults.md
	FAULTS_PAGE=docs/results/faults.md $(PYTEST) $(BIN)/python -m pytest -n $(JOBS) -m faults tests/faults $(ARGS)

test-hub: $(VENV)/.dev ## Prove pushes and cards against a Hub on this machine, the slow tests included
	$(PYTEST) $(BIN)/python -m pytest -v -m "" tests/publishing tests/cli/test_push.py tests/training/test_student_trainer.py $(ARGS)

test-matrix: $(VENV)/.dev ## Run all families, heads and pairs, and write docs/support.md
	SUPPORT_TABLE=docs/support.md $(PYTEST) $(BIN)/python -m pytest -n $(JOBS) -m "matrix or not slow" tests/matrix tests/models $(ARGS)

test-text: $(VENV)/.dev ## Fetch the text parts, and run the tests that need them
	$(BIN)/python scripts/fetch_text_parts.py
	$(PYTEST) $(BIN)/python -m pytest -n $(JOBS) -m network $(ARGS)

test-properties: $(VENV)/.dev ## Try the properties of configurations and losses on 2,000 examples each
	HYPOTHESIS_PROFILE=thorough $(PYTEST) $(BIN)/python -m pytest -n $(JOBS) tests/properties $(ARGS)

test-minimum: $(MINIMUM_VENV)/.test ## Run the tests with the oldest supported libraries, in a second environment
	$(PYTEST) $(MINIMUM_BIN)/python -m pytest -n $(JOBS) $(ARGS)

quality: $(VENV)/.dev ## Check style, types and the floors of the architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

style: $(VENV)/.dev ## Repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## Build the documentation into build/docs; a warning fails
	$(BIN)/python -m sphinx -W --keep-going -q -d build/.doctrees docs build/docs
	@echo 'Open build/docs/index.html'

clean: ## Remove .venv, .venv-minimum, caches and build leftovers (data/ and outputs/ stay)
	rm -rf .venv .venv-minimum build dist *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# The environments. A stamp says what was installed; the dev stamp covers the demo's packages too.
# $(1): the environment's folder.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo 'Python 3.10 or newer is needed, $(PYTHON) is older or missing. Name another: make PYTHON=python3.11 ...' >&2; \
		exit 1; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || { \
		echo "Making $(1) with $$($(PYTHON) --version) ..."; $(PYTHON) -m venv $(1); } || { \
		echo 'The environment could not be made. On Debian and Ubuntu: apt install python3-venv, then again.' >&2; \
		exit 1; }
	@echo '*' > $(1)/.gitignore
	@touch $@
endef

$(VENV)/.made:
	$(call make_venv,$(VENV))

$(MINIMUM_VENV)/.made:
	$(call make_venv,$(MINIMUM_VENV))

$(VENV)/.demo: $(VENV)/.made $(METADATA) constraints.txt
	@echo 'Installing what the demo needs into $(VENV) (minutes the first time) ...'
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made $(METADATA) constraints.txt
	@echo 'Installing what the tests and checks need into $(VENV) (minutes the first time) ...'
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	@touch $(VENV)/.demo $@

# DeepSpeed is built against the torch that is there.
$(VENV)/.engines: $(VENV)/.dev
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e ".[engines]"
	@touch $@

$(MINIMUM_VENV)/.test: $(MINIMUM_VENV)/.made $(METADATA) constraints-minimum.txt
	@echo 'Installing the oldest supported libraries into $(MINIMUM_VENV) (minutes the first time) ...'
	@$(MINIMUM_BIN)/python $(PIP_INSTALL) -c constraints-minimum.txt -e ".[test]"
	@touch $@
