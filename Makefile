# megatron_a2d: every job as one command. `make help` lists them.

# Python: a virtual environment that is built here (VENV, .venv by default). With VENV=none (the python3 of PATH) or
# BIN=DIR (the directory of another Python) an existing one is used and nothing is built; in NVIDIA's container, whose
# Python has torch and Transformer Engine, VENV=none is the default.
VENV ?= $(if $(NVIDIA_PYTORCH_VERSION),none,.venv)
ifeq ($(VENV)$(origin BIN),noneundefined)
  BIN := $(shell python3 -c 'import os, sys; print(os.path.dirname(sys.executable))')
endif
MADE := $(if $(filter undefined,$(origin BIN)),$(VENV))# the environment that is built here, if one is
BIN ?= $(VENV)/bin
PY := $(firstword $(wildcard $(BIN)/python3 $(BIN)/python) $(BIN)/python3)
# Packages are installed without bytecode: Python compiles a module at its first import and caches the result. If this
# variable forbade the cache, as in many images, every start would take seconds to compile torch again.
unexport PYTHONDONTWRITEBYTECODE
# One thread per process: tests and demo run several processes on few cores.
tests_of = OMP_NUM_THREADS=1 $(if $(MADE),A2D_TRANSFORMERS4=$(CURDIR)/$(1)/transformers4 \
  A2D_TRANSFORMER_ENGINE=$(CURDIR)/$(1)/transformer_engine) $(2) -m pytest
TESTS := $(call tests_of,$(VENV),$(PY))
# Two processes if the environment has pytest-xdist (ARGS=-n0: one). The tests of a file share a pool of ranks, so they
# run in the same process.
in_two = $(if $(wildcard $(1)/lib/python3*/site-packages/xdist),--numprocesses 2 --dist loadfile --no-loadscope-reorder)

# The Python to build the environment with: that of an existing environment, else the first of these names that runs
# 3.11 or later. Every name is tried, because pyenv's can exist without a Python behind them. The newest megatron-core
# needs 3.12.
find_python = $(firstword $(foreach name,$(wildcard $(VENV)/bin/python3) python3.11 python3.12 python3.13 python3.14 \
  python3 python $(wildcard $(HOME)/.pyenv/versions/3.1[1-9].*/bin/python3),$(shell "$(name)" -c \
  'import sys; sys.version_info >= (3, $(1)) and print("$(name)")' 2>/dev/null)))
PYTHON ?= $(or $(call find_python,11),$(error no Python 3.11 or later is found; name one with PYTHON=...))
PYTHON312 ?= $(call find_python,12)
LATEST := $(if $(wildcard $(VENV)/lib/python3.1[2-9]),$(VENV),.venv312)
# The newest megatron-core, emerging-optimizers and Transformer Engine, put before the packages of a Python 3.11
# environment on PYTHONPATH: megatron-core's wheel runs on 3.11, only its metadata requires 3.12 (emerging-optimizers:
# tests/fixtures/newest). Environments of later Pythons contain them already.
NEWEST := $(if $(MADE),$(if $(filter-out $(VENV),$(LATEST)),$(VENV)/newest))
TESTS_NEWEST := PYTHONPATH=$(CURDIR)/$(NEWEST)/megatron_core:$(CURDIR)/tests/fixtures/newest$${PYTHONPATH:+:$$PYTHONPATH} \
  $(subst $(VENV)/transformer_engine,$(NEWEST)/transformer_engine,$(TESTS))

FORMAT ?=
# $(call needs,NAMES): an error if a variable that the target requires is not set.
needs = $(foreach name,$(1),$(if $($(name)),,$(error $@: give $(name)=..., see the README)))
NPROC ?=
INPUT ?=
OUT ?=
TOKENIZER ?=
HF_MODEL ?= $(HF)
ifeq ($(origin HF),command line)
  $(warning HF= is now HF_MODEL=; the next version will not know the old name)
