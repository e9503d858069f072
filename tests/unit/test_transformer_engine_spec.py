"""The layers of Transformer Engine, built on a CPU where the package can be imported: what they keep in a checkpoint.

A CPU shows names, shapes and places of every weight. It cannot run the layers: what they compute, in bf16 and FP8, is
left to tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.enums import AttnMaskType

from megatron_a2d.checkpoint.state_dict import state_to_load, state_to_save
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.distributed import process_groups
from megatron_a2d.model import transformer_config
from megatron_a2d.training import initialization
from tests.tiny import KINDS, hub_config

try:
    import transformer_engine.pytorch  # noqa: F401
except (ImportError, OSError):
    pytest.skip("transformer_engine cannot be imported here", allow_module_level=True)


@pytest.fixture(autouse=True)
def leave_the_process_group() -> Iterator[None]:
    yield
    process_groups.finalize()


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "qwen2"])
def test_same_checkpoint(kind: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build({"bf16": True, "moe_grouped_gemm": grouped})
    process_groups.initialize(config.parallel)
    model_config = model_config_from_hf(hub_config(kind), kind)
    seen = []
    for implementation in ("local", "transformer_engine"):
        for module in (initialization, transformer_config):
            monkeypatch.setattr(module, "choose_implementation", lambda _, chosen=implementation: chosen)
        with monkeypatch.context() as pretended:
            if implementation == "transformer_engine":  # its modules ask for a GPU when they are made
                pretended.setattr(torch.cuda, "is_available", lambda: True)
                pretended.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
            model = initialization.build_model(model_config, config)
        masks = {layer.self_attention.attn_mask_type for layer in model.decoder.layers}
        assert masks == {AttnMaskType.no_mask}
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


FUSED: dict[str, Any] = dict(
    bf16=True, fp8_recipe="auto", first_last_layers_bf16=True, apply_rope_fusion=True, gradient_accumulation_fusion=True,
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, recompute_granularity="selective",
)  # fmt: skip
FUSED_EXPERTS: dict[str, Any] = dict(moe_permute_fusion=True, moe_router_fusion=True)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dense", {"recompute_modules": ("mlp", "layernorm")}),
        ("dense_tied", {"recompute_modules": ("core_attn",), "use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16"}),
        ("moe", {**FUSED_EXPERTS, "recompute_modules": ("moe_act",), "moe_router_force_load_balancing": True}),
        ("moe", {**FUSED_EXPERTS, "recompute_modules": ("moe",), "grad_reduce_in_fp32": False, "gradient_accumulation_fusion": False}),
    ],
)  # fmt: skip
def test_every_flag_builds(kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, buffers and optimizer, past all that megatron.core and Transformer Engine assert about the settings."""
    config = build({**FUSED, "seq_length": 64, **more})
    model_config = model_config_from_hf(hub_config(kind, mask_token_id=250, **SIZES[kind]), kind)
    assert not find_problems(config, model_config, 1)
    process_groups.initialize(config.parallel)
    for module in (initialization, transformer_config):
        monkeypatch.setattr(module, "choose_implementation", lambda _: "transformer_engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    state = initialization.build_train_state(model_config, config)
    model = state.models[0].config
    assert (model.fp8, model.fp8_recipe, model.apply_rope_fusion) == ("hybrid", "tensorwise", True)
    assert type(state.models[0].output_layer).__name__ == "OutputLayer"


# What FP8's kernels take: multiples of 32.
SIZES: dict[str, dict[str, Any]] = {
    kind: dict(
        hidden_size=128, head_dim=32, intermediate_size=256, **({"moe_intermediate_size": 64} if kind == "moe" else {})
    )
    for kind in KINDS
}
