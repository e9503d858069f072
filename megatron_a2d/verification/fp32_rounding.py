"""Tolerance for logits in fp32: how far rounding alone can move them, so that larger differences mean other weights.

Two programs that compute one model differ, because they sum the same products in different orders. How much that comes
to depends on the model: on its sizes, and on how far it magnifies small errors (a router with large weights turns an
error of one part in a million into one of a hundred thousand of an expert's weight). So each product gets the error
that its number of terms gives it, and the model itself carries that to the logits: Monte Carlo arithmetic (Parker
1997).

The error of a sum of n products with random signs: its partial sums grow as a random walk, the k-th to sqrt(k) times
one product, and each addition rounds by up to u = 2**-24 of the partial sum. As independent errors (Higham & Mary
2019, SIAM J. Sci. Comput. 41(5), A2815) these come to u * sqrt(1 + 2 + ... + n) = u * n / sqrt(2) products, and
relative to the sum itself, of sqrt(n) products, to u * sqrt(n / 2). Squares, of which a norm is a sum, all have one
sign: the k-th partial sum is k / n of the total, which gives u * sqrt(n / 3). Kernels sum in blocks and do better;
this bounds every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from megatron_a2d.conversion.sources import Weights
from megatron_a2d.verification.reference_forward import StreamedModel

UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2
# Errors are drawn this much too large, so that the rounding of the run itself does not count, and still act linearly.
MAGNIFICATION = 1024.0
# The largest of many errors was drawn once, and is compared with the largest of another draw.
MARGIN = 2.0


def rounding_tolerance(
    weights: Weights,
    tokens_BL: torch.Tensor,
    exact: StreamedModel,
    logits_BLV: torch.Tensor,
    advance: Callable[[float], None] = lambda amount: None,
) -> float:
    """The largest difference of a logit between two programs that compute `weights` in fp32, each with its own order.

    `exact` has computed `logits_BLV` of `tokens_BL`. Reads the weights once more.
    """
    perturbed_BLV = _PerturbedModel(weights, exact, advance).logits(tokens_BL)
    return MARGIN * math.sqrt(2) * float((perturbed_BLV - logits_BLV).abs().max()) / MAGNIFICATION


class _PerturbedModel(StreamedModel):
    """The model with magnified rounding errors of every product; routing is that of the unperturbed model."""

    def __init__(self, weights: Weights, exact: StreamedModel, advance: Callable[[float], None]):
        super().__init__(weights, exact.causal, advance, visible=exact.visible, positions=exact.positions)
        self._exact_choices: Iterator[torch.Tensor] = iter(exact.chosen)
        self._generator = torch.Generator().manual_seed(0)

    def _error(self, shape: tuple[int, ...], relative: float) -> torch.Tensor:
        return MAGNIFICATION * UNIT_ROUNDOFF * relative * torch.randn(shape, generator=self._generator)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        y = super()._linear(x, name)
        typical = y.square().mean(-1, keepdim=True).sqrt()
        return y + typical * self._error(y.shape, math.sqrt(x.shape[-1] / 2))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """One error for all of a row, of the sum of its squares."""
        return super()._norm(x, name) * (1 + self._error((*x.shape[:-1], 1), math.sqrt(x.shape[-1] / 3)))

    def _mix(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Scores are sums over the head's size, carried here by the queries; outputs are sums over the positions."""
        query = query * (1 + self._error(query.shape, math.sqrt(query.shape[-1] / 2)))
        mixed = super()._mix(query, key, value)
        return mixed * (1 + self._error(mixed.shape, math.sqrt(key.shape[-2] / 2)))

    def _choose(self, probabilities: torch.Tensor) -> torch.Tensor:
        return next(self._exact_choices)