endif
CHECKPOINT ?=
MEGATRON ?=
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
.PHONY: help install setup demo test test-integration test-latest test-latest-cpu test-engines test-parity test-te test-rehearsal test-faults test-slurm test-mutants soak fuzz \
  check data convert-hf convert-megatron train plan export verify inspect publish generate evaluate study bench bench-report gpu

help:  ## list of targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

ifneq ($(MADE),)
install: $(VENV)/installed_core  ## .venv with pinned dependencies, built with any Python from 3.11 on (PYTHON=... selects one)
setup: $(VENV)/installed  ## the same, with the packages of tests, linters and evaluation
else
install setup:
	@$(PY) -c "$$LACKING" $(PY)
endif

# Checks an existing Python for the packages that ours need, without importing them, because torch takes seconds.
define LACKING
import importlib.util, sys
print(f"using {sys.executable}, and building nothing", file=sys.stderr)
lacks = [name for name in ("torch", "megatron", "transformers", "yaml", "rich") if not importlib.util.find_spec(name)]
if sys.version_info < (3, 11):
    sys.exit(f"error: {sys.argv[1]}: is Python {sys.version.split()[0]}; name the folder of 3.11 or later with BIN=...")
if lacks:
    sys.exit(f"error: {sys.argv[1]}: has no {', '.join(lacks)}; {sys.argv[1]} -m pip install --editable . adds them")
endef
export LACKING

# Build the environment $(2) with the Python $(1) and the pinned packages for its version. torch is installed first,
# because pip would take the newest one as a dependency of another package. No bytecode is compiled: Python imports, and
# compiles, about a tenth of the modules.
define install_core
@"$(1)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: PYTHON=$(1): is Python %d.%d; 3.11 or \
later is needed" % v[:2])'
@"$(1)" -m venv $(2)
@$(call pins_and_pip,$(2)); \
  echo "making $(2): $$($(2)/bin/python3 --version), the packages of constraints/$$pins.txt, a minute"; \
  pip --constraint constraints/$$pins.txt torch && pip --constraint constraints/$$pins.txt --editable '.[data,plot]'
@touch $@
endef

# Add what tests, linters and evaluation need to the environment $(1). At the same time `beside` installs the versions of
# transformers and Transformer Engine that only some tests use, in directories of their own.
define install_rest
@$(call pins_and_pip,$(1)); \
  echo "adding the packages of tests, linters and evaluation to $(1)"; \
  beside() { pip --no-deps --upgrade --target $(1)/transformers4 --requirement constraints/transformers4.txt && \
    pip --no-deps --upgrade --target $(1)/transformer_engine --requirement constraints/transformer_engine_$$pins.txt; }; \
  beside & pip --constraint constraints/$$pins.txt --editable '.[dev,plot]'; failed=$$?; wait $$! && exit $$failed
@touch $@
endef
pins_and_pip = pins=$$($(1)/bin/python3 -c 'import sys; print("py312" if sys.version_info >= (3, 12) else "py311")') || exit; \
  pip() { $(1)/bin/python3 -m pip --disable-pip-version-check --quiet install --no-compile "$$@"; }

# For Python 3.12 and later, the public index has torch only with CUDA: 5 GB.
PINNED := setup.py $(addprefix constraints/,py311.txt py312.txt)
BESIDE := $(addprefix constraints/,transformers4.txt transformer_engine_py311.txt transformer_engine_py312.txt)
.venv312/installed_core: $(PINNED)
	$(call install_core,$(PYTHON312),.venv312)
.venv312/installed: .venv312/installed_core $(BESIDE)
	$(call install_rest,.venv312)
ifneq ($(MADE),)
$(VENV)/installed_core: $(PINNED)
	$(call install_core,$(PYTHON),$(VENV))
$(VENV)/installed: $(VENV)/installed_core $(BESIDE)
	$(call install_rest,$(VENV))

$(VENV)/installed_newest: constraints/py312.txt constraints/transformer_engine_py312.txt | $(VENV)/installed
	@pip() { $(PY) -m pip --disable-pip-version-check --quiet install --no-deps --upgrade "$$@"; } && \
	  pip --ignore-requires-python --target $(NEWEST)/megatron_core \
    $$(grep -E '^(megatron-core|emerging-optimizers)==' constraints/py312.txt) && \
	  pip --target $(NEWEST)/transformer_engine --requirement constraints/transformer_engine_py312.txt
	@touch $@
