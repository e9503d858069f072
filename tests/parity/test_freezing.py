"""Roles with learning-rate factor 0 are bitwise frozen through steps, saves and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.parity.layouts import DISTRIBUTED, EP, PP, TP_SP
from tests.parity.pool import Pool
from tests.parity.test_reshard import content

FROZEN = {"embedding": 0.0, "router": 0.0, "norm": 0.0, "mlp": 0.0}


def role(name: str) -> str:
    roles = {"norm": "norm", "router": "router", "self_attention": "attention", "mlp": "mlp", "embedding": "embedding"}
    return next((value for part, value in roles.items() if part in name), "head")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [pytest.param(1, {}, marks=pytest.mark.full), (4, {**PP, **TP_SP, **EP, **DISTRIBUTED})],
    ids=["one process", "PP2 x TP2+SP, EP2"],
)
def test_frozen_roles_stand_still(
    ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    """Weight decay and momentum included: 2 steps with all roles, then 2 with some frozen. Their moments are left out."""
    case, save = cases["moe"], tmp_path / "run"
    settings = {
        **case.settings, **layout, "load": case.checkpoint, "save": str(save), "train_iters": 4, "save_interval": 2,
        "weight_decay": 0.5,
    }  # fmt: skip
    pool.run("run", ranks, settings=settings, stop_at=2)
    changed = {**settings, "lr_mult": FROZEN}
    assert pool.run("run", ranks, settings=changed)[0]["start"] == 2
    before, after = content(save / "iter_0000002"), content(save / "iter_0000004")
    moved = {"attention": 0, "head": 0}
    for name, tensor in after.items():
        if name.startswith("optimizer."):
            assert role(name) in moved, name
            continue
        same = torch.equal(tensor, before[name])
        assert same == (role(name) in FROZEN), name
        moved[role(name)] = moved.get(role(name), 0) + 1
    assert moved["attention"] and moved["head"] and moved["embedding"]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, {}, marks=pytest.mark.full),
        (4, {**PP, **TP_SP, **EP, **DISTRIBUTED}),
        pytest.param(2, {**EP, "bf16": True}, marks=pytest.mark.full),
        pytest.param(2, {**EP, **DISTRIBUTED, "bf16": True}, marks=pytest.mark.full),
    ],
    ids=["one process", "PP2 x TP2+SP, EP2, distributed", "bf16", "bf16, distributed"],
)
def test_what_was_frozen_may_train_again(
    ranks: int, layout: dict[str, Any], cases: dict[str, Case], pool: Pool, tmp_path: Path
) -> None:
    """Its moments begin at zero: after one step both are those of one gradient. All others continue."""
    case, save = cases["moe"], tmp_path / "run"
    settings = {
        **case.settings, **layout, "load": case.checkpoint, "save": str(save), "train_iters": 8, "save_interval": 1,
    }  # fmt: skip
    pool.run("run", ranks, settings={**settings, "lr_mult": FROZEN}, stop_at=3)
    assert pool.run("run", ranks, settings=settings, stop_at=2)[0]["start"] == 3
    before, after, later = (content(save / f"iter_{iteration:07d}") for iteration in (3, 4, 5))
    first, second = "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."
    seen = set()
    for name in [name.removeprefix(first) for name in after if name.startswith(first)]:
        gradient = after[first + name].double() / (1 - 0.9)
        one_gradient = torch.allclose(after[second + name].double(), gradient**2 * (1 - 0.95), rtol=1e-4, atol=1e-30)
        assert one_gradient == (role(name) in FROZEN), name
        assert (first + name in before) == (role(name) not in FROZEN), name
        assert not torch.equal(after[name], before[name]) and not torch.equal(later[name], after[name]), name
        seen.add(role(name))
        if f"optimizer.state.fp32_param.{name}" in after and role(name) in FROZEN:
            # A step from the weight, and not from anything else: the main copy rounds to what is trained.
            assert torch.equal(after[f"optimizer.state.fp32_param.{name}"].bfloat16(), after[name].bfloat16()), name
            moved = (after[f"optimizer.state.fp32_param.{name}"] - before[name].float()).abs().max()
            assert 0 < moved < 0.02, name
    assert seen == {*FROZEN, "attention", "head"}
    assert any("fp32_param" in name for name in after) == bool(layout.get("bf16"))


def test_first_stage_without_anything_to_train(cases: dict[str, Case], pool: Pool) -> None:
    """The head alone trains, on the last stage; the losses are those of one process."""
    case = cases["moe"]
    settings = {**case.settings, "lr_mult": {**FROZEN, "attention": 0.0}}
    arguments = {"checkpoint": case.checkpoint, "num_steps": 2}
    one = pool.run("train_steps", 1, settings=settings, **arguments)[0]
    two = pool.run("train_steps", 2, settings={**settings, **PP}, **arguments)[0]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-6)
