"""Placements of experts for tests: random permutations beside the weights of the tiny MoE model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.checkpoint.placement_file import ExpertPlacement, identity
from tests.cases import Case

# [layers][slots]; each expert-parallel rank of two or four gets experts from both halves.
ORDERS = [torch.randperm(8, generator=torch.Generator().manual_seed(layer)).tolist() for layer in range(4)]


def write_placement(directory: Path, orders: list[list[int]] = ORDERS, size: int = 2) -> Path:
    """A placement in an iteration's `directory`; returns the file."""
    return ExpertPlacement(identity(directory), 0, size, 2, 2.0, 1.0, orders).write(directory)


def placed_copy(case: Case, copy: Path) -> Case:
    """The case with a copy of its checkpoint that has a placement."""
    shutil.copytree(case.checkpoint, copy)
    write_placement(resolve(copy))
    return case._replace(checkpoint=str(copy))
