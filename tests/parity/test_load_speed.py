"""A start of four processes reads the checkpoint once, whatever the layout: bytes counted by the operating system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.conversion.random_weights import write_synthetic
from megatron_a2d.families.qwen3 import hub_config
from tests.parity.pool import Pool

# Large enough that .metadata and the archives' frames are small compared with the values.
SHAPE: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=512, num_hidden_layers=4, head_dim=64, num_attention_heads=8, num_key_value_heads=4,
    mask_token_id=4095, eos_token_id=0, bos_token_id=0,
)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": hub_config("8B", **SHAPE, intermediate_size=2048),
    "dense_tied": hub_config("0.6B", **SHAPE, intermediate_size=2048),
    "moe": hub_config("30B-A3B", **SHAPE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512),
}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("dense", {"tensor_model_parallel_size": 4}),
    ("dense", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    ("dense_tied", {"pipeline_model_parallel_size": 4}),
    ("dense_tied", {"tensor_model_parallel_size": 2}),
    ("moe", {"expert_model_parallel_size": 4}),
    ("moe", {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}),
    (
        "moe",
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_tensor_parallel_size": 2,
            "moe_token_dispatcher_type": "allgather",
        },
    ),
    ("moe", {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("load_speed")
    for kind, config in MODELS.items():
        write_synthetic(root / f"{kind}_hf", config)
        convert(root / f"{kind}_hf", root / kind, verify=False)
    return {kind: root / kind for kind in MODELS}


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS)
def test_a_start_reads_the_checkpoint_once(
    kind: str, layout: dict[str, Any], checkpoints: dict[str, Path], pool: Pool
) -> None:
    size = sum(path.stat().st_size for path in (checkpoints[kind] / "release").rglob("*") if path.is_file())
    results = pool.run("bytes_of_a_start", 4, checkpoint=str(checkpoints[kind]), settings=layout)
    read = sum(result["read"] for result in results)
    assert 0.95 * size < read <= 1.2 * size, f"{read / size:.2f} times the checkpoint"
    # Every rank must hold what the plain load of megatron.core gives it; that one reads more.
    assert all(result["same"] for result in results)


def test_the_plain_load_would_fail_this(checkpoints: dict[str, Path], pool: Pool) -> None:
    """Control: the count sees what megatron.core's default load reads."""
    size = sum(path.stat().st_size for path in (checkpoints["dense"] / "release").rglob("*") if path.is_file())
    results = pool.run("bytes_of_a_start", 4, checkpoint=str(checkpoints["dense"]), settings={})
    assert sum(result["plain_read"] for result in results) > 3 * size
