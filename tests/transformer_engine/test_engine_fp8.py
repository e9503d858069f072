"""Transformer Engine's layers in FP8 against the emulation on the local layers, both in fp32 otherwise.

The emulation (megatron_a2d/model/emulated_layers.py) was written from the recipes and knows nothing of quantised
tensors, cached weights, transposed copies or fused accumulation, which is what Transformer Engine's Python adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.cases import VARIANTS
from tests.parity.layouts import CP, EP, OVERLAP, PP, TP_SP
from tests.parity.pool import Pool
from tests.transformer_engine.engine_cases import fusions
from tests.transformer_engine.engine_pool import EnginePool
from tests.transformer_engine.engine_results import EngineResults
from tests.transformer_engine.pretend_gpu import BLACKWELL, HOPPER

RECIPES = {"tensorwise": HOPPER, "blockwise": HOPPER, "mxfp8": BLACKWELL, "delayed": HOPPER}
SMALL = {"seq_length": 32, "global_batch_size": 4}
Emulated = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def emulated(wide: dict[str, dict[str, Any]], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """emulated(kind, recipe, **settings): a step on one process that knows no Transformer Engine; recipe none: fp32."""
    root = tmp_path_factory.mktemp("emulated")
    made: dict[str, dict[str, Any]] = {}

    def make(kind: str, recipe: str, num_steps: int = 1, **settings: Any) -> dict[str, Any]:
        name = f"{kind} {recipe} {num_steps} {sorted(settings.items())}"
        if name not in made:
            job, path = wide[kind], str(root / f"{len(made)}.pt")
            (result,) = pool.run(
                "train_steps", 1, checkpoint=job["checkpoint"], num_steps=num_steps, save_reference=path, in_fp32=True,
                settings={**job["settings"], "fp8_recipe": recipe, **SMALL, **settings},
            )  # fmt: skip
            made[name] = {**result, "path": path}
        return made[name]

    return make


def engine_steps(
    engine_pool: EnginePool,
    job: dict[str, Any],
    recipe: str,
    reference: dict[str, Any],
    ranks: int = 1,
    num_steps: int = 1,
    defect: str | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Distances of Transformer Engine's step from the reference."""
    results = engine_pool.run(
        "train_steps", ranks, capability=RECIPES.get(recipe, HOPPER), checkpoint=job["checkpoint"],
        num_steps=num_steps, defect=defect, reference=reference["path"], relative=True, in_fp32=True,
        settings={**job["settings"], "transformer_impl": "auto", "fp8_recipe": recipe, **SMALL, **settings},
    )  # fmt: skip
    pairs = [pair for result in results for pair in zip(result["losses"], reference["losses"], strict=True)]
    return {
        "loss": max(abs(ours - theirs) / theirs for ours, theirs in pairs),
        "gradients": max(result["gradient_distance"] for result in results),
        "parameters": max(result["parameters"] for result in results),
    }


def record_step(
    engine_results: EngineResults, labels: tuple[str, str, str], found: dict[str, float], plain: dict[str, float]
) -> None:
    """plain: the distances of the same step without rounding."""
    engine_results.add("rounded", *labels, **found, without_rounding=plain["gradients"])


def record_planted(engine_results: EngineResults, defect: str, found: dict[str, float]) -> None:
    engine_results.add("planted", defect, "dense", gradients=found["gradients"], parameters=found["parameters"])


QUICK = {("dense", "tensorwise"), ("moe", "mxfp8")}


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        pytest.param(kind, recipe, marks=() if (kind, recipe) in QUICK else pytest.mark.full)
        for kind in ("dense", "moe")
        for recipe in RECIPES
    ],
)
def test_equal_to_the_emulation(
    kind: str,
    recipe: str,
    wide: dict[str, Any],
    emulated: Emulated,
    engine_pool: EnginePool,
    engine_results: EngineResults,
) -> None:
    found = engine_steps(engine_pool, wide[kind], recipe, emulated(kind, recipe), **fusions(kind))
    plain = engine_steps(engine_pool, wide[kind], "none", emulated(kind, recipe), **fusions(kind))
    record_step(engine_results, (kind, recipe, "one process"), found, plain)
    # A last bit can put a value on the other side of a tie of the rounding, and what is computed of it follows; a weight
    # that was not rounded again, or in the wrong direction, changes all of them.
    assert found["loss"] < 1e-3 and found["gradients"] < plain["gradients"] / 4, plain


