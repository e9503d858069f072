"""Conversions and objectives through the whole training system: what they begin with, what they change, how they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_a2d.report.plots import read_log
from tests.cases import Case
from tests.parity.layouts import DISTRIBUTED, EP, PP, TP_SP
from tests.parity.pool import Pool
from tests.parity.test_freezing import role
from tests.parity.test_reshard import content


def losses(pool: Pool, case: Case, ranks: int = 1, **settings: Any) -> list[float]:
    (result, *_) = pool.run(
        "train_steps", ranks, checkpoint=case.checkpoint, settings={**case.settings, **settings}, num_steps=2
    )
    return result["losses"] + result["grad_norms"]


def test_limits_are_known_objectives(cases: dict[str, Case], pool: Pool) -> None:
    """One block is masked diffusion; annealing over one step is none. And both differ from what they are not."""
    case = cases["moe"]
    plain = losses(pool, case)
    one_block = losses(pool, case, objective="block", block_length=32)
    assert one_block == pytest.approx(plain, rel=1e-5)
    assert losses(pool, case, objective="block", block_length=8) != pytest.approx(plain, rel=1e-3)
    at_once = losses(pool, case, conversion="annealing", attention_annealing_iters=1)
    assert at_once == plain
    assert losses(pool, case, conversion="annealing", attention_annealing_iters=8) != pytest.approx(plain, rel=1e-3)


def grafting_run(case: Case, save: Path, **settings: Any) -> dict[str, Any]:
    return {
        **case.settings, "conversion": "grafting", "grafting_iters": 4, "load": case.checkpoint, "save": str(save),
        "train_iters": 6, "save_interval": 2, "log_interval": 1, "lr_mult": {}, "lr": 5e-3, "adam_eps": 1e-8,
        "lr_decay_style": "constant", "eval_interval": 100, "weight_decay": 0.5, **settings,
    }  # fmt: skip


def test_grafting_teaches_attention_and_resumes(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Until its last step nothing but attention moves, and the error falls; stopped in the middle, under another
    layout, it resumes from the same original operators."""
    case = cases["moe"]
    unbroken = grafting_run(case, tmp_path / "unbroken")
    expected = pool.run("run", 1, settings=unbroken)[0]
    before, after = (content(tmp_path / "unbroken" / f"iter_000000{step}") for step in (2, 4))
    for name, tensor in after.items():
        if not name.startswith("optimizer."):
            is_attention = "self_attention" in name and "linear_qkv.layer_norm" not in name
            assert torch.equal(tensor, before[name]) != is_attention, name
    later = content(tmp_path / "unbroken" / "iter_0000006")
    moved = {role(name) for name, tensor in later.items() if not torch.equal(tensor, after.get(name, tensor))}
    assert {"attention", "mlp", "embedding", "head"} <= moved
    log = [json.loads(line) for line in (tmp_path / "unbroken" / "log.jsonl").read_text().splitlines()]
    train = [line for line in log if line["kind"] == "train"]
    errors = [line["grafting_error"] for line in train[:4]]
    assert 0 < errors[3] < errors[0] < 2 and not any("grafting_error" in line for line in train[4:])
    for line in train:
        grafts = line["iteration"] <= 4
        for name in ("loss", "cross_entropy", "accuracy", "mask_ratio"):
            assert (line[name] is None) == grafts, name
        assert ("grad_noise_scale" in line) != grafts and line["moe"]["entropy_unmasked"] > 0
        assert [role for role, norm in line["grad_norm_by_role"].items() if norm > 0][:1] == ["attention"]
        assert (line["grad_norm_by_role"]["mlp"] == 0) == grafts

    layout = {**PP, **TP_SP, **EP, **DISTRIBUTED}
    stopped = grafting_run(case, tmp_path / "stopped")
    pool.run("run", 1, settings=stopped, stop_at=2)
    resumed = pool.run("run", 4, settings={**stopped, **layout})[0]
    assert resumed["start"] == 2
    assert [line["loss"] or line["grafting_error"] for line in train] == pytest.approx(
        [
            json.loads(line)["loss"] or json.loads(line)["grafting_error"]
            for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()
            if json.loads(line)["kind"] == "train"
        ],
        rel=1e-5,
    )
    assert expected["losses"][4:] == pytest.approx(resumed["losses"][-2:], rel=1e-5)


