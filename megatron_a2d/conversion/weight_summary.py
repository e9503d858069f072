"""Summary of a model's weights by role: counts, sizes, dtypes, norms. Streamed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from megatron_a2d.checkpoint.tensor_rows import RowRange, RowSource, is_finite, slabs
from megatron_a2d.conversion.sources import EMBEDDING, HEAD, Weights
from megatron_a2d.conversion.workers import run_jobs


class RoleSummary(NamedTuple):
    """All tensors of a role. `root_mean_square` and `largest` (absolute) are over values; None if not read."""

    role: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: tuple[str, ...]
    norm: float | None
    root_mean_square: float | None
    largest: float | None
    num_not_finite: int  # tensors with a NaN or an infinity


class _Values(NamedTuple):
    sum_of_squares: float
    largest: float
    finite: bool


def role_of(name: str) -> str:
    """The role of a tensor (as in --lr-mult) by its HF name."""
    if name == EMBEDDING:
        return "embedding"
    if name == HEAD:
        return "head"
    if "norm" in name:
        return "norm"
    if ".mlp.gate." in name:
        return "router"
    return "attention" if ".self_attn." in name else "mlp"


def summarise(weights: Weights, advance: Callable[[float], None] | None, workers: int = 1) -> list[RoleSummary]:
    """A summary per role, in the order of the model. Without `advance` no values are read."""
    tensors = weights.tensors
    values: dict[str, _Values] = {}
    if advance is not None:
        jobs = [partial(_measure, tensors, name) for name in tensors.shapes]
        values = dict(zip(tensors.shapes, run_jobs(jobs, workers, advance), strict=True))
    roles: dict[str, list[str]] = {}
    for name in tensors.shapes:
        roles.setdefault(role_of(name), []).append(name)
    result = []
    for role, names in roles.items():
        counts = [math.prod(tensors.shapes[name]) for name in names]
        seen = [values[name] for name in names if name in values]
        squares = math.fsum(item.sum_of_squares for item in seen)
        result.append(
            RoleSummary(
                role,
                len(names),
                sum(counts),
                sum(count * tensors.dtype(name).itemsize for count, name in zip(counts, names, strict=True)),
                tuple(sorted({str(tensors.dtype(name)).removeprefix("torch.") for name in names})),
                math.sqrt(squares) if seen else None,
                math.sqrt(squares / sum(counts)) if seen else None,
                max(item.largest for item in seen) if seen else None,
                sum(not item.finite for item in seen),
            )
        )
    return result


def _measure(tensors: RowSource, name: str, advance: Callable[[float], None]) -> _Values:
    shape = tensors.shapes[name]
    squares, largest, finite = 0.0, 0.0, True
    for start, stop in slabs(shape, 0, shape[0], 4):
        rows = tensors.read(RowRange(name, (), start, stop))
        advance(rows.nbytes)
        if not is_finite(rows):
            finite = False
            rows = rows.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        wide = rows.float()
        squares += float(wide.square().sum(dtype=torch.float64))
        largest = max(largest, float(wide.abs().max()))
    return _Values(squares, largest, finite)