@pytest.mark.full
@pytest.mark.parametrize(
    ("variant", "recipe"),
    [
        (variant, recipe)
        for variant in ("block + ar", "annealing", "grafting")
        for recipe in RECIPES
        if (variant, recipe) != ("grafting", "delayed")  # refused
    ],
)
def test_own_attention_equal_to_the_emulation(
    variant: str,
    recipe: str,
    wide: dict[str, Any],
    emulated: Emulated,
    engine_pool: EnginePool,
    engine_results: EngineResults,
) -> None:
    """With our core attention in the place of Transformer Engine's. Grafting in its second step: the old operator's
    weights are other ones than the new operator's, and FP8 copies of the one must not serve the other."""
    shared, num_steps = VARIANTS[variant] | fusions("moe"), 2 if variant == "grafting" else 1
    reference = emulated("moe", recipe, num_steps, **VARIANTS[variant])
    found, plain = (
        engine_steps(engine_pool, wide["moe"], name, reference, num_steps=num_steps, **shared)
        for name in (recipe, "none")
    )
    record_step(engine_results, ("moe", recipe, variant), found, plain)
    assert found["loss"] < 1e-3 and found["gradients"] < plain["gradients"] / 4, (found, plain)


# Tokens of a process are whole blocks of 128 where they are gathered.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "TP2+SP": ("dense", TP_SP), "CP2": ("dense", CP), "PP2": ("dense", PP), "DP2, overlap": ("dense", OVERLAP),
    "EP2": ("moe", EP), "TP2+SP, EP2": ("moe", {**TP_SP, **EP}),
}  # fmt: skip


# With one scale for a matrix, of its own values, each piece that a layout cuts has another one.
CUTS_MATRICES = {"TP2+SP", "CP2", "TP2+SP, EP2"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("layout", "recipe"),
    [
        (layout, recipe)
        for layout in LAYOUTS
        for recipe in RECIPES
        if layout not in CUTS_MATRICES or recipe != "tensorwise"
    ],
)
def test_layouts(
    layout: str,
    recipe: str,
    wide: dict[str, Any],
    emulated: Emulated,
    engine_pool: EnginePool,
    engine_results: EngineResults,
) -> None:
    """Nearer to the emulation on one process than to no rounding at all."""
    kind, settings = LAYOUTS[layout]
    batch = {"seq_length": 256, "global_batch_size": 2}
    reference = emulated(kind, recipe, **batch)
    found = engine_steps(engine_pool, wide[kind], recipe, reference, 2, **fusions(kind), **batch, **settings)
    plain = engine_steps(engine_pool, wide[kind], "none", reference, **fusions(kind), **batch)
    record_step(engine_results, (kind, recipe, layout), found, plain)
    assert found["loss"] < 3e-3 and not found["gradients"] > 0.75 * plain["gradients"], plain


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name == "tensorwise" else pytest.mark.full) for name in RECIPES]
)
def test_weights_are_rounded_once_a_batch(
    recipe: str, wide: dict[str, Any], emulated: Emulated, engine_pool: EnginePool
) -> None:
    """The second step has other weights: without the news of a batch's first micro-batch their FP8 copies would stay."""
    reference = emulated("dense", recipe, num_steps=2)
    found = engine_steps(engine_pool, wide["dense"], recipe, reference, num_steps=2, **fusions("dense"))
    assert found["loss"] < 5e-3 and found["gradients"] < 0.4


@pytest.mark.full
def test_stale_weights_are_seen(
    wide: dict[str, Any], emulated: Emulated, engine_pool: EnginePool, engine_results: EngineResults
) -> None:
    """Negative control, of the weights' quantised copies: test_weights_are_rounded_once_a_batch allows 0.4."""
    reference = emulated("dense", "tensorwise", num_steps=2)
    found = engine_steps(
        engine_pool, wide["dense"], "tensorwise", reference, num_steps=2, defect="stale_weights", **fusions("dense")
    )
    record_planted(engine_results, "stale weights, FP8 tensorwise", found)
    assert found["gradients"] > 1