def test_a_recomputed_layer_counts_its_error_once(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    found = {}
    for granularity in ("none", "full"):
        settings = grafting_run(
            cases["moe"], tmp_path / granularity, train_iters=3, grafting_iters=2, recompute_granularity=granularity
        )
        pool.run("run", 1, settings=settings)
        found[granularity] = [record for record in read_log(tmp_path / granularity) if record["kind"] == "train"]
    for recomputed, plain in zip(found["full"], found["none"], strict=True):
        # One of the two, while attention is grafted and behind it; the other is null.
        [name] = [name for name in ("grafting_error", "loss") if plain.get(name) is not None]
        assert recomputed[name] == pytest.approx(plain[name], rel=1e-6), name
        for name in ("load_imbalance_unmasked", "entropy_unmasked", "over_mean_load_frac"):
            assert recomputed["moe"][name] == pytest.approx(plain["moe"][name], rel=1e-6), name


def test_grafting_needs_its_old_operators(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """A resume in the middle without --load says so; one behind the middle needs nothing."""
    settings = grafting_run(cases["moe"], tmp_path / "run", train_iters=5, grafting_iters=3)
    pool.run("run", 1, settings=settings, stop_at=2)
    with pytest.raises(RuntimeError, match="--load: is missing"):
        pool.run("run", 1, settings={**settings, "load": None})
    damaged = shutil.copytree(cases["moe"].checkpoint, tmp_path / "damaged")
    chunk = next(damaged.rglob("*.distcp"))
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    with pytest.raises(RuntimeError, match=f"{chunk.name}.*; restore the file"):
        pool.run("run", 1, settings={**settings, "load": str(damaged)})
    pool.run("run", 1, settings=settings, stop_at=2)
    assert pool.run("run", 1, settings={**settings, "load": None})[0]["start"] == 4


@pytest.mark.full
def test_random_weights_are_not_those_of_the_checkpoint(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Another seed draws others; the spread is the architecture's; a resumed run does not draw again."""
    case = cases["moe"]
    drawn = {}
    for seed in (1, 2):
        settings = {
            **case.settings, "conversion": "random", "load": case.checkpoint, "save": str(tmp_path / str(seed)),
            "train_iters": 2, "save_interval": 1, "lr": 1e-30, "seed": seed,
        }  # fmt: skip
        pool.run("run", 1, settings=settings, stop_at=1)
        assert pool.run("run", 1, settings=settings)[0]["start"] == 1
        drawn[seed] = content(tmp_path / str(seed) / "iter_0000002")
    again = {**settings, "seed": 1, "load": settings["save"], "save": str(tmp_path / "again"), "train_iters": 1}
    assert pool.run("run", 1, settings=again)[0]["start"] == 0, "a trained checkpoint gives its shape alone too"
    for name, tensor in content(tmp_path / "again" / "iter_0000001").items():
        assert name.startswith("optimizer.") or torch.equal(tensor, drawn[1][name]) or role(name) == "norm"
    for name, tensor in drawn[1].items():
        if name.startswith("optimizer."):
            continue
        if role(name) == "norm":
            assert (tensor - 1).abs().max() < 1e-6
        else:
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.1) and abs(float(tensor.mean())) < 2e-3
            assert float((tensor - drawn[2][name]).std()) == pytest.approx(0.02 * 2**0.5, rel=0.1)


@pytest.mark.parametrize("weight", [pytest.param(0.0, marks=pytest.mark.full), 0.5])
def test_a_block_model_is_evaluated_and_sampled_as_trained(
    weight: float, cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    """The held-out NELBO is that of training's validation; and no block depends on those behind it."""
    case, save = cases["moe"], str(tmp_path / "run")
    settings = {
        **case.settings, "objective": "block", "block_length": 6, "ar_loss_weight": weight, "load": case.checkpoint,
        "save": save, "train_iters": 2, "eval_interval": 2,
    }  # fmt: skip
    pool.run("run", 1, settings=settings)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    nelbo = [line["nelbo"] for line in log if line["kind"] == "validation"][-1]
    layout = {**TP_SP, **EP}
    evaluated = pool.run(
        "held_out", 2, checkpoint=save, layout=layout, prefix=case.settings["valid_data_path"], num_samples=8
    )
    assert evaluated[0]["nelbo"] == pytest.approx(nelbo, rel=1e-5)

    def written(length: int, checkpoint: str, ranks: int = 1, **layout: Any) -> list[list[int]]:
        rows = [[5, 6, 7, 8] + [-1] * length, [9] * 7 + [-1] * length]
        options = {"num_steps": 100, "block_length": 6, "aligned_blocks": True}
        return pool.run("sample", ranks, checkpoint=checkpoint, layout=layout, options=options, rows=rows)[0]["tokens"]

    def begins_alike(checkpoint: str) -> bool:
        return [row[:12] for row in written(8, checkpoint)] == [row[:12] for row in written(14, checkpoint)]

    assert begins_alike(save) and not begins_alike(case.checkpoint)
    assert written(14, save, 2, **layout) == written(14, save)
