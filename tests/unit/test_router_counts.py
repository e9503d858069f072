"""Loads, entropies and dropped tokens of a router whose choices are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_a2d.config.balancing_config import BalancingConfig
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.model.load_balancing import LoadBalancing
from megatron_a2d.training.router_metrics import RouterCounts

MASK = 9


CONFIG: Any = SimpleNamespace(num_layers=1, num_moe_experts=4, moe_router_topk=2, sequence_parallel=False)


def test_dropped_and_overflow() -> None:
    process_groups.initialize(build({}).parallel)
    try:
        routing = LoadBalancing(BalancingConfig(), CONFIG, MASK)
        balancing: Any = SimpleNamespace(routing=routing, is_observed=False)
        counts = RouterCounts(balancing, expert_orders=None)
        # Four tokens, the first and the third masked; one of eight choices is dropped.
        tokens_bs = torch.tensor([[MASK, 5, MASK, 6]])
        chosen_TE = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
        served_TE = chosen_TE & torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]]).bool()
        logits_TE = torch.tensor([[0.0, 0, 0, 0], [50.0, 0, 0, 0], [0.0, 0, 0, 0], [3.0, 3, -50, -50]])
        with counts.counting(), routing.training(torch.ones(())):
            assert balancing.is_observed
            routing.see_tokens(tokens_bs)
            assert routing.see_choices(0, logits_TE[:, None], chosen_TE, served_TE) is None, "nothing is balanced"
        values = counts.read()
        assert not balancing.is_observed
    finally:
        process_groups.finalize()
    assert values["dropped_token_frac"] == pytest.approx(1 / 8)
    # Expert 0 is chosen by four where an even share is two.
    assert values["over_mean_load_frac"] == pytest.approx(2 / 8)
    assert values["load_imbalance_masked"] == pytest.approx(4 * 2 / 4) and values[
        "load_imbalance_unmasked"
    ] == pytest.approx(4 * 2 / 4)
    assert values["entropy_masked"] == pytest.approx(math.log(4))
    assert values["entropy_unmasked"] == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert values["load_tv_distance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 2)
