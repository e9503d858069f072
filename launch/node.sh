#!/usr/bin/env bash
# Run a program of this project on all GPUs of a Slurm step's nodes with torchrun, one task per node.
#
#   srun --nodes 8 --ntasks-per-node 1 launch/node.sh -m megatron_a2d.train --config ... --load CKPT --save RUN
#
# For use inside an allocation, for instance as a study's --launcher; launch/train.sbatch is a complete job, requeued
# after faults. NPROC is the number of processes per node (default: its GPUs). Untested on a cluster.
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: launch/node.sh: is for Slurm; start it with srun, or use launch/train.sh on this machine" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # the working directory is kept: paths may be relative to it

NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}} # if Slurm does not set it, the GPUs are counted
source "$root/launch/python.sh"
export NNODES=${SLURM_STEP_NUM_NODES:-${SLURM_JOB_NUM_NODES:?}}
torchrun=("$python" -m launch.torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC")
if [ "$NNODES" = 1 ]; then
  exec "${torchrun[@]}" --standalone "$@"
fi
nodes=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:?}}")
export NODE_RANK=${SLURM_NODEID:?}
# Each step of an allocation, and each of several allocations on one machine, gets its own port.
exec "${torchrun[@]}" --node-rank "$NODE_RANK" --master-addr "$(head -n 1 <<<"$nodes")" \
  --master-port "$((20000 + (2 * SLURM_JOB_ID + ${SLURM_STEP_ID:-0}) % 10000))" "$@"
