#!/usr/bin/env bash
# Under Slurm, one task a node: run a program of this project on all GPUs of the step's nodes, with torchrun.
#
#   srun --nodes 8 --ntasks-per-node 1 launch/node.sh -m megatron_a2d.train --config ... --load CKPT --save RUN
#
# Inside an allocation, such as for a study's --launcher; launch/train.sbatch makes its own, and comes back after faults.
# NPROC is the number of processes of a node, otherwise that of its GPUs. Untested on a cluster.
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: launch/node.sh: is for Slurm; start it with srun, or use launch/train.sh on this machine" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # the caller's directory stays: paths may be relative to it

if [ -z "${BIN:-}" ]; then
  # NVIDIA's container has torch and all that was built against it, whatever lies in a .venv that is mounted.
  if [ -z "${NVIDIA_PYTORCH_VERSION:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    BIN=$root/.venv/bin
  else
    BIN=$(dirname "$(command -v python3)")
  fi
fi
python=$BIN/python3
if [ ! -x "$python" ]; then python=$BIN/python; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}}
if [ -z "$NPROC" ]; then # Slurm does not know: as launch/train.sh counts
  NPROC=$({ nvidia-smi -L 2>/dev/null || :; } | grep -c '^GPU ' || :)
  if [ "$NPROC" = 0 ]; then NPROC=1; fi
fi
export NNODES=${SLURM_STEP_NUM_NODES:-${SLURM_JOB_NUM_NODES:?}}
torchrun=("$python" -m launch.torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC")
if [ "$NNODES" = 1 ]; then
  exec "${torchrun[@]}" --standalone "$@"
fi
nodes=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:?}}")
export NODE_RANK=${SLURM_NODEID:?}
# The steps of an allocation, and several allocations on one machine, each have a port of their own.
exec "${torchrun[@]}" --node-rank "$NODE_RANK" --master-addr "$(head -n 1 <<<"$nodes")" \
  --master-port "$((20000 + (2 * SLURM_JOB_ID + ${SLURM_STEP_ID:-0}) % 10000))" "$@"
