#!/usr/bin/env bash
# Train on one machine, or on each of several, with torchrun.
#
#   launch/train.sh --config launch/recipes/NAME.yaml --load CKPT --save RUN
#
# Several machines: run the same line on each with NNODES, NODE_RANK and MASTER_ADDR set, and A2D_ATTEMPT set to a new
# directory that all of them share (launch/train.sbatch does that under Slurm). NPROC is the number of processes per
# machine: one per GPU, or 1 without GPUs. PREFLIGHT=0 skips the checks. Exit codes: docs/cluster.md.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${BIN:-}" ]; then
  # NVIDIA's container brings torch and everything built against it, so a mounted .venv is ignored there.
  if [ -z "${NVIDIA_PYTORCH_VERSION:-}" ] && [ -x .venv/bin/python ]; then
    BIN=.venv/bin
  else
    BIN=$(dirname "$(command -v python3)")
  fi
fi
python=$BIN/python3
if [ ! -x "$python" ]; then python=$BIN/python; fi
if [ -z "${NPROC:-}" ]; then
  NPROC=$({ nvidia-smi -L 2>/dev/null || :; } | grep -c '^GPU ' || :)
  if [ "$NPROC" = 0 ]; then NPROC=1; fi
fi
export NNODES=${NNODES:-1}
export NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would choose the same, but print a banner
port=${MASTER_PORT:-29500}

refuse() {
  echo "error: $*; correct it, or leave it out" >&2
  exit 2
}
[[ $NPROC =~ ^[1-9][0-9]{0,4}$ ]] || refuse "NPROC=$NPROC: is not a number of processes"
[[ $NNODES =~ ^[1-9][0-9]{0,4}$ ]] || refuse "NNODES=$NNODES: is not a number of nodes"
[[ $NODE_RANK =~ ^[0-9]{1,5}$ ]] || refuse "NODE_RANK=$NODE_RANK: is not a number of 0 or more"
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || refuse "MASTER_PORT=$port: is not a port"
[[ $NNODES = 1 || -n ${MASTER_ADDR:-} ]] || refuse "NNODES=$NNODES: needs MASTER_ADDR, the first node's name"

# Warnings about the settings (old names) are printed once: by the first node, and by the first process that reads them.
if [ "$NODE_RANK" != 0 ]; then export A2D_SETTINGS_READ=1; fi
torchrun=("$python" -m launch.torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC")
if [ "$NNODES" = 1 ]; then
  here=(--standalone) there=(--standalone)
else
  # Two ports, so that a fast node's training does not connect to a slow node's preflight check.
  here=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$((port + 1))")
  there=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
fi
for word in "$@"; do
  case $word in -h | --help | --print-config) exec "$python" -m megatron_a2d.train "$@" ;; esac
done
# Writes the reason where launch/torchrun.py does; only the first node's counts, the others are its consequences.
refused() {
  local verdict=again
  if [ "$1" = 2 ]; then verdict=stay; fi
  if [ -n "${A2D_ATTEMPT:-}" ]; then
    (set -o noclobber && echo "$1 $verdict the settings were refused" >"$A2D_ATTEMPT/outcome") 2>/dev/null || :
  fi
  exit "$1"
}
# Problems are found here, before the model is built: exit code 2 and one line per problem. Checks that need only the
# settings come first, before torch is imported.
if [ "${PREFLIGHT:-1}" != 0 ]; then
  WORLD_SIZE=$((NNODES * NPROC)) "$python" -m megatron_a2d.preflight --settings-only "$@" || refused $?
  export A2D_SETTINGS_READ=1
  "${torchrun[@]}" "${here[@]}" -m megatron_a2d.preflight "$@"
fi
# Environment variables that depend on the settings and the GPU are set by the processes themselves.
exec "${torchrun[@]}" "${there[@]}" -m megatron_a2d.train "$@"