endif

demo: install  ## end to end on two CPU cores, offline, in minutes
	@$(PY) -m launch.demo $(ARGS)

# Unit tests, or the files that ARGS names.
test: setup  ## unit tests: every module and command, on one or two processes
	$(TESTS) $(call in_two,$(VENV)) $(if $(findstring tests/,$(ARGS)),,tests/unit) $(ARGS)

test-integration: setup  ## runs of up to four processes: layouts, resumes, faults, Transformer Engine's layers; without the slow suites
	$(TESTS) $(call in_two,$(VENV)) --ignore tests/unit $(ARGS)

ifneq ($(MADE),)
test-latest:  ## test and test-integration under the newest megatron-core; needs Python 3.12 or later
	@if [ -z "$(or $(filter-out .venv312,$(LATEST)),$(PYTHON312))" ]; then \
	  echo "test-latest: there is no Python 3.12 or later here, nothing was tested; name one with PYTHON312=..."; \
	else $(MAKE) --no-print-directory $(LATEST)/installed && $(call tests_of,$(LATEST),$(LATEST)/bin/python3) $(call in_two,$(LATEST)) $(ARGS); fi
else
test-latest: test test-integration
endif

ifneq ($(NEWEST),)
test-latest-cpu: setup $(VENV)/installed_newest  ## the same on Python 3.11 with its own torch; installs 30 MB
	$(TESTS_NEWEST) $(call in_two,$(VENV)) $(ARGS)
else
test-latest-cpu: setup
	$(TESTS) $(call in_two,$(VENV)) $(ARGS)
endif

ifneq ($(MADE),)
# The engines' code is downloaded into $(VENV) (1.2 GB), not kept in the repository.
ENGINES := $(VENV)/engines
$(VENV)/installed_engines: constraints/engines.txt constraints/engines_sglang.txt | $(VENV)/installed
	@pip() { $(PY) -m pip --disable-pip-version-check --quiet install --no-deps --upgrade "$$@"; } && \
	  pip --target $(ENGINES)/lmdeploy --requirement constraints/engines.txt && \
	  pip --target $(ENGINES)/sglang --requirement constraints/engines_sglang.txt && \
	  pip --target $(ENGINES)/transformers5 transformers==5.24.0 && \
	  pip --target $(ENGINES)/transformers_sglang transformers==5.19.0 || { echo "error: test-engines: pip could not" \
	  "install the engines, for the reason above; nothing was tested. It needs a package index" >&2; exit 1; }
	@touch $@

# SDAR's code is only on GitHub; its test is skipped if GitHub cannot be reached. c2041a8 is the commit that was tested.
SDAR := https://github.com/JetAstra/SDAR
test-engines: setup $(VENV)/installed_engines  ## exports under LMDeploy's, SGLang's and SDAR's own code (fetches 300 MB)
	@[ -d $(ENGINES)/sdar ] || why=$$(export GIT_TERMINAL_PROMPT=0; git clone --quiet $(SDAR) $(ENGINES)/sdar.new 2>&1 && \
	  git -C $(ENGINES)/sdar.new checkout --quiet c2041a8 2>&1 && mv $(ENGINES)/sdar.new $(ENGINES)/sdar) || { \
	  rm -rf $(ENGINES)/sdar.new; echo "test-engines: SDAR's own code is not tested ($${why#fatal: });" \
	  "a checkout of $(SDAR) may be put into $(ENGINES)/sdar"; }
	A2D_ENGINES=$(CURDIR)/$(ENGINES) $(TESTS) tests/engines $(ARGS)
else
test-engines:
	@echo "test-engines: nothing was tested; it needs the environment of make setup, without VENV=none and BIN="
endif

