"""Drift of the weights, |W - W0| / |W0| by role, from those that the run began with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.manifest import check_manifest
from megatron_a2d.checkpoint.torch_dist_reader import check_pickles
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.settings import ROLES
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.training.param_shards import ParamShard, over_ranks, squares_by_role
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line


class Drift:
    """|W - W0| / |W0| by role; W0 are the weights at construction, kept in host memory."""

    def __init__(self, shards: list[ParamShard]):
        self._shards = shards
        self._start = [shard.weight().to("cpu", copy=True) for shard in shards]

    def measure(
        self, values: Callable[[int, ParamShard], Tensor] = lambda _, shard: shard.weight()
    ) -> dict[str, float]:
        """Drift of `values`, by default the current weights, for the roles that the model has. Collective."""

        def moved(number: int, shard: ParamShard) -> Tensor:
            return values(number, shard).float() - self._start[number].to(device()).float()

        sums = over_ranks(
            torch.stack(
                [
                    squares_by_role(self._shards, moved),
                    squares_by_role(self._shards, lambda number, shard: self._start[number].to(device())),
                ]
            )
        )
        away, size = sums.sqrt().tolist()
        return {role: away[index] / size[index] for index, role in enumerate(ROLES) if size[index] > 0}


def find_reference(load: str | None, model_config: ModelConfig) -> Path | None:
    """The checkpoint that the run began with; None, with a warning, if it is missing, damaged or another model's."""
    try:
        if not load:
            raise UserError("--load: is missing")
        directory = resolve(load)
        check_pickles(directory)
        if read_model_config(directory / HF_FILES) != model_config:
            raise UserError(f"{directory}: is another model")
        if problems := check_manifest(directory, checksums=False):
            raise UserError(problems)
    except UserError as error:
        needed = "the checkpoint that the run began with (--load)"
        print_line(f"warning: relative_weight_change is not logged; it needs {needed}: {error.problems[0]}", sys.stderr)
        return None
    return directory
