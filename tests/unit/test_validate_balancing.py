"""Settings of load balancing that do not go together: one line each, which names the flag and the remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from tests.unit.test_training import QWEN3_8B, QWEN3_30B_A3B

AUX = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1e-3}
BIAS = {"moe_router_enable_expert_bias": True}
GRAPHS = {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": ("attn", "moe_router"), "bf16": True}


def problems(settings: dict[str, Any], model: Any = QWEN3_30B_A3B) -> list[str]:
    return find_problems(build(settings), replace(model, mask_token_id=151669), 1)


@pytest.mark.parametrize(
    "settings",
    [
        {**AUX, "moe_aux_loss_tokens": "by_kind", "moe_aux_loss_loads": "current", "moe_z_loss_coeff": 1e-3},
        {**BIAS, "moe_router_bias_update_rate": 1e-2, "moe_z_loss_coeff": 1e-3},
        {**AUX, "moe_router_load_balancing_type": "seq_aux_loss", "objective": "ar"},
        {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        {**AUX, **GRAPHS, "cuda_graph_scope": ("attn",)},
    ],
)
def test_what_goes_together(settings: dict[str, Any]) -> None:
    assert problems(settings) == []


@pytest.mark.parametrize(
    ("settings", "flag", "text"),
    [
        ({"moe_aux_loss_coeff": 1e-3}, "--moe-aux-loss-coeff 0.001", "without --moe-router-load-balancing-type"),
        ({"moe_router_load_balancing_type": "aux_loss"}, "--moe-router-load-balancing-type aux_loss", "without --moe-aux-loss-coeff"),
        ({**AUX, "moe_aux_loss_coeff": -1.0}, "--moe-aux-loss-coeff -1.0", "negative"),
        ({"moe_z_loss_coeff": -0.1}, "--moe-z-loss-coeff -0.1", "negative"),
        ({"moe_z_loss_coeff": float("nan")}, "--moe-z-loss-coeff nan", "finite"),
        ({**BIAS, "moe_router_bias_update_rate": 0.0}, "--moe-router-bias-update-rate 0.0", "positive"),
        ({"moe_router_bias_update_rate": 0.1}, "--moe-router-bias-update-rate 0.1", "without --moe-router-enable-expert-bias"),
        ({"moe_aux_loss_tokens": "by_kind"}, "--moe-aux-loss-tokens by_kind", "without --moe-router-load-balancing-type"),
        ({**AUX, "moe_aux_loss_tokens": "unmasked", "objective": "ar"}, "--moe-aux-loss-tokens unmasked", "--objective ar"),
        ({**AUX, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_loads": "current"}, "--moe-aux-loss-loads current", "global_aux_loss"),
        ({**AUX, **BIAS}, "--moe-router-enable-expert-bias", "one of the two"),
        ({**BIAS, "moe_router_fusion": True}, "--moe-router-enable-expert-bias", "--moe-router-fusion"),
        ({"moe_expert_capacity_factor": 0.0}, "--moe-expert-capacity-factor 0.0", "positive"),
        ({"moe_expert_capacity_factor": 0.9, "moe_pad_expert_input_to_capacity": True}, "--moe-expert-capacity-factor 0.9", "at least 1"),
        ({"moe_pad_expert_input_to_capacity": True}, "--moe-pad-expert-input-to-capacity", "without --moe-expert-capacity-factor"),
        ({"moe_token_drop_policy": "position"}, "--moe-token-drop-policy position", "without --moe-expert-capacity-factor"),
        ({"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True, "moe_token_dispatcher_type": "allgather"}, "--moe-pad-expert-input-to-capacity", "use alltoall"),
        ({**AUX, "moe_router_force_load_balancing": True}, "--moe-router-load-balancing-type global_aux_loss", "--moe-router-force-load-balancing"),
        ({"moe_z_loss_coeff": 0.1, **GRAPHS}, "--moe-z-loss-coeff 0.1", "--cuda-graph-scope"),
    ],
)  # fmt: skip
def test_one_clear_line(settings: dict[str, Any], flag: str, text: str) -> None:
    (line,) = problems(settings)
    assert line.startswith(f"{flag}: ") and text in line and "\n" not in line


@pytest.mark.parametrize("settings", [AUX, {"moe_z_loss_coeff": 0.1}, BIAS, {"moe_expert_capacity_factor": 2.0}])
def test_a_dense_model_has_no_experts(settings: dict[str, Any]) -> None:
    lines = problems(settings, QWEN3_8B)
    assert len(lines) == len(settings) and all("the model is dense" in line for line in lines)
