"""The layouts that are compared with one process, and that checkpoints are carried between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest


class Layout(NamedTuple):
    """A case of tests/cases.py, and how it is laid out over processes."""

    case: str
    name: str
    ranks: int
    settings: dict[str, Any]

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its own part of the gradients."""
        return bool(self.settings.get("use_distributed_optimizer"))

    def __str__(self) -> str:
        return f"{self.case}: {self.name}"


TP = {"tensor_model_parallel_size": 2}
TP_SP = {**TP, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
CP = {"context_parallel_size": 2}
VPP = {**PP, "num_virtual_stages_per_pipeline_rank": 2}
ETP = {"expert_tensor_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
ISOLATED = {"reset_attention_mask": True}

LAYOUTS = [
    Layout("dense", "DP2", 2, {}),
    Layout("dense", "TP2", 2, TP),
    Layout("dense", "TP2+SP", 2, TP_SP),
    Layout("dense", "PP2", 2, PP),
    Layout("dense", "DP2, distributed optimizer", 2, DISTRIBUTED),
    Layout("dense", "TP2+SP x PP2", 4, {**TP_SP, **PP}),
    Layout("dense_tied", "TP2+SP", 2, TP_SP),
    Layout("dense_tied", "PP2", 2, PP),
    Layout("dense_tied", "PP2 x DP2, distributed optimizer", 4, {**PP, **DISTRIBUTED}),
    Layout("moe", "micro-batches of 4", 1, {"micro_batch_size": 4}),
    Layout("moe", "DP2", 2, {}),
    Layout("moe", "DP4, distributed optimizer", 4, DISTRIBUTED),
    Layout("moe", "EP2", 2, EP),
    Layout("moe", "EP2, distributed optimizer", 2, {**EP, **DISTRIBUTED}),
    Layout("moe", "EP4, distributed optimizer", 4, {"expert_model_parallel_size": 4, **DISTRIBUTED}),
    Layout("moe", "TP2+SP, EP1", 2, TP_SP),
    Layout("moe", "TP2+SP, EP2", 2, {**TP_SP, **EP}),
    Layout("moe", "TP2+SP x DP2, EP2, distributed optimizer", 4, {**TP_SP, **EP, **DISTRIBUTED}),
    Layout("moe", "TP2+SP x DP2, EP4", 4, {**TP_SP, "expert_model_parallel_size": 4}),
    Layout("moe", "PP2", 2, PP),
    Layout("moe", "PP2, EP2", 4, {**PP, **EP}),
    Layout("moe", "PP2 x TP2+SP, EP2, distributed optimizer", 4, {**PP, **TP_SP, **EP, **DISTRIBUTED}),
    Layout("dense", "CP2", 2, CP),
    Layout("dense", "CP4, distributed optimizer", 4, {"context_parallel_size": 4, **DISTRIBUTED}),
    Layout("dense_tied", "CP2 x TP2+SP", 4, {**CP, **TP_SP}),
    Layout("dense", "VPP2", 2, VPP),
    Layout("dense_tied", "VPP2 x DP2, distributed optimizer", 4, {**VPP, **DISTRIBUTED}),
    Layout("dense", "PP4", 4, {"pipeline_model_parallel_size": 4}),
    Layout("moe", "CP2, EP2", 2, {**CP, **EP}),
    Layout("moe", "CP2 x TP2+SP, EP4", 4, {**CP, **TP_SP, "expert_model_parallel_size": 4}),
    Layout("moe", "CP2 x PP2, EP2, distributed optimizer", 4, {**CP, **PP, **EP, **DISTRIBUTED}),
    Layout("moe", "VPP2 x DP2, EP2, distributed optimizer", 4, {**VPP, **EP, **DISTRIBUTED}),
    Layout("moe", "VPP2 x TP2+SP, EP2", 4, {**VPP, **TP_SP, **EP}),
    Layout("moe", "TP2+SP, ETP2", 2, {**TP_SP, **ETP}),
    Layout("moe", "TP2+SP x DP2, EP2, ETP2", 4, {**TP_SP, **EP, **ETP}),
    Layout("moe", "DP2, ETP2", 2, ETP),
    Layout("moe", "EP2, allgather dispatcher", 2, {**EP, **ALLGATHER}),
    Layout("moe", "TP2+SP, EP2, allgather dispatcher", 2, {**TP_SP, **EP, **ALLGATHER}),
    Layout("moe", "DP2, overlap", 2, OVERLAP),
    Layout("moe", "DP4, EP2, overlap", 4, {**EP, **OVERLAP}),
    Layout("moe", "VPP2 x DP2, overlap", 4, {**VPP, **OVERLAP}),
    Layout("dense", "DP2, overlap of the gradient reduction", 2, {"overlap_grad_reduce": True}),
    Layout("isolated", "DP2", 2, {}),
    Layout("isolated", "TP2+SP, EP2", 2, {**TP_SP, **EP}),
    Layout("isolated", "CP2, EP2", 2, {**CP, **EP}),
    Layout("isolated", "PP2 x CP2", 4, {**PP, **CP}),
    Layout("ar", "TP2+SP, EP2", 2, {**TP_SP, **EP}),
    Layout("ar", "CP2", 2, CP),
    Layout("ar", "PP2 x DP2, distributed optimizer", 4, {**PP, **DISTRIBUTED}),
    Layout("annealing", "CP2 x TP2+SP, EP4", 4, {**CP, **TP_SP, "expert_model_parallel_size": 4}),
    Layout("annealing", "PP2 x CP2, micro-batches of 2", 4, {**PP, **CP, "micro_batch_size": 2}),
    Layout("random", "CP2 x TP2+SP, EP2, ETP2", 4, {**CP, **TP_SP, **EP, **ETP}),
    Layout("random", "VPP2 x TP2+SP, EP2", 4, {**VPP, **TP_SP, **EP}),
    Layout("cart", "CP2 x PP2, EP2, distributed optimizer", 4, {**CP, **PP, **EP, **DISTRIBUTED}),
    Layout("cart", "TP2+SP, EP2", 2, {**TP_SP, **EP}),
    Layout("uniform", "CP2, EP2", 2, {**CP, **EP}),
    Layout("grafting", "PP2 x TP2+SP, EP2, distributed optimizer", 4, {**PP, **TP_SP, **EP, **DISTRIBUTED}),
    Layout("grafting", "CP2 x PP2, EP2", 4, {**CP, **PP, **EP}),
    Layout("grafting", "VPP2 x DP2, overlap", 4, {**VPP, **OVERLAP}),
    Layout("block", "CP2 x TP2+SP, EP4", 4, {**CP, **TP_SP, "expert_model_parallel_size": 4}),
    Layout("block", "PP2 x CP2, micro-batches of 2", 4, {**PP, **CP, "micro_batch_size": 2}),
    Layout("block + ar", "CP4, distributed optimizer", 4, {"context_parallel_size": 4, **DISTRIBUTED}),
    Layout("block + ar", "VPP2 x TP2+SP, EP2", 4, {**VPP, **TP_SP, **EP}),
    Layout("served blocks", "CP2, EP2, micro-batches of 2", 2, {**CP, **EP, "micro_batch_size": 2}),
    Layout("served blocks", "PP2 x TP2+SP, EP2, distributed optimizer", 4, {**PP, **TP_SP, **EP, **DISTRIBUTED}),
    Layout("frozen", "PP2 x TP2+SP, EP2, distributed optimizer", 4, {**PP, **TP_SP, **EP, **DISTRIBUTED}),
    Layout("frozen", "CP2 x DP2, EP2, overlap", 4, {**CP, **EP, **OVERLAP}),
]


# One of each kind, for `make test`; `make test-parity` takes all.
QUICK = {
    "dense: DP2", "dense: TP2+SP", "dense: TP2+SP x PP2", "dense_tied: PP2 x DP2, distributed optimizer",
    "dense: CP4, distributed optimizer", "dense: VPP2", "moe: TP2+SP, EP1", "moe: TP2+SP x DP2, EP2, ETP2",
    "moe: PP2 x TP2+SP, EP2, distributed optimizer", "moe: CP2 x TP2+SP, EP4", "moe: DP4, EP2, overlap",
    "moe: TP2+SP, EP2, allgather dispatcher", "isolated: CP2, EP2", "ar: TP2+SP, EP2",
    "annealing: CP2 x TP2+SP, EP4", "random: CP2 x TP2+SP, EP2, ETP2",
    "grafting: PP2 x TP2+SP, EP2, distributed optimizer", "block + ar: CP4, distributed optimizer", "frozen: PP2 x TP2+SP, EP2, distributed optimizer",
}  # fmt: skip


def each(layouts: Iterable[Layout], quick: Callable[[Layout], bool] = lambda layout: str(layout) in QUICK) -> Any:
    """Parametrise a test with `layout`; those that are not `quick` are left to `make test-parity`."""
    cases = [
        pytest.param(layout, id=str(layout), marks=() if quick(layout) else pytest.mark.full) for layout in layouts
    ]
    return pytest.mark.parametrize("layout", cases)
