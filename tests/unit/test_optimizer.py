"""Learning rates by role and iteration: what megatron's scheduler makes of the settings, against formulas written out."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_a2d.config.settings import build
from megatron_a2d.training.optimizer import (
    _group_overrides,
    _tag_learning_rates,
    build_scheduler,
    frozen_roles,
    role_of,
)
from tests.unit.test_training import NAMES

ITERATIONS, PEAK, LEAST = 12, 0.8, 0.2


def rates(scale: float = 1.0, increment: int = 1, **settings: Any) -> list[float]:
    """The learning rate of iterations 1, 2, ... of a group with this factor; the loop asks for it before each."""
    values = {"lr": PEAK, "min_lr": LEAST, "train_iters": ITERATIONS, "weight_decay": 0.3} | settings
    group: dict[str, Any] = {"params": [], "wd_mult": 1.0, "lr": 0.0}
    for key, override in _group_overrides([scale] if scale != 1 else [], PEAK, LEAST).items():
        if key.predicate.name != "vector":
            group.update(override)
    optimizer: Any = SimpleNamespace(param_groups=[group])
    scheduler = build_scheduler(build(values), optimizer)
    found = []
    for _ in range(ITERATIONS + 2):
        scheduler.step(increment)
        found.append(group["lr"])
        assert group["weight_decay"] == 0.3, "weight decay does not change"
    return found


def shape(style: str, iteration: int, warm_up: int, last: int) -> float:
    """Between 0, the least rate, and 1, the peak."""
    place = min(1.0, (iteration - warm_up) / (ITERATIONS - warm_up))
    if style == "WSD":
        place = min(1.0, max(0.0, (iteration - (ITERATIONS - last)) / last))
    return {"constant": 1.0, "linear": 1 - place}.get(style, (1 + math.cos(math.pi * place)) / 2)


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("warm_up", [0, 4])
@pytest.mark.parametrize(
    ("style", "last"), [("cosine", 0), ("linear", 0), ("constant", 0), ("WSD", 3), ("WSD", 7)]
)  # fmt: skip
def test_rates_of_every_iteration(style: str, last: int, warm_up: int, scale: float) -> None:
    """A straight rise from 0 that reaches the peak at the last iteration of the warm-up; then the decay, which reaches
    the least rate at the last iteration and stays. A role's factor scales peak and least rate alike."""
    found = rates(scale, lr_decay_style=style, lr_warmup_iters=warm_up, lr_wsd_decay_iters=last)
    expected = [
        PEAK * iteration / warm_up
        if iteration <= warm_up
        else LEAST + (PEAK - LEAST) * shape(style, iteration, warm_up, last)
        for iteration in range(1, ITERATIONS + 3)
    ]
    assert found == pytest.approx([scale * rate for rate in expected], rel=1e-12)


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
def test_rates_by_samples(style: str) -> None:
    """Counted in samples, iterations of 5 samples have the rates of the same schedule in iterations; the end may lie
    within an iteration."""
    by_iterations = rates(lr_decay_style=style, lr_warmup_iters=4, lr_wsd_decay_iters=3 * (style == "WSD"))
    settings = {
        "train_iters": None, "train_samples": 5 * ITERATIONS, "global_batch_size": 5, "lr_decay_style": style,
        "lr_warmup_samples": 20, "lr_wsd_decay_samples": 15 * (style == "WSD"),
    }  # fmt: skip
    assert rates(increment=5, **settings) == pytest.approx(by_iterations, rel=1e-12)
    found = rates(increment=5, **{**settings, "train_samples": 5 * ITERATIONS + 3})
    assert found[:4] == pytest.approx(by_iterations[:4], rel=1e-12)
    assert LEAST < found[ITERATIONS - 1] < found[ITERATIONS - 2] and found[ITERATIONS] == LEAST


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_the_factor_of_its_role(tied: bool) -> None:
    factors = {"attention": 2.0, "mlp": 0.5, "router": 0.25, "norm": 1.0, "embedding": 0.125, "head": 4.0}
    if tied:
        del factors["head"]
    # Two chunks with a parameter under each name of the model.
    parameters = [
        {name: torch.nn.Parameter(torch.zeros([2] * (1 if "norm" in name else 2))) for name in NAMES} for _ in range(2)
    ]
    chunks: Any = [SimpleNamespace(named_parameters=chunk.items) for chunk in parameters]
    scales = _tag_learning_rates(chunks, factors, tied)
    assert scales == [0.125, 0.25, 0.5, 2.0, *([] if tied else [4.0])]
    overrides = _group_overrides(scales, PEAK, LEAST)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            factor = factors[role_of(name, tied)]
            assert parameter.lr_scale == factor
            matching = [dict(override) for key, override in overrides.items() if key.predicate.fn(parameter)]
            expected: list[dict[str, float]] = [{"wd_mult": 0.0}] if "norm" in name else []
            if factor != 1:
                expected.append({"max_lr": PEAK * factor, "min_lr": LEAST * factor, "lr_mult": factor})
            assert matching == expected
    assert _tag_learning_rates(chunks, {"mlp": 0.0}, tied) == [], "what is frozen has no group"
    assert frozen_roles({"lr_mult": {"mlp": 0.0, "norm": 1.0}}) == {"mlp"} and frozen_roles({}) == set()
