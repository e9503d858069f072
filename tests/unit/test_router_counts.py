"""Loads, entropies and dropped tokens of a router whose choices are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.training.router_metrics import RouterCounts

MASK = 9


class Model(nn.Module):
    expert_orders = None
    config = SimpleNamespace(num_layers=1, num_moe_experts=4, moe_router_topk=2, sequence_parallel=False)


def test_dropped_and_overflow() -> None:
    process_groups.initialize(build({}).parallel)
    try:
        counts = RouterCounts([Model()], MASK)  # type: ignore[list-item]
        # Four tokens, the first and the third masked; one of eight choices is dropped.
        tokens_bs = torch.tensor([[MASK, 5, MASK, 6]])
        chosen_NE = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0]])
        logits_NE = torch.tensor([[0.0, 0, 0, 0], [50.0, 0, 0, 0], [0.0, 0, 0, 0], [3.0, 3, -50, -50]])
        router = SimpleNamespace(gating=lambda hidden: logits_NE, layer_number=1)
        with counts.counting():
            counts._see_tokens(tokens_bs)
            counts._see_choices(router, (None,), (logits_NE, chosen_NE))  # type: ignore[arg-type]
        values = counts.read()
    finally:
        process_groups.finalize()
    assert values["dropped_token_frac"] == pytest.approx(1 / 8)
    # Expert 0 serves four where an even share is two.
    assert values["over_mean_load_frac"] == pytest.approx(2 / 8)
    assert values["load_imbalance_masked"] == pytest.approx(4 * 2 / 3) and values[
        "load_imbalance_unmasked"
    ] == pytest.approx(4 * 2 / 4)
    assert values["entropy_masked"] == pytest.approx(math.log(4))
    assert values["entropy_unmasked"] == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert values["load_tv_distance"] == pytest.approx((abs(2 / 3 - 1 / 2) + 1 / 3 + 1 / 4 + 1 / 4) / 2)
