#!/usr/bin/env bash
# Train on one machine, or on each of several, with torchrun.
#
#   launch/train.sh --config launch/recipes/NAME.yaml --load CKPT --save RUN
#
# Several machines: run the same command on each with NNODES, NODE_RANK and MASTER_ADDR set, and A2D_ATTEMPT set to a new
# directory that all of them share (launch/train.sbatch does that under Slurm). NPROC is the number of processes per
# machine: one per GPU, or 1 without GPUs. PREFLIGHT=0 skips the checks. Exit codes: docs/cluster.md.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
source launch/python.sh
export NNODES=${NNODES:-1}
[[ $NNODES =~ ^[1-9][0-9]{0,4}$ ]] || refuse "NNODES=$NNODES: is not a number of nodes"
# Slurm's node number does not apply to a run on one node of a larger allocation.
if [ "$NNODES" = 1 ]; then NODE_RANK=${NODE_RANK:-0}; fi
export NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
port=${MASTER_PORT:-29500}

[[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,4})$ ]] || refuse "NODE_RANK=$NODE_RANK: is not a number of 0 or more"
((NODE_RANK < NNODES)) || refuse "NODE_RANK=$NODE_RANK: is not below NNODES=$NNODES (the first node is 0)"
# Below the last port, since preflight takes the next one.
if [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65534)); then
  refuse "MASTER_PORT=$port: is not a port from 1 to 65534"
fi
if [ "$NNODES" != 1 ]; then
  [ -n "${MASTER_ADDR:-}" ] || refuse "NNODES=$NNODES: needs MASTER_ADDR, the first node's name"
  # torch would try for a quarter of an hour.
  if command -v getent >/dev/null && ! getent hosts "$MASTER_ADDR" &>/dev/null; then
    refuse "MASTER_ADDR=$MASTER_ADDR: does not resolve on $HOSTNAME"
  fi
fi

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
# Writes the reason to the same file as launch/torchrun.py; only the first node's counts, later ones are consequences.
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
