"""Experts as one grouped product: the same layer, and the same checkpoint, as experts one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_a2d.checkpoint.state_dict import state_to_load, state_to_save
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.model.experts import GroupedExperts
from megatron_a2d.model.local_linear import LocalColumnParallelLinear, LocalRowParallelLinear
from megatron_a2d.model.swiglu import LocalMLP
from megatron_a2d.model.transformer_config import build_transformer_config

EXPERTS, HIDDEN, ROWS = 4, 32, 48
LAYER = [(0, 1, 3)]  # the second of three layers, as megatron prepends it


@pytest.fixture
def pair() -> Iterator[tuple[GroupedExperts, SequentialMLP]]:
    """The two modules, with the same weights."""
    settings = build({})
    process_groups.initialize(settings.parallel)
    model_config = ModelConfig(3, HIDDEN, 4, 2, 8, 64, 64, 64, 1e-6, 1e6, False, EXPERTS, 2, ROWS)
    config = build_transformer_config(model_config, settings)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    grouped, sequential = (
        GroupedExperts(EXPERTS, config, pg_collection=groups),
        SequentialMLP(EXPERTS, config, linears, pg_collection=groups),
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for number, expert in enumerate(sequential.local_experts):
            for weight, linear in ((grouped.weight1, expert.linear_fc1), (grouped.weight2, expert.linear_fc2)):
                linear.weight.copy_(torch.randn_like(linear.weight))
                weight[number] = linear.weight
    yield grouped, sequential
    process_groups.finalize()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Up to rounding, at 1e-6 of the largest element."""
    largest = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=1.3e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("counts", [[3, 5, 1, 7], [0, 16, 0, 0], [0, 0, 0, 0]])
def test_outputs_and_gradients(counts: list[int], pair: tuple[GroupedExperts, SequentialMLP]) -> None:
    grouped, sequential = pair
    results = []
    for module in pair:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randn(sum(counts), HIDDEN, generator=generator).requires_grad_()
        probs = torch.rand(sum(counts), generator=generator).requires_grad_()
        output, bias = module(tokens, torch.tensor(counts), probs)
        output.square().sum().backward()
        assert bias is None
        results.append((output, tokens.grad, probs.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)
    for weight, name in ((grouped.weight1, "linear_fc1"), (grouped.weight2, "linear_fc2")):
        expected = torch.stack([getattr(expert, name).weight.grad for expert in sequential.local_experts])
        assert_same(weight.grad, expected)


def test_an_activation_that_is_computed_again(pair: tuple[GroupedExperts, SequentialMLP]) -> None:
    """--recompute-modules moe_act: the same output and gradients, and the second product's input is not kept."""
    grouped, _ = pair

    def run(again: bool) -> tuple[list[Any], int]:
        grouped.recomputes_activation = again
        grouped.zero_grad()
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        tokens = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        probs = torch.linspace(0.1, 0.9, 16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output, _ = grouped(tokens, torch.tensor([3, 5, 1, 7]), probs)
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor.shape[-1] == ROWS)
        output.square().sum().backward()
        return [output.detach(), tokens.grad, probs.grad, grouped.weight1.grad, grouped.weight2.grad], held

    (plain, held), (recomputed, held_again) = run(False), run(True)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)
    assert held_again < held


def test_the_dense_layers_mlp_is_built_by_either_version(pair: tuple[GroupedExperts, SequentialMLP]) -> None:
    """megatron.core 0.16 passes no process groups to a class that it does not know, 0.19 those of a MoE layer."""
    config, linears = (
        pair[0].config,
        MLPSubmodules(linear_fc1=LocalColumnParallelLinear, linear_fc2=LocalRowParallelLinear),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for options in ({}, {"pg_collection": groups, "is_mtp_layer": False, "name": "mlp"}):
        mlp = LocalMLP(config, linears, **options)
        output, bias = mlp(torch.ones(5, 2, HIDDEN))
        assert bias is None
        inner = F.linear(torch.ones(5, 2, HIDDEN), mlp.linear_fc1.weight)
        gate, up = inner.chunk(2, dim=-1)
        assert_same(output, F.linear(F.silu(gate) * up, mlp.linear_fc2.weight))


def test_a_rank_without_tokens_in_bf16(pair: tuple[GroupedExperts, SequentialMLP]) -> None:
    """The router's probabilities are fp32; every weight still gets a gradient, of its own dtype."""
    grouped = pair[0].bfloat16()
    tokens = torch.zeros(0, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    output, _ = grouped(tokens, torch.zeros(EXPERTS, dtype=torch.long), torch.zeros(0))
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and output.shape == (0, HIDDEN)
    assert grouped.weight1.grad.dtype == grouped.weight2.grad.dtype == torch.bfloat16


def global_view(module: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a module's sharded state in its place in the whole one; nan where nothing is."""
    state = module.sharded_state_dict("mlp.experts.", LAYER, {"dp_cp_group": torch.distributed.group.WORLD})
    apply_factories(state)
    whole: dict[str, torch.Tensor] = {}
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            tensor = whole.setdefault(shard.key, torch.full(shard.global_shape, float("nan")))
            place = tensor[shard.global_slice()]
            place.copy_(shard.data.reshape(place.shape))
    return whole


def test_one_checkpoint_for_both(pair: tuple[GroupedExperts, SequentialMLP]) -> None:
    ours, theirs = map(global_view, pair)
    assert {key: tuple(tensor.shape) for key, tensor in ours.items()} == {
        "mlp.experts.experts.linear_fc1.weight": (3, EXPERTS, 2 * ROWS, HIDDEN),
        "mlp.experts.experts.linear_fc2.weight": (3, EXPERTS, HIDDEN, ROWS),
    }
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key].nan_to_num(9.0), theirs[key].nan_to_num(9.0)), key
        assert ours[key][1].isfinite().all() and ours[key][[0, 2]].isnan().all()


def test_extra_states_are_those_of_single_experts(pair: tuple[GroupedExperts, SequentialMLP]) -> None:
    metadata = {"dp_cp_group": torch.distributed.group.WORLD}
    names = [
        {v.unique_key for v in module.sharded_state_dict("mlp.experts.", LAYER, metadata).values() if isinstance(v, ShardedObject)}
        for module in pair
    ]  # fmt: skip
    assert names[0] == names[1] and len(names[0]) == 2 * EXPERTS


class WithExtraStates:
    """Stands for a model of Transformer Engine's modules: pickled bytes in norms and linear layers."""

    def sharded_state_dict(self, metadata: Any) -> dict[str, Any]:
        return {
            "weight": ShardedTensor.from_rank_offsets("decoder.layers.self_attention.linear_qkv.weight", torch.ones(2)),
            "linear": ShardedObject("decoder.layers.self_attention.linear_qkv._extra_state", b"pickle", (1,), (0,)),
            "norm": ShardedObject("decoder.final_layernorm._extra_state", b"pickle", (1,), (0,)),
        }


def test_extra_states_are_neither_kept_nor_read() -> None:
    saved = state_to_save(WithExtraStates(), {})
    assert set(saved) == {"weight", "linear"} and saved["linear"].data is None
    assert set(state_to_load(WithExtraStates(), {})) == {"weight"}
