#!/usr/bin/env bash
# Train on one machine, or on each of several, with torchrun.
#
#   NPROC=8 launch/train.sh --config launch/recipes/NAME.yaml --load CKPT --save RUN
#
# Several machines: run the same line on each with NNODES, NODE_RANK and MASTER_ADDR set (launch/train.sbatch
# does that under Slurm). NPROC is the number of processes of a machine, one a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
NPROC=${NPROC:-1}
NNODES=${NNODES:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun would choose the same, with a banner
if [ "$NNODES" = 1 ]; then
  rendezvous=(--standalone)
else
  rendezvous=(--node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}")
fi
# What can be wrong is found here, in seconds and in one process: exit code 2 and a line for each problem. The checksums
# of a large checkpoint take longer, and are compared once, when the run itself starts.
"$BIN/python" -m megatron_a2d.train "$@" --no-verify-checkpoint --dry-run --world-size $((NPROC * NNODES))
exec "$BIN/python" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" "${rendezvous[@]}" \
  -m megatron_a2d.train "$@"
