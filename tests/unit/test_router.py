"""The router: what a bias changes and what not, how it is updated and annealed, and which choices a capacity drops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor, nn

from megatron_a2d import megatron_compat
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.model.router import Router
from megatron_a2d.training.balancing import RunBalancing

EXPERTS, TOP_K, MASK = 6, 2, 9


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    megatron_compat.install()
    process_groups.initialize(build({}).parallel)
    yield
    process_groups.finalize()


class Model(nn.Module):
    def __init__(self, **fields: Any):
        super().__init__()
        self.config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=EXPERTS, moe_router_topk=TOP_K,
            moe_router_load_balancing_type="none", moe_ffn_hidden_size=8, use_cpu_initialization=True,
            add_bias_linear=False, **fields,
        )  # fmt: skip
        self.router = Router(self.config, get_default_pg_collection())
        self.router.layer_number = 1


def some_logits(length: int = 7, samples: int = 3) -> Tensor:
    return torch.randn(length, samples, EXPERTS, generator=torch.Generator().manual_seed(0), requires_grad=True)


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_a_bias_only_selects(pre_softmax: bool) -> None:
    router, logits = Model(moe_router_pre_softmax=pre_softmax).router, some_logits()
    weights, chosen = router.routing(logits)
    router.add_expert_bias()
    for found, expected in zip(router.routing(logits), (weights, chosen), strict=True):
        assert torch.equal(found, expected), "a bias of zero changes nothing"
    assert router.expert_bias is not None
    router.expert_bias[3] = 2.0  # above any probability
    weights, chosen = router.routing(logits)
    rows = logits.detach().view(-1, EXPERTS)
    others = rows.clone().index_fill_(1, torch.tensor([3]), -torch.inf).argmax(-1)
    assert chosen[:, 3].all() and (chosen.sum(-1) == TOP_K).all() and chosen[torch.arange(len(rows)), others].all()
    probabilities = rows.softmax(-1) * chosen
    expected = probabilities if pre_softmax else probabilities / probabilities.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.detach(), expected)
    weights.square().sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


def test_updates_and_annealing_of_a_bias() -> None:
    """A step of the rate against the sign of the load, and equal steps to zero over the last tenth of the run."""
    model: Any = Model()
    settings = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.5, "train_iters": 40}
    model.router.add_expert_bias()
    balancing = RunBalancing([model], build(settings), MASK)
    balancing.routing.choices[0] = torch.tensor([[9, 2, 0, 1, 1, 2], [0, 1, 3, 2, 2, 1]])  # sums 9 3 3 3 3 3, mean 4
    assert balancing.end_step(has_updated=False) is not None and not model.router.expert_bias.any()
    balancing.end_step(has_updated=True)
    assert model.router.expert_bias.tolist() == [-0.5, *[0.5] * 5]
    for iteration in range(30, 41):
        balancing.anneal(iteration)
        assert model.router.expert_bias[0].item() == pytest.approx(-0.5 * min(1, (40 - iteration) / 4), abs=1e-7)
    assert not model.router.expert_bias.any(), "exactly zero"


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_choices_beyond_the_capacity_are_dropped_and_counted(policy: str) -> None:
    capacity = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": policy}
    model: Any = Model(**capacity)
    balancing, logits = RunBalancing([model], build(capacity), MASK), some_logits(length=8)
    tokens_bs = torch.tensor([[MASK, 1] * 4] * 3)
    with balancing.routing.training(torch.ones(())):
        balancing.routing.see_tokens(tokens_bs)
        weights, served = model.router.routing(logits)
    routing = balancing.routing
    wanted = torch.zeros(24, EXPERTS).scatter(1, logits.view(-1, EXPERTS).topk(TOP_K).indices, 1).bool()
    masked = (tokens_bs.T == MASK).reshape(-1)
    dropped = wanted & ~served
    limit = 4  # half of 24 tokens x 2 choices / 6 experts
    assert torch.equal(served.sum(0), wanted.sum(0).clamp(max=limit)) and dropped.any() and not weights[dropped].any()
    assert torch.equal(routing.choices[0], torch.stack([wanted[~masked].sum(0), wanted[masked].sum(0)]))
    assert routing.num_dropped[0].tolist() == [int(dropped[~masked].sum()), int(dropped[masked].sum())]
    losses = balancing.end_step(has_updated=True)
    assert losses is not None and float(losses.dropped_frac) == pytest.approx(float(dropped.sum() / wanted.sum()))


def test_damaged_loads_are_refused() -> None:
    model: Any = Model()
    balancing = RunBalancing([model], build({}), MASK)
    loads = torch.arange(2 * EXPERTS).view(1, 2, EXPERTS).tolist()
    balancing.load_state(loads)
    assert balancing.state() == loads
    for damaged in (loads[0], [[[1], [1, 2]]], loads * 2):
        with pytest.raises(ValueError):
            balancing.load_state(damaged)
