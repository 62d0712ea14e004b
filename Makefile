# `make demo` runs the main job on a small scale, `make test` passes every check. Both install what they need first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install install-cpu demo test lint unit attack attacks audit integration browser e2e e2e-all docs bench-rewards bench-data bench-curriculum \
	bench-evaluate bench-report study lock clean

STACK ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV ?= .venv
# The demo and the tests run on the CPU stack, which cannot share an environment with the GPU stack.
CPU_VENV ?= $(if $(filter gpu,$(STACK)),.venv-cpu,$(VENV))
CPU_BIN := $(CPU_VENV)/bin
UV := uv==0.13.9
# Python 3.11 is what everything was run with; 3.10 and 3.12 are allowed too.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.10 python3 python; do \
	$$candidate -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' \
	>/dev/null 2>&1 && echo $$candidate && break; done)
# Of the report's tests; Debian: apt-get install chromium.
CHROMIUM ?= $(shell for candidate in chromium chromium-browser google-chrome google-chrome-stable; do \
	command -v $$candidate && break; done)
# Only these are imported for their examples: the others need torch and verl, which take long to import.
WITH_EXAMPLES = $(shell grep -rl --include='*.py' --include='*.md' '>>> ' ffr_verl docs)
NO_BROWSER = NOTE: the browser tests were not run, since there is no Chromium (Debian: apt-get install chromium; or make CHROMIUM=/path/to/it)
DEMO ?= demo
ARGS ?=

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

define install_stack
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.10, 3.11 or 3.12 with venv found; install one (Debian: apt-get install python3.11-venv), or name it: make PYTHON=/path/to/python" >&2; exit 2; fi
	@if [ -e $(1) ] && ! $(1)/bin/python -c 'pass' >/dev/null 2>&1; then rm -rf $(1); fi
	[ -x $(1)/bin/uv ] || { $(PYTHON) -m venv $(1) && $(1)/bin/python -m pip install --quiet --disable-pip-version-check $(UV); }
	$(1)/bin/uv pip install --python $(1)/bin/python --no-deps --compile-bytecode -r requirements/$(2).txt
	$(1)/bin/uv pip install --python $(1)/bin/python --no-deps --quiet -e .
	@touch $@
endef

install: $(VENV)/.$(STACK)-stack  ## the pinned stack for this machine (STACK=gpu|cpu to choose) in .venv

install-cpu: $(CPU_VENV)/.cpu-stack

$(CPU_VENV)/.cpu-stack: requirements/cpu.txt pyproject.toml
	$(call install_stack,$(CPU_VENV),cpu)

$(VENV)/.gpu-stack: requirements/gpu.txt pyproject.toml
	$(call install_stack,$(VENV),gpu)

demo: install  ## both training stages with a tiny model, on a GPU where there is one (STACK=cpu, QUICK=1, ARGS=--restart)
	$(VENV)/bin/ffr-verl demo --output $(DEMO) $(if $(QUICK),--quick) $(ARGS)

test: lint unit attacks integration browser e2e  ## linters, type checker, doctests, unit, attack, integration, browser and end-to-end tests
	@echo "$(if $(CHROMIUM),all checks passed,all other checks passed. $(NO_BROWSER))"

lint: install-cpu  ## ruff and mypy
	$(CPU_BIN)/ruff check .
	$(CPU_BIN)/ruff format --check .
	$(CPU_BIN)/mypy

unit: install-cpu  ## unit tests and doctests (a minute on two cores)
	$(CPU_BIN)/pytest -q -n logical tests/unit $(WITH_EXAMPLES) --doctest-modules --doctest-glob='docs/*.md' $(ARGS)

attacks: install-cpu  ## attacks and faults, few of a kind (a minute or two)
	$(CPU_BIN)/pytest -q -n logical tests/attack $(ARGS)

attack: install-cpu  ## the same, many of a kind: FFR_ATTACKS=2000 or more, FFR_ATTACK_SEED=N for others; and GRPO killed 20 times
	FFR_ATTACKS=$${FFR_ATTACKS:-2000} $(CPU_BIN)/pytest -q -n logical tests/attack $(ARGS)
	FFR_ATTACKS=$${FFR_ATTACKS:-2000} $(CPU_BIN)/pytest -q tests/e2e/test_resume.py -k killed $(ARGS)