test-parity: setup  ## every layout against one process, in fp32 and bf16, resumed and resharded; writes tests/parity/RESULTS.md
	$(TESTS) tests/parity -m "" --exactness tests/parity/RESULTS.md $(ARGS)

# One numbered line per test. Passed tests are not repeated until the code changes (ARGS=--cache-clear repeats them).
TE_RESULTS := tests/transformer_engine -m "" -vv -o console_output_style=count \
  --engine-results tests/transformer_engine/RESULTS.md
test-te: setup $(if $(NEWEST),$(VENV)/installed_newest)  ## Transformer Engine's layers on a CPU, 2.12 and the newest, every case; resumable; writes tests/transformer_engine/RESULTS.md
	@failed=0; $(TESTS) $(TE_RESULTS) $(ARGS) || failed=1; \
	  $(if $(NEWEST),$(TESTS_NEWEST) $(TE_RESULTS) $(ARGS) || failed=1;) exit $$failed

test-rehearsal: setup  ## a step of every recipe on every cluster size, without GPUs, compared with the plan; writes tests/rehearsal/RESULTS.md
	$(TESTS:pytest=tests.rehearsal) --out tests/rehearsal/RESULTS.md $(ARGS)

test-faults: setup  ## kills, damaged files, full disks, non-finite losses; writes tests/parity/RESULTS.md
	$(TESTS) tests/faults -m "" --exactness tests/parity/RESULTS.md $(ARGS)

test-slurm: setup  ## a real two-node Slurm on this machine; A2D_INSTALL_SLURM=1 installs it (Debian, root)
	$(TESTS) tests/slurm -m "" $(ARGS)

SEED ?= 1
MINUTES ?= 60
soak: setup  ## a run of four processes under about one random fault per minute, for MINUTES, by SEED; must end bitwise like an undisturbed one
	@$(TESTS:pytest=tests.soak) --minutes $(MINUTES) --seed $(SEED) $(if $(OUT),--out $(OUT)) $(ARGS)

N ?= 1000
fuzz: setup  ## N malformed inputs for all commands, by SEED: each must give an error line and an exit code, no traceback
	$(TESTS:pytest=tests.fuzz.commands) --n $(N) --seed $(SEED) $(ARGS)

test-mutants: setup  ## mutation testing of the core: 150 mutants by SEED; resumable
ifneq ($(MADE),)
	@$(PY) -c 'import coverage, mutmut' 2>/dev/null || $(PY) -m pip --disable-pip-version-check --quiet install \
	  --constraint constraints/mutants.txt --editable '.[mutants]'
endif
	$(TESTS:pytest=tests.mutants) --seed $(SEED) $(ARGS)

check: setup  ## linters, formatter, types
	$(BIN)/ruff check .
	$(BIN)/shellcheck launch/train.sh launch/node.sh launch/python.sh launch/train.sbatch launch/tokenize.sbatch .ci/run
	$(BIN)/ruff format --check .
	$(BIN)/mypy

data: install  ## tokenise INPUT with TOKENIZER to OUT.bin/.idx
	$(call needs,INPUT TOKENIZER OUT)
	$(PY) -m data_prep.tokenize_corpus --input $(INPUT) --tokenizer $(TOKENIZER) --output-prefix $(OUT) $(ARGS)

convert-hf: install  ## HF_MODEL (directory or hub id) -> checkpoint OUT
	$(call needs,HF_MODEL OUT)
	$(PY) -m checkpoints_tools.convert_hf --hf-model $(HF_MODEL) --out $(OUT) $(ARGS)

convert-megatron: install  ## MEGATRON (torch_dist checkpoint of Megatron-LM, Bridge, NeMo 2) -> checkpoint OUT
	$(call needs,MEGATRON OUT)
	$(PY) -m checkpoints_tools.convert_megatron --megatron $(MEGATRON) $(if $(HF_MODEL),--hf-model $(HF_MODEL)) --out $(OUT) $(ARGS)

train: install  ## RECIPE on NPROC processes of this machine
	$(call needs,RECIPE)
	BIN=$(BIN) NPROC=$(NPROC) launch/train.sh --config $(RECIPE) $(ARGS)

