# megatron_a2d: every job as one command. `make help` lists them.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TRANSFORMERS4 := $(VENV)/transformers4
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# One thread a process: tests and demo run several processes on few cores.
TESTS := A2D_TRANSFORMERS4=$(CURDIR)/$(TRANSFORMERS4) OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# The same tests under the newest megatron-core, which needs Python 3.12.
PYTHON312 ?= $(or $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null),$(lastword $(wildcard \
  $(HOME)/.pyenv/versions/3.12.*/bin/python3.12)))
VENV312 := .venv312
PIP312 := $(VENV312)/bin/python -m pip --disable-pip-version-check --quiet
TESTS312 := A2D_TRANSFORMERS4=$(CURDIR)/$(VENV312)/transformers4 OMP_NUM_THREADS=1 $(VENV312)/bin/python -m pytest

FORMAT ?=
# A variable that a target needs and was not given.
needs = $(foreach name,$(1),$(if $($(name)),,$(error $@: give $(name)=..., see the README)))
NPROC ?=
INPUT ?=
OUT ?=
TOKENIZER ?=
HF ?=
CHECKPOINT ?=
MODEL ?=
RECIPE ?=
CLUSTER ?=
GPUS ?=
REPO ?=
DATA ?=
CONFIG ?=
ARGS ?=
NAME ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-latest test-parity test-faults test-slurm check data convert-hf train plan export \
  verify inspect publish generate evaluate study bench bench-convert gpu

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(VENV)/installed  ## .venv with pinned dependencies

# torch first: left to another package's wish, the newest one would be taken.
$(VENV)/installed: setup.py constraints/py311.txt constraints/transformers4.txt
	@echo "making $(VENV): pinned packages, a minute or a few"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint constraints/py311.txt torch
	@$(PIP) install --constraint constraints/py311.txt --editable '.[dev,plot]'
	@$(PIP) install --no-deps --upgrade --target $(TRANSFORMERS4) --requirement constraints/transformers4.txt
	@touch $@

demo: setup  ## the whole way on two CPU cores, offline, in minutes
	@$(BIN)/python -m launch.demo $(ARGS)

test: setup  ## the tests: all but the full matrices
	$(TESTS) $(ARGS)

ifeq ($(shell "$(PYTHON312)" -c 'print(1)' 2>/dev/null),1)
test-latest: $(VENV312)/installed  ## the tests under the newest megatron-core, where Python 3.12 is found
	$(TESTS312) $(ARGS)
else
test-latest:
	@echo "test-latest: there is no Python 3.12 here, nothing was tested; name one with PYTHON312=..."
endif

# torch for Python 3.12 is on the public index with CUDA alone: 5 GB.
$(VENV312)/installed: setup.py constraints/py312.txt constraints/transformers4.txt
	@echo "making $(VENV312): Python 3.12, pinned packages, a few minutes"
	@"$(PYTHON312)" -m venv $(VENV312)
	@$(PIP312) install --constraint constraints/py312.txt torch
	@$(PIP312) install --constraint constraints/py312.txt --editable '.[dev,plot]'
	@$(PIP312) install --no-deps --upgrade --target $(VENV312)/transformers4 --requirement constraints/transformers4.txt
	@touch $@

test-parity: setup  ## every layout against one process, in fp32 and bf16, resumed and resharded; writes docs/exactness.md
	$(TESTS) tests/parity -m "" --exactness docs/exactness.md $(ARGS)

test-faults: setup  ## kill, damage, fill, poison; prints what was lost and writes it to docs/exactness.md
	$(TESTS) tests/faults -m "" --exactness docs/exactness.md $(ARGS)

test-slurm: setup  ## a real Slurm of two nodes on this machine; A2D_INSTALL_SLURM=1 installs it (Debian, root)
	$(TESTS) tests/slurm -m "" $(ARGS)

check: setup  ## linters, formatter, types
	$(BIN)/ruff check .
	$(BIN)/shellcheck launch/train.sh launch/train.sbatch launch/node.sh .ci/run
	$(BIN)/ruff format --check .
	$(BIN)/mypy

data: setup  ## tokenise INPUT with TOKENIZER to OUT.bin/.idx
	$(call needs,INPUT TOKENIZER OUT)
	$(BIN)/python -m data_prep.tokenize_corpus --input $(INPUT) --tokenizer $(TOKENIZER) --output-prefix $(OUT) $(ARGS)

convert-hf: setup  ## HF (directory or hub id) -> checkpoint OUT
	$(call needs,HF OUT)
	$(BIN)/python -m checkpoints_tools.convert_hf --hf $(HF) --out $(OUT) $(ARGS)