audit: install-cpu  ## known vulnerabilities of the locked packages, where PyPI can be asked
	$(CPU_BIN)/python tools/audit.py requirements/cpu.txt requirements/gpu.txt

integration: install-cpu $(CPU_VENV)/adapters $(CPU_VENV)/deploy  ## the contract with verl, recipes through Hydra, other trainers' reward code, installs
	FFR_ADAPTERS_PATH=$(abspath $(CPU_VENV)/adapters) FFR_DEPLOY_PATH=$(abspath $(CPU_VENV)/deploy) $(CPU_BIN)/pytest -q tests/integration $(ARGS)

browser: install-cpu  ## the report in headless Chromium, where one is found
	@$(if $(CHROMIUM),,echo "$(NO_BROWSER)")
	FFR_CHROMIUM="$(CHROMIUM)" $(CPU_BIN)/pytest -q tests/browser $(ARGS)

# Other trainers and tools, each in a folder of its own: beside verl, or each other, they would break it.
$(CPU_VENV)/trl $(CPU_VENV)/swift $(CPU_VENV)/adapters $(CPU_VENV)/deploy: $(CPU_VENV)/%: requirements/%.txt | install-cpu
	rm -rf $@
	$(CPU_BIN)/uv pip install --quiet --python $(CPU_BIN)/python --no-deps --target $@ -r $<

e2e: install-cpu $(CPU_VENV)/trl $(CPU_VENV)/swift  ## real SFT and real GRPO on the CPU, through verl, TRL and ms-swift
	FFR_TRL_PATH=$(abspath $(CPU_VENV)/trl) FFR_SWIFT_PATH=$(abspath $(CPU_VENV)/swift) $(CPU_BIN)/pytest -q --durations=12 tests/e2e $(ARGS)

.venv-docs/.docs: requirements/docs.txt
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.10, 3.11 or 3.12 with venv found; name it: make PYTHON=/path/to/python" >&2; exit 2; fi
	rm -rf .venv-docs && $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	.venv-docs/bin/uv pip install --quiet --python .venv-docs/bin/python --no-deps -r $<
	@touch $@

docs: .venv-docs/.docs  ## the pages with an API reference, in site/; a warning or a dead link is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict  # --quiet would switch --strict off
	@echo "site/index.html"

e2e-all: export FFR_E2E_ALL=1
e2e-all: e2e  ## the same, with each model family and each death (`make test` runs one of each, by the commit's hash)

bench-rewards: install-cpu  ## what the rewards cost, as ratios of one run
	$(CPU_BIN)/python -m benchmarks.rewards $(ARGS)

bench-data: install-cpu  ## rows a second and memory of `ffr-verl prepare` against a plain datasets map
	$(CPU_BIN)/python -m benchmarks.data $(ARGS)

bench-curriculum: install-cpu  ## a curriculum over a million rows, and a whole GRPO step against verl's own parts
	$(CPU_BIN)/python -m benchmarks.curriculum
	$(CPU_BIN)/python -m benchmarks.grpo_step $(ARGS)

study: install-cpu  ## does GRPO improve the SFT model, and in which order? For hours; ARGS="--seeds 0" for less
	$(CPU_BIN)/python -m benchmarks.study $(ARGS)

bench-evaluate: install-cpu  ## evaluation of 20,000 predictions against plain json and sets
	$(CPU_BIN)/python -m benchmarks.evaluate $(ARGS)

bench-report: install-cpu  ## opening and filtering a report of 2,000 rows in Chromium
	FFR_CHROMIUM="$(CHROMIUM)" $(CPU_BIN)/python -m benchmarks.report $(ARGS)

lock: install-cpu  ## resolve requirements/*.txt again
	$(CPU_BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header --upgrade \
		pyproject.toml requirements/cpu.in --extra dev --extra embed --extra endpoint --overrides requirements/overrides.txt -o requirements/cpu.txt
	$(CPU_BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header --upgrade \
		pyproject.toml --extra gpu --extra dev --extra embed --extra endpoint -o requirements/gpu.txt
	$(CPU_BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-annotate --no-header --upgrade \
		requirements/docs.in -o requirements/docs.txt

clean:  ## remove environments, demo and caches
	rm -rf .venv .venv-cpu .venv-docs demo outputs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache
