"""What is computed with Transformer Engine's layers in fp32, and compared with the local layers of one process."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.cases import VARIANTS
from tests.parity.layouts import LAYOUTS, Layout

DENSE_FUSIONS = {"apply_rope_fusion": True, "gradient_accumulation_fusion": True}
FUSIONS = {**DENSE_FUSIONS, "moe_permute_fusion": True, "moe_router_fusion": True}
# Kernels of which a run with all fusions has called each.
FUSED_KERNELS = {"fused_rope_forward", "fused_rope_backward"}
FUSED_MOE_KERNELS = {
    *FUSED_KERNELS, "te_general_grouped_gemm", "permute_with_mask_map", "unpermute_with_mask_map",
    "fused_topk_with_score_function_fwd", "fused_topk_with_score_function_bwd",
}  # fmt: skip


class EngineCase(NamedTuple):
    """A layout with Transformer Engine's layers; `shared` are settings that the reference has too."""

    layout: Layout
    shared: dict[str, Any] = {}  # noqa: RUF012
    kernels: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return str(self.layout)


def is_dense(case: str) -> bool:
    return case.startswith("dense")


def fusions(case: str, micro_batch_size: int = 1) -> dict[str, Any]:
    """All that the case can have: each sample of block diffusion has positions of its own."""
    found = DENSE_FUSIONS if is_dense(case) else FUSIONS
    return found | {"apply_rope_fusion": False} if "block" in case and micro_batch_size > 1 else found


def fused_kernels(case: str, own: dict[str, Any]) -> frozenset[str]:
    found = FUSED_KERNELS if is_dense(case) else FUSED_MOE_KERNELS
    return frozenset(found if own["apply_rope_fusion"] else found - FUSED_KERNELS)


def variant_of(case: str) -> dict[str, Any]:
    """What a case sets besides its data (tests/conftest.py)."""
    return VARIANTS.get(case, {"isolated": {"reset_attention_mask": True}, "ar": {"objective": "ar"}}.get(case, {}))


def _fused_layouts() -> list[EngineCase]:
    """Every layout of the parity tests, with all fusions."""
    return [
        EngineCase(layout._replace(settings=own | layout.settings), {}, fused_kernels(layout.case, own))
        for layout in LAYOUTS
        for own in [fusions(layout.case, layout.settings.get("micro_batch_size", 1))]
    ]


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": modules}


BALANCED = {"moe_aux_loss_coeff": 0.1, "moe_aux_loss_tokens": "by_kind", "moe_z_loss_coeff": 0.01}
NOT_FUSED = "dense", "dense_tied", "moe", "ar", "isolated", "frozen", "cart", "block", "annealing", "grafting"
# On one process: name, what is set with Transformer Engine's layers, and what is set on both sides.
_ONE_PROCESS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    *((case, "no fusion", {}, {}) for case in NOT_FUSED),
    *((case, "all fusions", fusions(case), {}) for case in ("dense", "dense_tied", "moe", "isolated", "frozen")),
    *(("dense", name, {name: True}, {}) for name in DENSE_FUSIONS),
    *(("moe", name, {name: True}, {}) for name in ("moe_permute_fusion", "moe_router_fusion")),
    ("moe", "one expert at a time", {"moe_grouped_gemm": False}, {}),
    ("moe", "one expert at a time, fused", {**FUSIONS, "moe_grouped_gemm": False}, {}),
    ("isolated", "positions from 0 in each document", FUSIONS, {"reset_position_ids": True}),
    ("isolated", "positions from 0 in each document, no fusion", {}, {"reset_position_ids": True}),
    ("dense", "random lengths", DENSE_FUSIONS, {"random_length_prob": 0.5}),
    ("moe", "random lengths", FUSIONS, {"random_length_prob": 0.5}),
    ("dense", "recompute core_attn", {**DENSE_FUSIONS, **_selective("core_attn")}, {}),
    ("dense", "recompute mlp, layernorm", {**DENSE_FUSIONS, **_selective("mlp", "layernorm")}, {}),
    ("dense", "recompute full", {**DENSE_FUSIONS, "recompute_granularity": "full"}, {}),
    ("isolated", "recompute core_attn", {**FUSIONS, **_selective("core_attn")}, {}),
    ("moe", "recompute moe_act, layernorm", {**FUSIONS, **_selective("moe_act", "layernorm")}, {}),
    ("moe", "recompute moe", {**FUSIONS, **_selective("moe")}, {}),
    ("moe", "recompute full", {**FUSIONS, "recompute_granularity": "full"}, {}),
    (
        "moe",
        "balanced experts, recompute moe",
        {**FUSIONS, **_selective("moe")},
        {**BALANCED, "moe_router_load_balancing_type": "global_aux_loss"},
    ),
    (
        "isolated",
        "balanced experts, packed samples",
        FUSIONS,
        {**BALANCED, "moe_router_load_balancing_type": "seq_aux_loss"},
    ),
    ("dense", "micro-batches of 4", DENSE_FUSIONS, {"micro_batch_size": 4}),
    (
        "isolated",
        "micro-batches of 4, recompute core_attn",
        {**FUSIONS, **_selective("core_attn")},
        {"micro_batch_size": 4},
    ),
    ("moe", "positions from 0 in each document, not isolated", FUSIONS, {"reset_position_ids": True}),
    ("block", "recompute full", {**FUSIONS, "recompute_granularity": "full"}, {}),
    ("annealing", "one expert at a time", {**FUSIONS, "moe_grouped_gemm": False}, {}),
]

CASES = [
    *_fused_layouts(),
    *(EngineCase(Layout(case, name, 1, own), shared) for case, name, own, shared in _ONE_PROCESS),
]

QUICK = {
    "dense: TP2+SP", "dense_tied: PP2", "dense: CP2", "moe: DP2, overlap", "moe: TP2+SP, ETP2", "isolated: TP2+SP, EP2",
    "moe: no fusion", "ar: no fusion", "frozen: all fusions", "moe: recompute moe_act, layernorm",
    "moe: EP2, allgather dispatcher", "moe: balanced experts, recompute moe", "block + ar: VPP2 x TP2+SP, EP2",
    "grafting: no fusion",
}  # fmt: skip
