"""The bidirectional formula against torch's own count of what one forward and backward pass computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.model.flops import train_flops_per_token
from tests.tiny import hf_model, hub_config

LENGTH, BATCH = 48, 2


def counted(kind: str, **overrides: Any) -> float:
    """Operations a token of transformers' model, every matrix product and attention of it."""
    model = hf_model(kind, **overrides).train()
    model.set_attn_implementation("eager")  # products that the counter sees one by one
    model.config._experts_implementation = "eager"
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 200, (BATCH, LENGTH)), attention_mask=mask, use_cache=False).logits.sum().backward()
    return counter.get_total_flops() / (BATCH * LENGTH)


@pytest.mark.parametrize("kind", ["dense", "dense_tied", "moe"])
def test_formula_is_what_torch_counts(kind: str) -> None:
    """The first layer's input has a gradient too (the embedding is learnt), so backward is twice forward throughout."""
    model_config = model_config_from_hf(hub_config(kind), kind)
    expected = train_flops_per_token(model_config, LENGTH)
    assert counted(kind) == pytest.approx(expected, rel=2e-3)
    assert counted(kind) != pytest.approx(train_flops_per_token(model_config, LENGTH, causal=True), rel=2e-3)
