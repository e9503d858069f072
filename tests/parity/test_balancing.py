"""The auxiliary losses of routers: in every layout and cut what their definition says (balancing_jobs.py)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import place_experts
from megatron_a2d.conversion.sources import open_checkpoint
from megatron_a2d.utils.errors import UserError
from tests.cases import Case
from tests.parity.layouts import CP, DISTRIBUTED, EP, OVERLAP, PP, TP_SP, VPP
from tests.parity.pool import Pool
from tests.parity.test_layouts import TOLERANCE, compare

FULL = pytest.mark.full
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE_RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ("moe",)}

# Large coefficients: the auxiliary gradient is of the size of the routers' own.
GLOBAL = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1}
SAMPLES = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
LOSSES: dict[str, dict[str, Any]] = {
    "global": GLOBAL,
    "global, current loads": {**GLOBAL, "moe_aux_loss_loads": "current"},
    "global, by kind": {**GLOBAL, "moe_aux_loss_tokens": "by_kind", "moe_z_loss_coeff": 0.01},
    "global, unmasked": {**GLOBAL, "moe_aux_loss_tokens": "unmasked"},
    "samples": SAMPLES,
    "samples, by kind": {**SAMPLES, "moe_aux_loss_tokens": "by_kind"},
    "aux_loss": {**SAMPLES, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_tokens": "unmasked"},
    "z": {"moe_z_loss_coeff": 0.01},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "micro-batches of 2": (1, {"micro_batch_size": 2}),
    "micro-batches of 4, recomputed": (1, {"micro_batch_size": 4, **RECOMPUTED}),
    "DP2": (2, {}),
    "EP2, distributed optimizer, overlap": (2, {**EP, **OVERLAP}),
    "TP2+SP, EP1": (2, TP_SP),
    "CP2, EP2": (2, {**CP, **EP}),
    "CP2, micro-batches of 2": (2, {**CP, "micro_batch_size": 2}),
    "PP2, recomputed": (2, {**PP, **RECOMPUTED}),
    "VPP2, experts recomputed": (2, {**VPP, **MOE_RECOMPUTED}),
    "VPP2, recomputed, micro-batches of 2": (2, {**VPP, **RECOMPUTED, "micro_batch_size": 2}),
    "PP2 x TP2+SP, EP2": (4, {**PP, **TP_SP, **EP, **DISTRIBUTED}),
}


@pytest.fixture(scope="session")
def definitions(cases: dict[str, Case], pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By case of tests/cases.py and of LOSSES: the losses and norms by the definition, and a file of gradients."""
    root, known = tmp_path_factory.mktemp("definitions"), {}

    def defined(kind: str, loss: str, **more: Any) -> dict[str, Any]:
        key = f"{kind} {loss} {sorted(more)}"
        if key not in known:
            path, case = str(root / f"{len(known)}.pt"), cases[kind]
            settings = {**case.settings, **LOSSES[loss], **more}
            (result,) = pool.run("defined_steps", 1, checkpoint=case.checkpoint, settings=settings, save_reference=path)
            known[key] = {**result, "path": path}
        return known[key]

    return defined


QUICK = [
    ("moe", "global, current loads", "EP2, distributed optimizer, overlap"),
    ("moe", "global, by kind", "VPP2, experts recomputed"),
    ("block", "samples, by kind", "CP2, micro-batches of 2"),
    ("isolated", "global, unmasked", "PP2 x TP2+SP, EP2"),
]
REST = [
    *(("moe", "global, by kind", layout) for layout in LAYOUTS),
    *(("moe", "samples, by kind", layout) for layout in LAYOUTS),
    *(("moe", loss, "PP2 x TP2+SP, EP2") for loss in LOSSES),
    *(("moe", "global, current loads", layout) for layout in ("DP2", "EP2, distributed optimizer, overlap", "VPP2, recomputed, micro-batches of 2")),
    *((case, loss, layout) for case in ("block", "isolated", "annealing", "random") for loss, layout in (("global, by kind", "PP2, recomputed"), ("samples", "CP2, micro-batches of 2"))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "loss", "layout"),
    [*QUICK, *(pytest.param(*item, marks=FULL) for item in dict.fromkeys(REST) if item not in QUICK)],
)
def test_gradients_follow_the_definition(
    case: str, loss: str, layout: str, cases: dict[str, Case], definitions: Any, pool: Pool
) -> None:
    ranks, settings = LAYOUTS[layout]
    reference = definitions(case, loss)
    differences = compare(pool, cases[case], reference, ranks, {**LOSSES[loss], **settings})
    assert all(value < TOLERANCE for value in differences.values()), differences


def test_interleaved_micro_batches(cases: dict[str, Case], pool: Pool) -> None:
    """megatron.core's schedule that overlaps the experts' all-to-all, in bf16: the plain schedule's norms."""

    def norms(**more: Any) -> list[float]:
        settings = {**cases["moe"].settings, **EP, **LOSSES["global, by kind"], "bf16": True, **more}
        results = pool.run("train_steps", 2, checkpoint=cases["moe"].checkpoint, settings=settings, num_steps=2)
        return [value for result in results for value in result["grad_norms"]]

    assert norms(overlap_moe_expert_parallel_comm=True) == pytest.approx(norms(), rel=1e-6)


