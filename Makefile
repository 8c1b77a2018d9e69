# From a fresh clone on a machine with Python 3.10-3.14 and its venv module: `make demo`.

# The first interpreter that is recent enough, and not too recent.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python3.13 python3.14; do \
	"$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
	2>/dev/null && echo "$$p" && break; done)
BIN := $(CURDIR)/.venv/bin
# The deepspeed launcher and ninja are looked up on PATH.
export PATH := $(BIN):$(PATH)

# Test processes at a time. A file's tests stay in one process, which makes its fixtures once.
WORKERS ?= 2
PYTEST = "$(BIN)/python" -m pytest -n $(WORKERS) --dist loadfile
# The same for the slow and gpu tiers, of which many tests start ranks of their own; ports and
# folders do not collide. With a GPU too small for two tests, 0: one at a time.
SLOW_WORKERS ?= 2
# What `make unit` may cost: 90 s on two cores, in CPU seconds of all test processes and their
# children. CPU seconds, since wall time would fail an innocent change on a busy machine.
UNIT_CPU_SECONDS ?= 180

.PHONY: help venv demo real unit test check lines mutations kills gpu site clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install into .venv, then SFT -> reward model -> PPO on a tiny LLaMA"
	@echo "make real    RLHF on SmolLM2-135M-Instruct, four tasks, in an hour; GPU=1: on the 1.7B"
	@echo "make check   install into .venv, then ruff, pyright, import contracts, lines and spelling"
	@echo "make unit    install into .venv, then the unit tests (the quick ones), within their budget"
	@echo "make test    install into .venv, then every test, each once"
	@echo "make lines   lines of Python per package, and what is over its limit"
	@echo "make mutations  plant known bugs of PPO one at a time; the tests must see every one"
	@echo "make kills   kill real training 50 times; nothing may be lost (minutes)"
	@echo "make gpu     every check that needs a GPU, half an hour; a dated table in benchmarks/results"
	@echo "make site    build the documentation into site/; warnings are errors"
	@echo "make venv    install into .venv only (PYTHON=python3.12 chooses the interpreter)"
	@echo "make clean   remove .venv and caches; runs/ stays"

venv: .venv/.ready

# The developers' tools on top of what runs need.
.venv/.ready: .venv/.runs
	"$(BIN)/python" -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.runs: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
		2>/dev/null || { \
		echo "chatllama needs Python 3.10 to 3.14; PYTHON='$(PYTHON)' is none of them" \
		"(python3 here: $$(python3 --version 2>&1)). Name one: make PYTHON=/path/to/python3.12." \
		"None here? \`uv python install 3.12\` or \`conda create -n py312 python=3.12\` brings one," \
		"without rights of an administrator" \
		>&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	@echo "Into .venv: several GB where torch brings CUDA (Linux), about 1 GB with its CPU build"
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	"$(BIN)/python" -m pip install "$$(grep '^torch==' constraints.txt)"
	"$(BIN)/python" -m pip install -c constraints.txt -e .
	@touch $@

demo: .venv/.runs
	"$(BIN)/chatllama" run configs/quickstart.yaml

# REAL_OPTIONS="--seeds 0 1 2 --reviews FOLDER --instructions FILE --harmless FILE": local data.
real: .venv/.runs
	"$(BIN)/python" -m pip install --quiet -c constraints.txt -e '.[gguf,real]'
	"$(BIN)/python" benchmarks/real.py $(if $(GPU),--gpu) $(REAL_OPTIONS)

unit: venv
	$(PYTEST) --durations=20 --cpu-budget=$(UNIT_CPU_SECONDS)

# Without the budget: a slow machine must not fail a right change.
test: venv
	$(PYTEST) --durations=20
	"$(BIN)/python" -m pytest -n $(SLOW_WORKERS) --dist loadfile -m "slow or gpu" --durations=20

check: venv
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/pyright"
	"$(BIN)/lint-imports"
	"$(BIN)/codespell"
	"$(BIN)/python" tests/lines.py

lines: venv
	@"$(BIN)/python" tests/lines.py

mutations: venv
	"$(BIN)/python" tests/mutations/run.py

kills: venv
	"$(BIN)/python" tests/kills/run.py

site: venv
	"$(BIN)/python" -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --quiet --strict

# GPU_OPTIONS="--model FOLDER --trl-python PYTHON" adds rows that need more than this checkout.
gpu: venv
	"$(BIN)/python" benchmarks/gpu.py $(GPU_OPTIONS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
