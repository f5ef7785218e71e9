VENV := .venv
VENV_LOWEST := .venv-lowest
VENV_WHEEL := .venv-wheel
VENV_RAY_METRICS := .venv-ray-metrics

# python3.11, or else any python3 that is new enough.
PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$python" && break; done)

BIN := $(VENV)/bin
# Most tests wait for Ray, most of the time: two processes at once, each with a cluster of its own.
PARALLEL := --numprocesses=2 --dist=worksteal
# Arguments for the command of a target, such as ARGS='-k barrier -x'.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-observed test test-unit test-deep test-lowest test-ray-metrics dist \
	check format bench bench-quick simulate chaos soak clean docs

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## Create .venv with everything for development

demo: venv ## Run the demo
	$(BIN)/python -m asyncsplit demo $(ARGS)

demo-observed: venv ## Run the demo, and ask a Prometheus what training waited for
	$(BIN)/python -m asyncsplit demo --observed $(ARGS)

# Ray starts hundreds of processes in a run, each of which would compile asyncsplit anew.
test test-deep test-lowest: export PYTHONDONTWRITEBYTECODE :=
test: venv ## Run every test but the deep ones
	$(BIN)/python -m pytest -m 'not deep' $(PARALLEL) $(ARGS)

test-deep: export HYPOTHESIS_PROFILE ?= deep
test-deep: venv ## Run 2000 examples of each property, with coverage, and the long tests of whole jobs
	$(BIN)/python -m pytest tests/unit tests/simulation $(PARALLEL) --cov --cov-report=term $(ARGS)
	$(BIN)/python -m pytest -m deep $(PARALLEL) $(ARGS)

test-unit: venv ## Run the tests that need no Ray cluster
	$(BIN)/python -m pytest tests/unit $(ARGS)

# The examples, the documentation, the demo and jobs of Ray Train are for the newest.
test-lowest: $(VENV_LOWEST)/.installed ## Run the tests on the lowest supported versions, of Ray too
	$(VENV_LOWEST)/bin/python -m pytest tests/unit tests/integration $(PARALLEL) \
		--ignore=tests/integration/test_examples.py --ignore=tests/integration/test_docs.py \
		--ignore=tests/integration/test_train.py --ignore=tests/integration/test_demo.py $(ARGS)

# Not in .venv: with ray[default] each start of a Ray takes twice as long.
test-ray-metrics: $(VENV_RAY_METRICS)/.installed ## Run the test of metrics among Ray's own, which need ray[default]
	$(VENV_RAY_METRICS)/bin/python -m pytest tests/telemetry/test_ray_metrics.py $(ARGS)

dist: venv ## Build wheel and sdist, and try the wheel in an environment of its own
	rm -rf dist $(VENV_WHEEL)
	$(BIN)/python -m build --outdir dist
	"$(PYTHON)" -m venv $(VENV_WHEEL)
	$(VENV_WHEEL)/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	$(VENV_WHEEL)/bin/python -m pip check
	cd dist && ../$(VENV_WHEEL)/bin/python -m asyncsplit --version

check: venv ## Lint, check the format and the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: export NO_MKDOCS_2_WARNING := 1
docs: venv ## Build the documentation's site in build/site; a broken link is an error
	$(BIN)/mkdocs build --strict

format: venv ## Format, and fix what the linter can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: venv ## Run every benchmark: half an hour
	$(BIN)/python -m benchmarks $(ARGS)

bench-quick: venv ## Run every benchmark with less data: 3 minutes
	$(BIN)/python -m benchmarks --quick $(ARGS)

simulate: venv ## Run 5000 simulated jobs: 2 minutes
	$(BIN)/python -m tests.simulation --seeds 5000 $(ARGS)

chaos: venv ## Kill 200 consumers, workers and coordinators of a real job: 15 minutes
	$(BIN)/python -m tests.chaos --kills 200 $(ARGS)

soak: venv ## Run 1000 epochs of a real job and see what grows: 15 minutes
	$(BIN)/python -m tests.soak --epochs 1000 $(ARGS)

clean: ## Remove everything that was generated, the virtual environments too
	rm -rf $(VENV) $(VENV_LOWEST) $(VENV_WHEEL) $(VENV_RAY_METRICS) $(VENV_LOWEST).txt build dist .coverage* .hypothesis .*_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: PACKAGES = --editable '.[dev,demo,bench,docs]'
$(VENV_RAY_METRICS)/.installed: PACKAGES = --editable '.[dev]' 'ray[default]'
$(VENV_LOWEST)/.installed: PACKAGES = --editable '.[dev,demo]' --constraint $(VENV_LOWEST).txt
$(VENV_LOWEST)/.installed: $(VENV_LOWEST).txt
$(VENV)/.installed $(VENV_LOWEST)/.installed $(VENV_RAY_METRICS)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { \
		echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Installing into $(@D), which takes some minutes"
	"$(PYTHON)" -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PACKAGES)
	@touch $@

# What is declared is at its lowest version, what only Ray and others need at its highest.
$(VENV_LOWEST).txt: $(VENV)/.installed
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --python $(BIN)/python \
		--extra jax --extra otel --extra top --output-file $@ pyproject.toml