@pytest.mark.parametrize("loss", ["previous", "current", "bias"])
def test_grafting_trains_attention_alone(loss: str, cases: dict[str, Case], pool: Pool) -> None:
    """Its steps are those without balancing; the step after them is the first to balance, by its own loads."""

    def steps(**more: Any) -> tuple[list[float], list[float]]:
        settings = {**cases["grafting"].settings, **more}  # two steps graft
        (result,) = pool.run("train_steps", 1, checkpoint=cases["moe"].checkpoint, settings=settings, num_steps=4)
        return result["losses"], result["grad_norms"]

    losses, norms = steps()
    if loss == "bias":
        balanced_losses, balanced_norms = steps(**BIAS)
        assert balanced_losses[3] != losses[3]
    else:
        balanced_losses, balanced_norms = steps(**GLOBAL, moe_aux_loss_loads=loss)
        assert balanced_norms[2] != pytest.approx(norms[2], rel=1e-4)
        assert balanced_norms[2] == steps(**LOSSES["global, current loads"])[1][2]
    assert balanced_losses[:3] == losses[:3] and balanced_norms[:2] == norms[:2]


BIAS = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.02}


@pytest.mark.parametrize("kind", ["global, by kind", "bias"])
def test_resume_is_bitwise(kind: str, cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """The loads of the step before, or the biases, are in the checkpoint; and another layout resumes with them."""
    case = cases["moe"]
    settings = {
        **case.settings, **(BIAS if kind == "bias" else LOSSES[kind]), **EP, "load": case.checkpoint, "train_iters": 4,
        "save_interval": 2, "log_interval": 1, "eval_interval": 4,
    }  # fmt: skip
    unbroken = pool.run("run", 2, settings={**settings, "save": str(tmp_path / "unbroken")})
    pool.run("run", 2, settings={**settings, "save": str(tmp_path / "stopped")}, stop_at=2)
    shutil.copytree(tmp_path / "stopped", tmp_path / "elsewhere")
    resumed = pool.run("run", 2, settings={**settings, "save": str(tmp_path / "stopped")})
    for one, other in zip(unbroken, resumed, strict=True):
        assert other["start"] == 2 and one["losses"][2:] == other["losses"][-2:]
        assert one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]
    (elsewhere,) = pool.run(
        "run", 1, settings={**settings, "expert_model_parallel_size": 1, "save": str(tmp_path / "elsewhere")}
    )
    assert elsewhere["losses"][-2:] == pytest.approx(unbroken[0]["losses"][2:], rel=TOLERANCE)
    if kind == "bias":
        _check_biases(tmp_path, settings, pool)


def _check_biases(tmp_path: Path, settings: dict[str, Any], pool: Pool) -> None:
    """Zero in the last checkpoint; one from before is neither exported nor read by a model that would ignore them."""
    early, last = (tmp_path / "unbroken" / f"iter_000000{number}" for number in (2, 4))
    with pytest.raises(UserError, match=r"moe-router-enable-expert-bias.*last iteration"), open_checkpoint(early):
        pass
    # What runs the model itself has a place for them.
    (sampled,) = pool.run(
        "sample", 1, checkpoint=str(early), layout={}, options={"num_steps": 2}, rows=[[1, 2, -1, -1, 4]]
    )
    assert sampled["num_forwards"] == [2]
    place_experts.main(
        ["--checkpoint", str(early), "--expert-model-parallel-size", "2", "--valid-data", settings["valid_data_path"]]
    )
    with open_checkpoint(early, allow_expert_bias=True) as weights, open_checkpoint(last) as finished:
        assert weights.map.megatron_shapes == finished.map.megatron_shapes
    for more, is_read in (
        ({}, True),
        ({"moe_router_enable_expert_bias": False, "moe_router_bias_update_rate": 1e-3}, False),
    ):
        options = {
            **settings,
            **more,
            "load": str(early),
            "finetune": True,
            "save": str(tmp_path / f"from {is_read}"),
            "train_iters": 1,
        }
        if is_read:
            assert pool.run("run", 2, settings=options)[0]["start"] == 0
        else:
            with pytest.raises(RuntimeError, match="add --moe-router-enable-expert-bias"):
                pool.run("run", 2, settings=options)


@FULL
def test_a_capacity_under_expert_parallelism(cases: dict[str, Case], pool: Pool) -> None:
    """One that is never reached changes nothing; one that is does; padding to it changes shapes alone."""

    def seen(**more: Any) -> list[float]:
        settings = {**cases["moe"].settings, **EP, **more}
        results = pool.run("train_steps", 2, checkpoint=cases["moe"].checkpoint, settings=settings, num_steps=2)
        return [value for result in results for value in (*result["losses"], *result["grad_norms"])]

    plain, dropped = seen(), seen(moe_expert_capacity_factor=1.0)
    assert seen(moe_expert_capacity_factor=8.0) == plain != pytest.approx(dropped, rel=1e-3)
    padded = seen(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)
    assert padded == pytest.approx(dropped, rel=TOLERANCE)
