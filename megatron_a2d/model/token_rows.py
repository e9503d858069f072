"""Dispatch and combine of tokens on a CPU: a token is copied to a row per chosen expert, and its rows are summed.

The two are each other's transpose, so that each is the other's gradient, and both read whole rows in the order in which
they write. Shapes: T tokens, R rows, h hidden.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The chosen pairs of a column (an expert) and a token, column by column."""

    token: Tensor  # [R], of each row
    order: Tensor  # [R], the rows of token 0, of token 1, ...
    starts: Tensor  # [T], of each token in `order`


def rows_of(chosen_TE: Tensor) -> Rows:
    """The rows of a bool table: those of column 0, then of column 1, ..., in each by token."""
    token_R = chosen_TE.T.nonzero()[:, 1]
    counts_T = chosen_TE.sum(1)
    return Rows(token_R, token_R.argsort(stable=True), counts_T.cumsum(0) - counts_T)


def copied(x_Th: Tensor, rows: Rows) -> Tensor:
    """[R, h], each row's token."""
    return _Copied.apply(x_Th, rows)  # type: ignore[no-any-return]


def summed(x_Rh: Tensor, rows: Rows) -> Tensor:
    """[T, h], the sum of each token's rows; 0 of a token without any."""
    return _Summed.apply(x_Rh, rows)  # type: ignore[no-any-return]


def _sums(x_Rh: Tensor, rows: Rows) -> Tensor:
    return torch.embedding_bag(x_Rh.detach(), rows.order, rows.starts)[0]


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Th: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]
        ctx.rows = rows
        return x_Th.index_select(0, rows.token)

    @staticmethod
    def backward(ctx: Any, gradient_Rh: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sums(gradient_Rh, ctx.rows), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Rh: Tensor, rows: Rows) -> Tensor:  # type: ignore[override]
        ctx.rows = rows
        return _sums(x_Rh, rows)

    @staticmethod
    def backward(ctx: Any, gradient_Th: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient_Th.index_select(0, ctx.rows.token), None