plan: install  ## RECIPE on GPUS of CLUSTER (h100, h200, b200, ...): the best layouts, their memory, time and cost
	$(call needs,RECIPE CLUSTER GPUS)
	@$(PY) -m megatron_a2d.plan --config $(RECIPE) --cluster $(CLUSTER) --gpus $(GPUS) $(ARGS)

export: install  ## CHECKPOINT -> Hugging Face directory OUT in FORMAT (rnd1, a2d, sdar, dream, llada, qwen3)
	$(call needs,CHECKPOINT OUT)
	$(PY) -m checkpoints_tools.export_hf --checkpoint $(CHECKPOINT) --out $(OUT) $(if $(FORMAT),--format $(FORMAT)) $(ARGS)

verify: install  ## compare the tensors of HF_MODEL and CHECKPOINT
	$(call needs,HF_MODEL CHECKPOINT)
	$(PY) -m checkpoints_tools.verify --hf-model $(HF_MODEL) --checkpoint $(CHECKPOINT) $(ARGS)

inspect: install  ## contents of CHECKPOINT: sizes, norms by role, iteration, tokens, recipe
	$(call needs,CHECKPOINT)
	@$(PY) -m checkpoints_tools.inspect --checkpoint $(CHECKPOINT) $(ARGS)

publish: HF_MODEL := $(or $(HF_MODEL),$(MODEL))
publish: install  ## upload HF_MODEL to the hub as REPO (ARGS=--dry-run shows what would be uploaded)
	$(call needs,HF_MODEL REPO)
	$(PY) -m checkpoints_tools.publish --hf-model $(HF_MODEL) --repo $(REPO) $(ARGS)

evaluate: setup  ## MODEL, or several ([NAME=]DIR ...), on held-out text (DATA) and tasks (CONFIG, such as launch/eval/mmlu.yaml), to OUT
	$(call needs,MODEL OUT)
	@$(PY) -m megatron_a2d.evaluate --model $(MODEL) --out $(OUT) $(if $(DATA),--valid-data-path $(DATA)) \
	  $(if $(CONFIG),--config $(CONFIG)) $(ARGS)

export PROMPT PREFIX SUFFIX
generate: install  ## text from the exported MODEL: PROMPT='...', or PREFIX='...' SUFFIX='...'
	$(call needs,MODEL)
	@$(PY) -m megatron_a2d.generate --model $(MODEL) $(if $(PROMPT),--prompt "$$PROMPT") \
	  $(if $(PREFIX),--prefix "$$PREFIX" --suffix "$$SUFFIX") $(ARGS)

study: setup  ## run the study NAME on a small model, offline; writes runs, table, plots and page to OUT/NAME
	$(call needs,NAME OUT)
	$(PY) -m launch.pretrain_tiny_ar --out $(OUT)/base $(if $(filter routers,$(NAME)),--balanced)
	OMP_NUM_THREADS=1 $(PY) -m megatron_a2d.study $(NAME) --out $(OUT)/$(NAME) \
	  --config launch/recipes/study_laptop.yaml --load $(OUT)/base/ar \
	  --train-data-path $(OUT)/base/corpus_train --valid-data-path $(OUT)/base/corpus_valid \
	  $(if $(filter routers,$(NAME)),--load-balanced $(OUT)/base/ar_balanced )$(ARGS)

bench: setup  ## repeat CPU benchmarks whose results are out of date, and update the tables in the docs; needs make demo
	$(PY) -m bench $(ARGS)

bench-report: setup  ## update the tables of measurements in the docs from bench/results
	$(PY) -m bench.report $(ARGS)

# On a GPU machine use its own Python: VENV=none, or BIN=DIR for the directory of another.
GPU_OUT ?= bench/results/gpu.json
gpu:  ## tests and benchmarks on one GPU in ten minutes, one result file; repeat it for missing parts (BIN=/usr/bin: use its python)
	$(PY) -m bench.gpu --out $(GPU_OUT) $(ARGS)
