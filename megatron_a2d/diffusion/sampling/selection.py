"""Which of the considered positions a forward pass decides. All tensors [B, L], counts [B]."""

from __future__ import annotations

import torch
from torch import Tensor


def lowest(costs_BL: Tensor, considered_BL: Tensor, count_B: Tensor) -> Tensor:
    """The `count` considered positions of lowest cost, the leftmost of equals."""
    return considered_BL & (_ranks(costs_BL, considered_BL) < count_B[:, None])


def entropy_bounded(costs_BL: Tensor, entropies_BL: Tensor, considered_BL: Tensor, gamma: float) -> Tensor:
    """By rising cost, while (sum of entropies) - (largest of them) <= gamma nats; always the first one.

    The bound of Ben-Hamu et al. 2025 on what deciding them together, as if independent, can cost.
    """
    order_BL = costs_BL.masked_fill(~considered_BL, torch.inf).argsort(dim=1, stable=True)
    sorted_BL = entropies_BL.masked_fill(~considered_BL, 0.0).gather(1, order_BL)
    within_BL = sorted_BL.cumsum(1) - sorted_BL.cummax(1).values <= gamma
    within_BL[:, 0] = True
    return considered_BL & torch.zeros_like(within_BL).scatter(1, order_BL, within_BL)


def _ranks(costs_BL: Tensor, considered_BL: Tensor) -> Tensor:
    """0 for the lowest cost; positions that are not considered come last."""
    return costs_BL.masked_fill(~considered_BL, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
