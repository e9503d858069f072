"""The phases of a step: nested times, the backward pass, and nothing at all while nothing is measured."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.distributed import step_timers
from megatron_a2d.distributed.step_timers import PHASES, Recorder, both_ways, phase
from megatron_a2d.training.profiler import as_table


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes from one look at the clock to the next."""
    seconds = itertools.count()
    monkeypatch.setattr(step_timers, "_now", lambda *_: float(next(seconds)))
    monkeypatch.setattr(step_timers, "_milliseconds", lambda begin, end: 1000 * (end - begin))


def spent(recorder: Recorder) -> dict[str, float]:
    return {name: time / 1000 for name, time in recorder.milliseconds().items() if time}


def test_an_inner_phase_is_not_counted_in_the_outer_one(clock: None) -> None:
    recorder = Recorder([])
    with recorder.measuring():  # 0
        with phase("forward"):  # 1
            with phase("head"):  # 2 to 3
                pass
        # 4
        with phase("optimizer"):  # 5 to 6
            pass
    # 7
    assert spent(recorder) == {"forward": 2, "head": 1, "optimizer": 1, "other": 3}


def test_steps_add_up_and_time_between_them_does_not_count(clock: None) -> None:
    recorder = Recorder([])
    for _ in range(2):
        with recorder.measuring():
            with phase("data"):
                pass
        step_timers._now()  # what happens between steps
    assert spent(recorder) == {"data": 2, "other": 4}


def test_a_phase_that_raises_ends(clock: None) -> None:
    recorder = Recorder([])
    with pytest.raises(ZeroDivisionError), recorder.measuring():
        recorder.enter("backward")
        with phase("head"):
            1 / 0  # noqa: B018
    assert step_timers._recorder is None and not recorder._scopes
    with recorder.measuring():
        pass


def test_megatron_reports_under_its_own_names(clock: None) -> None:
    config = SimpleNamespace(timers=None)
    recorder = Recorder([config])
    with recorder.measuring():
        for name, _ in (("forward-compute", "forward"), ("backward-send-forward-recv", "pipeline"), ("unknown", "")):
            timer = config.timers(name, log_level=2)
            timer.start(barrier=True)
            config.timers(name).stop()
    assert config.timers is None
    assert spent(recorder) == {"forward": 1, "pipeline": 1, "other": 3}


def test_the_names_are_those_of_this_megatron() -> None:
    from megatron.core.distributed import finalize_model_grads  # the function, by the package
    from megatron.core.pipeline_parallel import p2p_communication, schedules

    module = inspect.getmodule(finalize_model_grads)
    source = "".join(inspect.getsource(part) for part in (module, p2p_communication, schedules))
    missing = [name for name in step_timers._TIMERS if f"'{name}'" not in source and f'"{name}"' not in source]
    assert not missing
    assert "'forward-recv'" in source and "'backward-send'" in source


class _Slow(torch.autograd.Function):
    """Looks at the clock in both directions: a second more in each."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        step_timers._now()
        return 2 * tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        step_timers._now()
        return 2 * gradient


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_part_of_the_model_in_both_directions(clock: None, is_marked: bool) -> None:
    recorder = Recorder([])
    leaf = torch.ones(3, requires_grad=True)
    with recorder.measuring():
        hidden = _Slow.apply(leaf)
        losses = both_ways("head", _Slow.apply, hidden) if is_marked else _Slow.apply(hidden)
        with phase("backward"):
            (3 * losses).sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 12.0))
    times = spent(recorder)
    assert times.get("head") == (4 if is_marked else None)  # of the marks one second, of the function one, each way
    assert times["backward"] == 3


def test_nothing_is_done_while_nothing_is_measured() -> None:
    assert phase("data") is phase("head") is step_timers._OFF
    exchange = dist.all_to_all_single
    hidden = torch.ones(3, requires_grad=True) * 1
    losses = both_ways("head", torch.exp, hidden)
    assert hidden._backward_hooks is None and losses._backward_hooks is None
    with Recorder([]).measuring():
        assert phase("data") is not step_timers._OFF and dist.all_to_all_single is not exchange
        marked = both_ways("head", torch.exp, hidden)
    assert hidden._backward_hooks and marked._backward_hooks  # the control
    assert dist.all_to_all_single is exchange and phase("data") is step_timers._OFF


def test_a_scope_of_the_same_name_is_in_the_trace() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        with phase("optimizer"):
            pass
        with Recorder([]).measuring(), phase("data"):
            pass
    names = {event.name for event in profiler.events()}
    assert "data" in names and "optimizer" not in names


def test_table() -> None:
    times = dict.fromkeys(PHASES, 0.0) | {"forward": 30.0, "backward": 60.0, "other": 10.0}
    result = {"first_iteration": 3, "last_iteration": 4, "ranks": [{"rank": 2, "stage": 0, "ms_per_step": times}]}
    lines = [line.split() for line in as_table(result).splitlines()]
    assert " ".join(lines[0]) == "profile of iterations 3 to 4"
    assert ["backward", "60.00", "60.0%"] in lines and ["step", "100.00", "100.0%"] in lines
    result["ranks"].append({"rank": 5, "stage": 1, "ms_per_step": times | {"head": 100.0}})
    assert "stage 1, rank 5" in as_table(result)
    assert ["head", "0.00", "0.0%", "100.00", "50.0%"] in [line.split() for line in as_table(result).splitlines()]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"profile": True}, "--profile true: has no effect without --save"),
        ({"profile_step_start": 3}, "--profile-step-start 3: has no effect without --profile"),
        ({"profile": True, "save": "run", "profile_step_start": 13}, "must lie between 1 and --profile-step-end 12"),
        ({"profile": True, "save": "run", "train_iters": 11}, "--profile-step-end 12: exceeds --train-iters 11"),
        ({"profile": True, "save": "run"}, None),
    ],
)
def test_settings(settings: dict[str, Any], problem: str | None) -> None:
    found = find_problems(build({"train_iters": 100, **settings}), None, 8)
    if problem is None:
        assert not found
    else:
        assert len(found) == 1 and problem.lower() in found[0].lower()
