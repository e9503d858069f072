"""Every layout computes what one process computes.

Compared with a single process on the same global batch: the loss (relative), the gradient norm (relative), every
parameter's gradient where it is whole, and every parameter after the optimizer's steps (absolute; weights
are of the order 1, learning rate 1e-2). Tolerance 1e-6, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.exactness import Compared, Exactness
from tests.parity.layouts import CP, EP, LAYOUTS, PP, TP_SP, Layout, each
from tests.parity.pool import Pool

TOLERANCE = 1e-6


@pytest.fixture(scope="session")
def references(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process on each case: its losses and norms, and a file with its gradients and parameters; made when a test
    asks for it."""
    root = tmp_path_factory.mktemp("references")

    class References(dict[str, Any]):
        def __missing__(self, kind: str) -> dict[str, Any]:
            case, path = cases[kind], str(root / f"{kind}.pt")
            (result,) = pool.run(
                "train_steps", 1, checkpoint=case.checkpoint, settings=case.settings, num_steps=2, save_reference=path
            )
            self[kind] = {**result, "path": path}
            return self[kind]

    return References()


def compare(
    pool: Pool, case: Case, reference: dict[str, Any], ranks: int, settings: dict[str, Any], norm_by_distance: bool = False,
    **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Largest differences over the ranks of a layout.

    norm_by_distance: in the place of the norms' difference the norm of the gradients' difference, which is never smaller.
    """
    results = pool.run(
        "train_steps", ranks, checkpoint=case.checkpoint, settings={**case.settings, **settings}, num_steps=2,
        reference=reference["path"], **options,
    )  # fmt: skip

    def relative(name: str) -> float:
        pairs = [pair for result in results for pair in zip(result[name], reference[name], strict=True)]
        return max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)

    differences = {"loss": relative("losses"), "gradient norm": relative("grad_norms")}
    if norm_by_distance:
        differences["gradient norm"] = max(result["gradient_distance"] for result in results)
    whole = not settings.get("use_distributed_optimizer")
    for name in ("gradients", "parameters"):
        # Python's max() passes over what is not a number; and nothing compared is no agreement.
        values = torch.tensor([result[name] for result in results])
        assert (name == "gradients" and not whole) or not values.isnan().any(), "nothing was compared"
        differences[name] = float(values.max()) if name == "parameters" or whole else 0.0
    return differences


@each(LAYOUTS)
def test_layout_equals_one_process(
    layout: Layout, cases: dict[str, Case], references: dict[str, Any], pool: Pool, exactness: Exactness
) -> None:
    differences = compare(pool, cases[layout.case], references[layout.case], layout.ranks, layout.settings)
    exactness.fp32.append(Compared(layout, differences))
    assert all(value < TOLERANCE for value in differences.values()), differences


TILED = [layout for layout in LAYOUTS if layout.case in ("block", "block + ar", "annealing", "isolated")]
TILED += [Layout("ar", "CP2", 2, CP), Layout("grafting", "CP2 x PP2, EP2", 4, {**CP, **PP, **EP})]
TILED += [Layout("block", "recomputed", 1, {"recompute_granularity": "full"})]


@each(TILED, quick=lambda layout: layout.case == "block + ar")
def test_attention_in_tiles_equals_one_process(
    layout: Layout, cases: dict[str, Case], references: dict[str, Any], pool: Pool
) -> None:
    """Masked entries are not computed, and what is computed is as under the dense mask."""
    differences = compare(
        pool, cases[layout.case], references[layout.case], layout.ranks, layout.settings, in_tiles=True
    )
    assert all(value < TOLERANCE for value in differences.values()), differences


def test_the_comparison_sees_small_errors(cases: dict[str, Case], references: dict[str, Any], pool: Pool) -> None:
    """Negative control: a learning rate that is off by one part in a thousand."""
    differences = compare(pool, cases["moe"], references["moe"], 1, {"lr": 1.001e-2})
    assert differences["parameters"] > 5 * TOLERANCE and differences["gradients"] > TOLERANCE


def test_unmarked_experts_train_wrongly(cases: dict[str, Case], references: dict[str, Any], pool: Pool) -> None:
    """Negative control: what megatron-core 0.16.1 does by itself at TP2+SP, EP1 (megatron_compat/versions.py)."""
    differences = compare(pool, cases["moe"], references["moe"], 2, TP_SP, fix_experts=False)
    assert differences["gradients"] > 10 * TOLERANCE


def test_noise_and_order_are_bitwise_equal(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Every rank of every layout sees the samples that one process sees, bit for bit; so does any worker count."""
    case = cases["moe"]

    def samples(ranks: int, layout: dict[str, Any]) -> dict[int, bytes]:
        batches = 16 // (
            ranks // layout.get("tensor_model_parallel_size", 1) // layout.get("pipeline_model_parallel_size", 1)
        )
        seen: dict[int, bytes] = {}
        for rank in pool.run(
            "batch_fingerprints", ranks, checkpoint=case.checkpoint, settings={**case.settings, **layout}, num_batches=batches
        ):  # fmt: skip
            for index, content in rank:
                assert seen.setdefault(index, content) == content
        return seen

    one = samples(1, {})
    assert sorted(one) == list(range(16)) and len(set(one.values())) == 16
    for ranks, layout in (
        (2, EP),
        (4, {**TP_SP, **EP}),
        (2, PP),
        (4, {}),
        (1, {"num_workers": 3}),
        (2, {"num_workers": 2}),
    ):
        assert samples(ranks, layout) == one
    assert samples(1, {"seed": 1}) != one


@pytest.mark.parametrize("kind", ["moe", "isolated"])
def test_validation_does_not_depend_on_the_layout(kind: str, cases: dict[str, Case], pool: Pool) -> None:
    """Nor on the micro-batches: isolated samples differ in how many of their tokens can be masked."""
    case = cases[kind]
    layouts = ((1, {}), (1, {"micro_batch_size": 4}), (2, {**TP_SP, **EP}), (4, {**PP, **EP}), (2, CP))
    results = [
        pool.run("validate", ranks, checkpoint=case.checkpoint, settings={**case.settings, **layout})
        for ranks, layout in layouts
    ]
    expected = results[0][0]
    assert expected["num_samples"] == 8 and expected["nelbo"] > 1
    for result in (rank for layout in results for rank in layout):
        assert result == pytest.approx(expected, rel=TOLERANCE)
