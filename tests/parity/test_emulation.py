"""FP8 and NVFP4 emulated on the local layers: the same numbers in every layout that a recipe's definition allows.

Sizes are such that no block of 128 is cut by tensor parallelism. One scale for a matrix (tensorwise, nvfp4) depends on
how tensor parallelism cuts it, so those are compared over pipeline stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.layouts import EP, PP, TP_SP
from tests.parity.pool import Pool

RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": {"fp8_recipe": "tensorwise"},
    "blockwise": {"fp8_recipe": "blockwise"},
    "mxfp8": {"fp8_recipe": "mxfp8"},
    "delayed": {"fp8_recipe": "delayed"},
    "nvfp4": {"fp4_recipe": "nvfp4"},
}


def steps(pool: Pool, ranks: int, job: dict[str, Any], more: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    settings = {**job["settings"], "lr": 1e-12, "min_lr": 0.0, **more}
    return pool.run(
        "train_steps", ranks, **{**job, "settings": settings}, num_steps=2, relative=True, in_fp32=True, **options
    )


@pytest.mark.parametrize(
    ("kind", "recipe", "layout"),
    [
        ("dense", "blockwise", TP_SP), ("dense", "mxfp8", TP_SP), ("dense", "delayed", TP_SP),
        ("dense", "tensorwise", PP), ("moe", "nvfp4", PP), ("moe", "mxfp8", {**TP_SP, **EP}), ("moe", "delayed", PP),
    ],
)  # fmt: skip
def test_layouts(
    kind: str, recipe: str, layout: dict[str, Any], wide: dict[str, Any], pool: Pool, tmp_path: Path
) -> None:
    """Two steps in fp32, the second with the first one's scales if they are delayed; control: without rounding.

    Layouts sum in another order, and a processor's kernels too, so a few values near a tie of the rounding fall to the
    other side, and what is computed of them follows; how many depends on the processor. The weights stay: Adam would
    move each by the sign of its gradient, of however little, and the second step would show that alone.
    """
    job, path = wide[kind], str(tmp_path / "reference.pt")
    (expected,) = steps(pool, 1, job, RECIPES[recipe], save_reference=path)
    *_, found = steps(pool, 2, job, {**RECIPES[recipe], **layout}, reference=path)
    (plain,) = steps(pool, 1, job, {**RECIPES[recipe], "fp8_recipe": "none", "fp4_recipe": "none"}, reference=path)
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
    assert found["losses"][1] == pytest.approx(expected["losses"][1], rel=1e-6 if recipe != "delayed" else 5e-4)
    assert found["gradient_distance"] < plain["gradient_distance"] / 10
    assert plain["gradient_distance"] > 0.1
