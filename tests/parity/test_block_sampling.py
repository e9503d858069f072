"""Block diffusion sampled from a checkpoint on any layout, with the cache of finished blocks and without: one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import export_hf
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.inference.hf_model import load_hf_model
from tests.cases import Case, as_trained
from tests.parity.pool import Pool
from tests.tiny import MASK_TOKEN_ID

BLOCK = 6
# -1: a hole. Prompts that end within a block and at its end; N is a multiple of 2 in some passes only.
ROWS = [[5, 7, *[-1] * 17], [20, *[-1] * 6, 90, 91, *[-1] * 3], [100, 101, 102, 103, 104, 105, *[-1] * 5]]
CONTINUED = [ROWS[0], ROWS[2]]
OPTIONS: dict[str, Any] = {"num_steps": 16, "block_length": BLOCK, "aligned_blocks": True, "temperature": 1.0}
TP, PP, EP = ({f"{kind}_model_parallel_size": 2} for kind in ("tensor", "pipeline", "expert"))
SP = {"sequence_parallel": True}
LAYOUTS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("dense", 1, {}, {}),
    ("dense", 2, {**TP, **SP}, {"label_shift": False}),
    ("dense_tied", 2, PP, {"ar_loss_weight": 0.5}),
    ("moe", 2, EP, {"label_shift": False, "ar_loss_weight": 0.5}),
    ("moe", 4, {**TP, **SP, **EP, **PP}, {}),
]


@pytest.mark.parametrize(("kind", "ranks", "layout", "settings"), LAYOUTS)
def test_every_layout_caches_exactly(
    kind: str,
    ranks: int,
    layout: dict[str, Any],
    settings: dict[str, Any],
    cases: dict[str, Case],
    pool: Pool,
    tmp_path: Path,
) -> None:
    """The text of the export without a cache, on every rank; and far fewer positions are computed."""
    run = as_trained(
        cases[kind].checkpoint, tmp_path / "run", {"objective": "block", "block_length": BLOCK, **settings}
    )
    export_hf.main(["--checkpoint", str(run), "--out", str(tmp_path / "export"), "--format", "a2d", "--no-verify"])
    loaded = load_hf_model(tmp_path / "export")
    jobs = [(ROWS, OPTIONS), (CONTINUED, {**OPTIONS, "sampler": "self_speculative"})]
    for rows, options in jobs[: 1 + loaded.causal_context]:
        canvas = make_canvas([[MASK_TOKEN_ID if token < 0 else token for token in row] for row in rows], MASK_TOKEN_ID)
        alone = denoise(
            loaded.forward, canvas, MASK_TOKEN_ID, SamplingOptions(**options), label_shift=loaded.label_shift, seed=3
        )
        expected = {"tokens": alone.tokens.tolist(), "num_forwards": alone.num_forwards}
        for cache in ("prefix", "none"):
            job = {"checkpoint": str(run), "layout": layout, "rows": rows, "options": {**options, "cache": cache}}
            assert pool.run("sample", ranks, **job) == [expected] * ranks, (options, cache)


def test_ranks_with_a_broken_cache_are_noticed(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """The control: keys and values in the wrong columns give another text."""
    run = as_trained(cases["dense"].checkpoint, tmp_path / "run", {"objective": "block", "block_length": BLOCK})
    job = {"checkpoint": str(run), "layout": {}, "rows": ROWS, "options": {**OPTIONS, "cache": "prefix"}}
    right, broken = (pool.run("sample", 1, **job, breaks_cache=breaks)[0]["tokens"] for breaks in (False, True))
    assert right != broken
