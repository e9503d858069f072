"""The portable MoE layer in one process against megatron.core's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import nn

from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.model.token_rows import copied, rows_of, summed
from megatron_a2d.training.initialization import build_model
from tests.tiny import hub_config

SAMPLES, LENGTH = 2, 6
CHOSEN = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0]]).bool()  # the second token has no rows


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_their_sums(dtype: torch.dtype) -> None:
    """Row r of column e is a token that chose e, in the order of tokens; gradients are the other's values."""
    rows = rows_of(CHOSEN)
    assert rows.token.tolist() == [0, 3, 2, 0, 2]
    tokens, values = random(4, 8).to(dtype).requires_grad_(), random(5, 8, seed=1).to(dtype).requires_grad_()
    out, total = copied(tokens, rows), summed(values, rows)
    assert torch.equal(out, tokens[rows.token])
    expected = torch.stack([values[[0, 3]].sum(0), torch.zeros(8, dtype=dtype), values[[2, 4]].sum(0), values[1]])
    same = (
        {"rtol": 0.0, "atol": 0.0} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.0}
    )  # rounded once or twice
    assert total.dtype == dtype
    torch.testing.assert_close(total, expected, **same)
    out.backward(values.detach())
    total.backward(tokens.detach())
    torch.testing.assert_close(tokens.grad, expected, **same)
    assert torch.equal(values.grad, tokens[rows.token])


def built(kind: str, **settings: Any) -> Iterator[DiffusionLM]:
    """A model with random weights in one process."""
    config = build(settings)
    process_groups.initialize(config.parallel)
    model = build_model(model_config_from_hf(hub_config(kind, num_hidden_layers=2), kind), config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number) * 0.2)
    yield model
    process_groups.finalize()


def gradients(module: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    output.backward(random(*output.shape, seed=9))
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=2e-6 * float(value.abs().max()) if value.numel() else 0.0, msg=name
        )


@pytest.mark.parametrize("settings", [{}, {"moe_expert_capacity_factor": 0.5}], ids=["dropless", "dropping"])
def test_moe_layer_is_megatrons(settings: dict[str, Any]) -> None:
    for model in built("moe", **settings):
        layer, results = model.decoder.layers[0].mlp, []
        for forward in (type(layer).forward, MoELayer.forward):
            hidden = random(LENGTH, SAMPLES, 64).requires_grad_()
            output, bias = forward(layer, hidden)
            assert bias is None and output.shape == hidden.shape
            found = gradients(layer, output)
            results.append(found | {"output": output.detach(), "input": hidden.grad})
        assert_same(*results)
