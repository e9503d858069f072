"""--fp8-param-gather, as far as a CPU goes: which way weights flow between file, model and optimizer, and what is saved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_a2d.checkpoint.state_dict import dequantise
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.config.settings import build
from megatron_a2d.distributed import process_groups
from megatron_a2d.training.initialization import build_train_state
from megatron_a2d.training.train_state import TrainState
from tests.tiny import hub_config


@pytest.fixture
def state() -> Iterator[TrainState]:
    """MoE in bf16 with the distributed optimizer: two optimizers, one of them the experts'."""
    config = build({"bf16": True, "use_distributed_optimizer": True, "train_iters": 10})
    process_groups.initialize(config.parallel)
    yield build_train_state(model_config_from_hf(hub_config("moe"), "moe"), config)
    process_groups.finalize()


def test_main_weights_are_what_was_read(state: TrainState) -> None:
    """The model's weights are coarse, as FP8's are; the main weights are not made of them. Made of the main weights, the
    model's are what was read, to bf16's precision."""
    generator = torch.Generator().manual_seed(0)
    read = {name: torch.randn(p.shape, generator=generator) for name, p in state.models[0].named_parameters()}
    with torch.no_grad():
        for name, parameter in state.models[0].named_parameters():
            parameter.copy_(read[name].round())
    state.take_main_weights({"model": read})
    state.restore_weights()
    for name, parameter in state.models[0].named_parameters():
        assert torch.equal(parameter, read[name].bfloat16()), name
    state.optimizer.reload_model_params()
    state.restore_weights()
    assert all(torch.equal(p, read[n].bfloat16()) for n, p in state.models[0].named_parameters())


def test_ordinary_loading_would_keep_the_coarse_ones(state: TrainState) -> None:
    """Control: the main weights made of the model's."""
    parameter = next(state.models[0].parameters())
    with torch.no_grad():
        parameter.fill_(0.5)
    state.optimizer.reload_model_params()
    with torch.no_grad():
        parameter.fill_(2.0)
    state.restore_weights()
    assert (parameter == 0.5).all()


def test_a_checkpoint_holds_what_fp8_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Quantised(torch.Tensor):
        """Stands for Transformer Engine's tensors: an integer and a scale."""

        def dequantize(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor) * 0.25

    monkeypatch.setattr(fp8_utils, "is_float8tensor", lambda tensor: isinstance(tensor, Quantised))
    monkeypatch.setattr(fp8_utils, "is_te_min_version", lambda *_: True)
    weight = torch.tensor([1.0, -3.0, 7.0], dtype=torch.bfloat16)
    state: dict[str, Any] = {
        "fp8": ShardedTensor.from_rank_offsets("a.weight", weight.clone().as_subclass(Quantised)),
        "bf16": ShardedTensor.from_rank_offsets("b.weight", weight),
    }
    dequantise(state)
    assert not isinstance(state["fp8"].data, Quantised) and state["fp8"].data.dtype == torch.bfloat16
    assert state["fp8"].data.tolist() == [0.25, -0.75, 1.75] and torch.equal(state["bf16"].data, weight)
