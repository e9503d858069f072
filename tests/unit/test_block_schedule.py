"""--block-length-schedule: a pure function of the iteration."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_a2d.config.block_schedule import block_length_at, stages
from megatron_a2d.config.cli import given_settings
from megatron_a2d.config.settings import build
from megatron_a2d.config.validate import find_problems
from tests.unit.test_diffusion_samples import LENGTH, sample_of

SCHEDULED = {"objective": "block", "block_length": 8, "block_length_schedule": "1:2, 4:1,40:1"}


def test_lengths_by_iteration() -> None:
    assert [block_length_at(iteration, "1:2, 4:1,40:1", 8) for iteration in range(6)] == [1, 1, 4, 40, 8, 8]
    assert stages("") == () and block_length_at(0, "", 8) == 8


def test_spaces_in_a_schedule_make_no_other_schedule() -> None:
    """A run is resumed with the schedule that it recorded, compared as a text."""
    name, problems = "block_length_schedule", list[str]()
    given = [given_settings(Namespace(**{name: text}), [name], problems) for text in ("1:2,4:1", " 1 : 2, 4:1 ")]
    assert given == [{name: "1:2,4:1"}] * 2 and not problems


def test_samples_follow_their_iteration_and_validation_does_not() -> None:
    """Four samples an iteration; the blocks of a sample have one time each."""

    def blocks(index: int, **changes: Any) -> int:
        segments = sample_of(index, **{**SCHEDULED, **changes}).noise_segments
        assert segments is not None
        return len(segments)

    assert [blocks(index) for index in range(0, 20, 4)] == [LENGTH, LENGTH, LENGTH // 4, 1, LENGTH // 8]
    assert [blocks(index) for index in (7, 8, 11, 12)] == [LENGTH, LENGTH // 4, LENGTH // 4, 1]
    assert [blocks(index, for_training=False) for index in (0, 8, 12)] == [LENGTH // 8] * 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"block_length_schedule": "1:2,4"}, "'4' is not LENGTH:ITERATIONS"),
        ({"block_length_schedule": "0:2"}, "'0:2' is not LENGTH:ITERATIONS"),
        ({"block_length_schedule": "1:-2"}, "'1:-2' is not LENGTH:ITERATIONS"),
        ({"block_length_schedule": "1:2,,4:3"}, "'' is not LENGTH:ITERATIONS"),
        ({"block_length_schedule": "64:2"}, "blocks of 64 tokens are longer than --seq-length 40"),
        ({"block_length_schedule": "", "block_length": 41}, "--block-length 41: is longer than --seq-length 40"),
        ({"block_length_schedule": "1:6,2:4"}, "its 10 iterations leave none of --train-iters 10"),
        ({"objective": "mdlm", "block_length": 0}, "--block-length-schedule 1:2, 4:1,40:1: has no effect without"),
        ({"objective": "mdlm", "block_length": 0, "block_length_schedule": "", "reset_block_grid": True}, "--reset-block-grid True: has no effect without --objective block"),
        ({"complementary_masks": True, "noise_schedule": "cosine"}, "--complementary-masks True: needs --noise-schedule linear"),
        ({"complementary_masks": True, "global_batch_size": 3}, "needs an even --global-batch-size, not 3"),
        ({"objective": "mdlm", "block_length": 0, "block_length_schedule": "", "complementary_masks": True, "conversion": "grafting", "grafting_iters": 2}, "--complementary-masks True: is not supported with --conversion grafting"),
        ({"objective": "mdlm", "block_length": 0, "block_length_schedule": "", "complementary_masks": True, "mask_sampling": "exact_count"}, "--complementary-masks True: needs --mask-sampling bernoulli"),
    ],
)  # fmt: skip
def test_what_cannot_be(changes: dict[str, Any], problem: str) -> None:
    run = {
        "load": "x",
        "train_data_path": "x",
        "seq_length": 40,
        "train_iters": 10,
        "global_batch_size": 4,
        **SCHEDULED,
    }
    assert not find_problems(build(run), None, 1)
    assert any(problem in line for line in find_problems(build({**run, **changes}), None, 1))
