"""Bitwise comparison of two sets of weights, streamed slab by slab."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from megatron_a2d.checkpoint.tensor_rows import RowRange, RowSource, account, slabs
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.conversion.sources import Weights
from megatron_a2d.conversion.workers import run_jobs
from megatron_a2d.utils.errors import UserError


class Comparison(NamedTuple):
    """The result. `largest_rounding`: the largest absolute rounding by the candidate's narrower dtype; 0 if none."""

    num_tensors: int
    num_bytes: int
    largest_rounding: float


def compare_weights(
    reference: Weights, candidate: Weights, advance: Callable[[float], None], workers: int = 1
) -> Comparison:
    """Compare the architectures, then all tensors, `workers` at a time. Where dtypes differ the reference is cast to
    the candidate's and must then agree in every bit. Raises UserError with every difference."""
    check_alike(reference, candidate)
    jobs = [
        partial(_compare_tensor, reference.tensors, candidate.tensors, name, shape)
        for name, shape in reference.tensors.shapes.items()
    ]
    results = run_jobs(jobs, workers, advance)
    problems = [
        tensor_differs(reference, candidate, name, result.difference)
        for name, result in zip(reference.tensors.shapes, results, strict=True)
        if result.difference is not None
    ]
    if problems:
        raise UserError(problems)
    return Comparison(len(jobs), reference.num_bytes(), max(result.rounding for result in results))


def tensor_differs(reference: Weights, candidate: Weights, name: str, difference: float) -> str:
    return (
        f"{candidate.directory}: tensor {name} differs from {reference.directory} "
        f"by up to {difference:.3g}; convert or export again"
    )


def check_alike(reference: Weights, candidate: Weights) -> None:
    """UserError with every difference of the architectures, and of the tensors' names and shapes."""
    problems = model_config_differences(reference, candidate)
    problems += account(reference.tensors.shapes, candidate.tensors.shapes, str(candidate.directory))
    if problems:
        raise UserError(problems)


class _Result(NamedTuple):
    difference: float | None  # the largest absolute one, where bits differ
    rounding: float  # the largest absolute one, where bits agree


def _compare_tensor(
    reference: RowSource,
    candidate: RowSource,
    name: str,
    shape: tuple[int, ...],
    advance: Callable[[float], None],
) -> _Result:
    largest: float | None = None
    rounding = 0.0
    for start, stop in slabs(shape, 0, shape[0], 4):
        row_range = RowRange(name, (), start, stop)
        expected, found = reference.read(row_range), candidate.read(row_range)
        advance(math.prod(expected.shape) * expected.dtype.itemsize)
        if not _same_bits(expected.to(found.dtype), found):
            difference = largest_difference(expected, found)
            largest = difference if largest is None else max(largest, difference)
        elif expected.dtype != found.dtype:
            rounding = max(rounding, largest_difference(expected, found))
    return _Result(largest, rounding)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    # Eight bytes at a time are compared ten times as fast.
    words = torch.int64 if a.nbytes % 8 == 0 and a.numel() else torch.uint8
    return torch.equal(a.view(-1).view(words), b.view(-1).view(words))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference; infinity where one is NaN."""
    difference = (a.float() - b.float()).abs()
    return math.inf if bool(difference.isnan().any()) else float(difference.max())


def model_config_differences(reference: Weights, candidate: Weights) -> list[str]:
    return config_differences(
        reference.model_config, candidate.model_config, str(reference.directory), str(candidate.directory)
    )


def config_differences(reference: ModelConfig, candidate: ModelConfig, where: str, candidate_where: str) -> list[str]:
    """A line for each difference of two architectures, with the source of each."""
    ours, theirs = dataclasses.asdict(reference), dataclasses.asdict(candidate)
    return [
        f"{candidate_where}: {key} is {theirs[key]}, but {ours[key]} in {where}; these are not the same model"
        for key in ours
        if key not in ("mask_token_id", "initializer_range") and ours[key] != theirs[key]
    ]
