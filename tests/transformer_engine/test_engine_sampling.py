"""Block diffusion sampled with Transformer Engine's layers: the text of the local layers, with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cases import Case, as_trained
from tests.parity.pool import Pool
from tests.transformer_engine.engine_pool import EnginePool

BLOCK = 6
ROWS = [[5, 7, *[-1] * 17], [100, 101, 102, 103, 104, 105, *[-1] * 5]]
TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("kind", "ranks", "layout", "sampler"),
    [("dense", 2, TP_SP, "rnd1"), ("moe", 1, {}, "self_speculative")],
)
def test_the_text_of_the_local_layers(
    kind: str,
    ranks: int,
    layout: dict[str, Any],
    sampler: str,
    cases: dict[str, Case],
    pool: Pool,
    engine_pool: EnginePool,
    tmp_path: Path,
) -> None:
    settings = {"objective": "block", "block_length": BLOCK, "ar_loss_weight": 0.5}
    run = as_trained(cases[kind].checkpoint, tmp_path / "run", settings)
    options = {"sampler": sampler, "num_steps": 16, "block_length": BLOCK, "aligned_blocks": True, "temperature": 1.0}
    (expected,) = pool.run("sample", 1, checkpoint=str(run), layout={}, rows=ROWS, options={**options, "cache": "none"})
    for cache in ("prefix", "none"):
        job = {"checkpoint": str(run), "rows": ROWS, "options": {**options, "cache": cache}}
        found = engine_pool.run("sample", ranks, layout={**layout, "transformer_impl": "transformer_engine"}, **job)
        assert [result["tokens"] for result in found] == [expected["tokens"]] * ranks, cache
        assert engine_pool.calls
