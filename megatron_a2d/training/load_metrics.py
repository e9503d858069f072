"""Loads of experts and of expert-parallel ranks as metrics, and the warning about masked tokens that crowd on experts.

Shapes: L layers, E experts, of 2 kinds of tokens (router_metrics.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Share of the masked tokens that choose the busiest expert, mean over layers. In the study on routers runs with an
# auxiliary loss of 0.01 or more ended at 0.33 to 0.68, all others at 0.71 to 0.98 (docs/studies/routers.md). A share of
# tokens means the same for 2 of 8 experts as for 8 of 128, which a multiple of the even load does not.
CROWDED = 0.7
# Log intervals in a row, above or below: a conversion's first steps, and single batches, are no reason to warn.
PATIENCE = 10


def busiest(loads_LN: Tensor) -> Tensor:
    """[L] largest load of each row over the row's mean; 1 for a row without any."""
    loads_LN = loads_LN.double()
    means_L = loads_LN.mean(-1)
    return torch.where(means_L > 0, loads_LN.max(-1).values / means_L.clamp(min=1e-300), 1.0)


def rank_imbalance(slots_LE: Tensor) -> dict[int, Tensor]:
    """[L] load of the busiest expert-parallel rank over the mean, by the number of ranks: 2, 4, ... and E.

    `slots_LE`: choices of the experts in the order in which ranks hold them.
    """
    num_experts = slots_LE.shape[1]
    powers = [2**power for power in range(1, num_experts.bit_length())]
    sizes = [size for size in powers if size < num_experts and num_experts % size == 0]
    return {size: busiest(slots_LE.view(len(slots_LE), size, -1).sum(-1)) for size in (*sizes, num_experts)}


def load_metrics(choices_L2E: Tensor, slots_LE: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dead experts, and imbalance by expert-parallel rank for every number of ranks: over all layers, and by layer.

    `slots_LE`: choices in the order of the experts on the ranks, which differs from theirs under a placement.
    """
    dead_L = (choices_L2E.sum(1) == 0).sum(-1)
    by_size = rank_imbalance(slots_LE)
    values = {
        "num_dead_experts": int(dead_L.sum()),
        "rank_imbalance": {f"ep{size}": float(found.mean()) for size, found in by_size.items()},
    }
    by_layer = {
        "num_dead_experts": dead_L.tolist(),
        "rank_imbalance": {f"ep{size}": found.tolist() for size, found in by_size.items()},
    }
    return values, by_layer


class CrowdingDetector:
    """Detector of masked tokens that choose the same experts for long; each such episode is reported once."""

    def __init__(self, num_experts: int, top_k: int):
        # Of an expert that serves a share `CROWDED` of the tokens; the mean load serves top_k / num_experts of them.
        self._threshold = CROWDED * num_experts / max(1, top_k)
        self._in_a_row, self._reported = 0, False

    def check(self, metrics: dict[str, Any] | None) -> str | None:
        """The warning that the router metrics of a log interval call for, if any."""
        if not metrics or "load_imbalance_masked" not in metrics:
            return None
        imbalance, by_layer = metrics["load_imbalance_masked"], metrics["by_layer"]["load_imbalance_masked"]
        if (imbalance > self._threshold) == self._reported:  # nothing new
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if self._in_a_row < PATIENCE:
            return None
        self._in_a_row, self._reported = 0, not self._reported
        if not self._reported:
            return None
        worst = max(range(len(by_layer)), key=by_layer.__getitem__)
        share = CROWDED / self._threshold
        return (
            f"warning: the busiest expert serves {imbalance * share:.0%} of the masked tokens (mean over layers; "
            f"{by_layer[worst] * share:.0%} in layer {worst + 1}), for {PATIENCE} log intervals: "
            f"{imbalance:.1f} times an even share; balance the routers (--moe-router-load-balancing-type, or a "
            "larger --moe-aux-loss-coeff), or place the experts by their loads: docs/monitoring.md"
        )
