"""Which of a run's processes this one is, as torchrun's environment says; read before torch is imported."""

from __future__ import annotations

import os

from megatron_a2d.utils.errors import UserError


def world_size() -> int:
    """Number of processes that torchrun (or Slurm through it) started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def check_launch() -> None:
    """UserError where Slurm started several processes that would each train alone."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ and tasks != "1":
        raise UserError(
            f"SLURM_NTASKS {tasks}: srun started this process {tasks} times without a RANK, and each would run alone; "
            "let torchrun number them: `srun --ntasks-per-node 1 launch/node.sh -m megatron_a2d.train ...`"
        )
