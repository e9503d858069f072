"""The layers of Transformer Engine, built on a CPU where the package can be imported: what they keep in a checkpoint.

A CPU shows names, shapes and places of every weight. It cannot run the layers: what they compute, in bf16 and FP8, is
left to tests/gpu.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_a2d.architecture import architecture_from_config
from megatron_a2d.config import build
from megatron_a2d.model import transformer_config
from megatron_a2d.runtime.model_state import state_to_load, state_to_save
from megatron_a2d.training import parallel, setup
from tests.tiny import KINDS, hub_config

try:
    import transformer_engine.pytorch  # noqa: F401
except (ImportError, OSError):
    pytest.skip("transformer_engine cannot be imported here", allow_module_level=True)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_same_checkpoint(kind: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build({"bf16": True, "moe_grouped_gemm": grouped})
    parallel.initialize(config.parallel)
    architecture = architecture_from_config(hub_config(kind), kind)
    seen = []
    for implementation in ("portable", "transformer_engine"):
        for module in (setup, transformer_config):
            monkeypatch.setattr(module, "choose_implementation", lambda _, chosen=implementation: chosen)
        with monkeypatch.context() as pretended:
            if implementation == "transformer_engine":  # its modules ask for a GPU when they are made
                pretended.setattr(torch.cuda, "is_available", lambda: True)
                pretended.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
            model = setup.build_model(architecture, config)
        names = {type(module).__name__ for module in model.modules()}
        assert ("TELayerNormColumnParallelLinear" in names) == (implementation == "transformer_engine")
        metadata = {"dp_cp_group": torch.distributed.group.WORLD}
        saved, wanted = state_to_save(model, metadata), state_to_load(model, metadata)
        seen.append(
            (places(saved), places(wanted), sorted(v.unique_key for v in saved.values() if hasattr(v, "unique_key")))
        )
    assert seen[0] == seen[1] and len(seen[0][0]) > 8


def places(state: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Global shape of every tensor, and how many of its elements are here."""
    apply_factories(state)
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            here = found.get(shard.key, ((), 0))[1] + shard.data.numel()
            found[shard.key] = tuple(shard.global_shape), here
    return found