def test_a_wrong_transpose_is_seen(
    wide: dict[str, Any], emulated: Emulated, engine_pool: EnginePool, engine_results: EngineResults
) -> None:
    """Negative control, of the FP8 tensors that the backward pass reads."""
    reference = emulated("dense", "tensorwise")
    found = engine_steps(engine_pool, wide["dense"], "tensorwise", reference, defect="wrong_transpose")
    record_planted(engine_results, "wrong transpose, FP8 tensorwise", found)
    assert found["loss"] < 1e-3 and found["gradients"] > 0.5


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        pytest.param(kind, recipe, marks=() if (kind, recipe) in QUICK else pytest.mark.full)
        for kind in ("dense", "moe")
        for recipe in (*RECIPES, "nvfp4")
    ],
)
def test_every_product_is_its_definition(
    kind: str, recipe: str, wide: dict[str, Any], engine_pool: EnginePool, engine_results: EngineResults
) -> None:
    """Of the same operands: 1e-6, over the micro-batches of a step with fused accumulation of the weights' gradients."""
    scaling = {"fp4_recipe" if recipe == "nvfp4" else "fp8_recipe": recipe}
    settings = {**wide[kind]["settings"], **fusions(kind), **SMALL, "transformer_impl": "auto", **scaling}
    (found,) = engine_pool.run(
        "fp8_products", 1, checkpoint=wide[kind]["checkpoint"], settings=settings,
        capability=RECIPES.get(recipe, BLACKWELL),
    )  # fmt: skip
    engine_results.add("products", kind, recipe, **found["worst"])
    assert found["layers"] == 8 and found["passes"] == {4}
    assert all(distance < 1e-6 for distance in found["worst"].values()), found


@pytest.mark.full
@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_that_change_nothing(
    recipe: str, wide: dict[str, Any], engine_pool: EnginePool, engine_results: EngineResults
) -> None:
    """Recomputation; and layers in bf16, all of them, are those without FP8."""

    def steps(**changes: Any) -> list[float]:
        settings = {**wide["dense"]["settings"], **SMALL, **fusions("dense"), "transformer_impl": "auto"}
        settings |= {"fp8_recipe": recipe, "micro_batch_size": 2, **changes}
        (result,) = engine_pool.run(
            "train_steps", 1, checkpoint=wide["dense"]["checkpoint"], settings=settings, num_steps=2, in_fp32=True,
            capability=RECIPES[recipe],
        )  # fmt: skip
        return [*result["losses"], *result["grad_norms"]]

    in_fp8, without = steps(), steps(fp8_recipe="none")
    assert in_fp8 != pytest.approx(without, rel=1e-4)
    changes: list[tuple[str, dict[str, Any], str, list[float]]] = [
        ("recompute full", {"recompute_granularity": "full"}, "without recomputation", in_fp8),
        ("recompute mlp", {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}, "without recomputation", in_fp8),
    ]  # fmt: skip
    if recipe != "delayed":
        changes.append(("all layers in bf16", {"first_last_layers_bf16": True}, "without FP8", without))
    for name, settings, what, expected in changes:
        pairs = zip(steps(**settings), expected, strict=True)
        found = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
        engine_results.add(
            "training", f"FP8 {recipe}, {name}", "dense", "one process", what, difference=found, allowed=1e-6
        )
        assert found < 1e-6, name


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_packed_documents(
    recipe: str, wide: dict[str, Any], emulated: Emulated, engine_pool: EnginePool, engine_results: EngineResults
) -> None:
    """Sequences one after the other, without padding between them, go through FP8 as one matrix."""
    documents = {"reset_attention_mask": True, "seq_length": 64}
    reference = emulated("dense", recipe, **documents)
    found = engine_steps(engine_pool, wide["dense"], recipe, reference, **fusions("dense"), **documents)
    plain = engine_steps(engine_pool, wide["dense"], "none", reference, **fusions("dense"), **documents)
    record_step(engine_results, ("dense, packed documents", recipe, "one process"), found, plain)
    assert found["loss"] < 1e-3 and found["gradients"] < plain["gradients"] / 2, plain
