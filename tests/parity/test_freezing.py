"""Roles with learning-rate factor 0 stand still, in every bit, through steps, saves and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_a2d.config import build
from megatron_a2d.training.resume import differences
from tests.cases import Case
from tests.parity.jobs import SETTINGS
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
    # Back again: there is nothing to go on from, and that is said. Other factors may change.
    problems = differences(build(SETTINGS | settings), save / "iter_0000004")
    assert sum("was frozen" in line for line in problems) == len(FROZEN)
    assert not differences(
        build({**SETTINGS, **changed, "lr_mult": {**FROZEN, "attention": 0.3}}), save / "iter_0000004"
    )


def test_first_stage_without_anything_to_train(cases: dict[str, Case], pool: Pool) -> None:
    """The head alone trains, on the last stage; the losses are those of one process."""
    case = cases["moe"]
    settings = {**case.settings, "lr_mult": {**FROZEN, "attention": 0.0}}
    arguments = {"checkpoint": case.checkpoint, "num_steps": 2}
    one = pool.run("train_steps", 1, settings=settings, **arguments)[0]
    two = pool.run("train_steps", 2, settings={**settings, **PP}, **arguments)[0]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert two["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-6)