train: setup  ## RECIPE on NPROC processes of this machine
	$(call needs,RECIPE)
	NPROC=$(NPROC) launch/train.sh --config $(RECIPE) $(ARGS)

plan: setup  ## RECIPE on GPUS of CLUSTER (h100, h200, b200, ...): the best layouts, their memory, time and cost
	$(call needs,RECIPE CLUSTER GPUS)
	@$(BIN)/python -m megatron_a2d.plan --config $(RECIPE) --cluster $(CLUSTER) --gpus $(GPUS) $(ARGS)

export: setup  ## CHECKPOINT -> Hugging Face directory OUT in FORMAT (rnd1, a2d, qwen3)
	$(call needs,CHECKPOINT OUT)
	$(BIN)/python -m checkpoints_tools.export_hf --checkpoint $(CHECKPOINT) --out $(OUT) $(if $(FORMAT),--format $(FORMAT)) $(ARGS)

verify: setup  ## compare the tensors of HF and CHECKPOINT
	$(call needs,HF CHECKPOINT)
	$(BIN)/python -m checkpoints_tools.verify --hf $(HF) --checkpoint $(CHECKPOINT) $(ARGS)

inspect: setup  ## what CHECKPOINT holds: sizes, norms by role, iteration, tokens, recipe
	$(call needs,CHECKPOINT)
	@$(BIN)/python -m checkpoints_tools.inspect --checkpoint $(CHECKPOINT) $(ARGS)

publish: setup  ## push the export MODEL to the hub as REPO (ARGS=--dry-run shows what would go)
	$(call needs,MODEL REPO)
	$(BIN)/python -m checkpoints_tools.publish --export $(MODEL) --repo $(REPO) $(ARGS)

evaluate: setup  ## MODEL on held-out text (DATA) and tasks (CONFIG, such as launch/eval/local.yaml), to OUT
	$(call needs,MODEL OUT)
	@$(BIN)/python -m megatron_a2d.evaluate --model $(MODEL) --out $(OUT) $(if $(DATA),--valid-data-path $(DATA)) \
	  $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

export PROMPT PREFIX SUFFIX
generate: setup  ## text from the exported MODEL: PROMPT='...', or PREFIX='...' SUFFIX='...'
	$(call needs,MODEL)
	@$(BIN)/python -m megatron_a2d.generate --model $(MODEL) $(if $(PROMPT),--prompt "$$PROMPT") \
	  $(if $(PREFIX),--prefix "$$PREFIX" --suffix "$$SUFFIX") $(ARGS)

study: setup  ## the study NAME on a small model, offline; its runs, table, plots and page in OUT/NAME
	$(call needs,NAME OUT)
	$(BIN)/python -m launch.study_base --out $(OUT)/base
	OMP_NUM_THREADS=1 $(BIN)/python -m megatron_a2d.study $(NAME) --out $(OUT)/$(NAME) \
	  --config launch/recipes/study_laptop.yaml --load $(OUT)/base/ar \
	  --train-data-path $(OUT)/base/corpus_train --valid-data-path $(OUT)/base/corpus_valid $(ARGS)

bench: setup  ## the benchmarks, as tables
	$(BIN)/python -m bench.train_step --out bench/results/train_step_cpu.json
	$(BIN)/python -m bench.masked_head --out bench/results/masked_head_cpu.json
	$(BIN)/python -m bench.tokenize --out bench/results/tokenize_cpu.json
	$(BIN)/python -m bench.mixing --out bench/results/mixing_cpu.json
	$(BIN)/python -m bench.loader --out bench/results/loader_cpu.json
	$(BIN)/python -m bench.sampling --out bench/results/sampling_cpu.json
	$(BIN)/python -m bench.likelihood --out bench/results/likelihood_cpu.json
	$(BIN)/python -m bench.monitoring --out bench/results/monitoring_cpu.json

# On a GPU machine the environment is the machine's own: BIN names the folder of its python.
GPU_OUT ?= bench/results/gpu.json
gpu:  ## tests/gpu and the benchmarks on one GPU, ten minutes, one result file (BIN=/usr/bin for the system's python)
	$(BIN)/python3 -m bench.gpu --out $(GPU_OUT) $(ARGS)

bench-convert: setup  ## conversion against cp on a checkpoint of 8.7 GB: time and memory; takes 18 GB of disk
	$(BIN)/python -m bench.convert --out bench/results/convert_cpu.json $(ARGS)
