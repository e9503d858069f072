"""--skip-samples: the samples that remain, in their order, whatever the layout; and what a resumed run may still skip."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_a2d.config.batch_schedule import batch_schedule
from megatron_a2d.config.settings import build
from megatron_a2d.config.skipped_samples import SkippedSamples
from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.diffusion.corruption import next_token
from megatron_a2d.training.resume import with_skipped
from megatron_a2d.utils.errors import UserError
from tests.unit.test_batch_schedule import parse, problems_of
from tests.unit.test_diffusion_samples import LENGTH, same, sample_of


def drawn_ranges() -> list[list[tuple[int, int]]]:
    draw = random.Random(0)
    found: list[list[tuple[int, int]]] = [[], [(0, 0)], [(0, 4), (5, 9)], [(3, 8), (5, 6)], [(7, 7), (9, 9)]]
    for _ in range(30):
        begins = [draw.randrange(60) for _ in range(draw.randint(1, 6))]
        found.append([(begin, begin + draw.randrange(12)) for begin in begins])
    return found


@pytest.mark.parametrize("ranges", drawn_ranges(), ids=str)
def test_places_and_indices(ranges: list[tuple[int, int]]) -> None:
    """Against a list of what remains; the ranges may overlap."""
    skipped = SkippedSamples.of(ranges)
    kept = [index for index in range(200) if not any(first <= index <= last for first, last in ranges)]
    assert [skipped.index_of(place) for place in range(100)] == kept[:100]
    assert [skipped.place_of(index) for index in kept[:100]] == list(range(100))
    assert SkippedSamples.read(skipped.texts()) == skipped
    pairs = itertools.pairwise(skipped.ranges)
    assert all(one.last + 1 < other.first for one, other in pairs), "merged"


@pytest.mark.parametrize("more", drawn_ranges()[:20], ids=str)
def test_only_samples_that_lie_ahead_are_skipped(more: list[tuple[int, int]]) -> None:
    old = SkippedSamples.of([(4, 6), (20, 22)])
    for consumed in (0, 1, 4, 5, 12, 17, 30):
        trained = {old.index_of(place) for place in range(consumed)}
        added = {index for first, last in more for index in range(first, last + 1)}
        if added & trained:
            with pytest.raises(ValueError, match=f"trained on samples up to {max(trained)}$"):
                old.with_more(SkippedSamples.of(more), consumed)
        else:
            together = old.with_more(SkippedSamples.of(more), consumed)
            assert [together.index_of(place) for place in range(consumed)] == sorted(trained)
            kept = [index for index in range(200) if index not in added | {4, 5, 6, 20, 21, 22}]
            assert [together.index_of(place) for place in range(60)] == kept[:60]


def test_what_a_resumed_run_may_skip() -> None:
    config = build({"skip_samples": ("16-23", "40-41"), "global_batch_size": 8})
    old = SkippedSamples.of([(4, 11)])
    assert with_skipped(config, old, 8).data.skip_samples == ("4-11", "16-23", "40-41")
    refusal = (
        r"--skip-samples 16-23 40-41: the run has trained on samples up to 23 until iteration 2; skip later ones, or "
        "resume from an earlier checkpoint with --ckpt-step"
    )
    with pytest.raises(UserError, match=refusal):
        with_skipped(config, old, 16)


class Data:
    def tokens(self, sample_index: int) -> Any:
        return np.full(4, sample_index)


@pytest.mark.parametrize(("dp_size", "micro", "workers"), [(1, 1, 0), (1, 2, 1), (2, 1, 0)])
def test_the_ranks_read_what_remains(dp_size: int, micro: int, workers: int) -> None:
    """Through a ramp, and from the middle of one."""
    skipped, sizes = SkippedSamples.of([(1, 2), (9, 9), (14, 30)]), batch_schedule(8, (4, 2, 12))
    arguments: dict[str, Any] = {
        "micro_batch_size": micro, "global_batch_size": 8, "dp_size": dp_size, "num_workers": workers, "skipped": skipped,
    }  # fmt: skip
    kept = [index for index in range(100) if index not in {1, 2, 9, *range(14, 31)}]
    for start in (0, 2):
        first = sizes.samples_before(start)
        ranks = [
            MicroBatches(Data(), lambda tokens, _: next_token(tokens), dp_rank=rank, start_sample=first, **arguments)
            for rank in range(dp_size)
        ]
        for iteration in range(start, 6):
            place = sizes.samples_before(iteration)
            size = sizes.batch_size_at(place)
            read = [batch for rank in ranks for batch in rank.iteration(size)]
            assert sorted(int(index) for batch in read for index in batch.sample_index) == kept[place : place + size]
            assert all((batch.tokens == batch.sample_index[:, None]).all() for batch in read)
        assert ranks[0].samples(4, 5).sample_index.tolist() == kept[4:9]
        for rank in ranks:
            rank.close()


def test_a_sample_is_what_it_is_without_the_others() -> None:
    """Its noise follows its index; what is scheduled by iterations follows the iteration that has it."""
    skip: dict[str, Any] = {"skip_samples": ("2-9",)}
    assert all(same(sample_of(index, **skip), sample_of(index)) for index in (0, 1, 10, 11))
    by_samples = {"conversion": "annealing", "attention_annealing_samples": 20}
    assert all(same(sample_of(index, **skip, **by_samples), sample_of(index, **by_samples)) for index in (0, 12))
    blocks = {"objective": "block", "block_length": 8, "block_length_schedule": "1:2,4:1"}
    lengths = [len(sample_of(index, **skip, **blocks).noise_segments) for index in (1, 10, 15, 16, 20)]  # type: ignore[arg-type]
    assert lengths == [LENGTH, LENGTH, LENGTH, LENGTH // 4, LENGTH // 8]
    grafted = {"conversion": "grafting", "grafting_iters": 2}
    assert [bool(sample_of(index, **skip, **grafted).weights.any()) for index in (10, 15, 16)] == [False, False, True]
    annealed = {"conversion": "annealing", "attention_annealing_iters": 4}
    thresholds = [sample_of(index, **skip, **annealed).annealing for index in (1, 11, 15, 16)]
    assert [value[1] * 4 / 2**53 for value in thresholds] == [1, 1, 2, 3]  # type: ignore[index]
    assert not same(sample_of(10, **annealed), sample_of(10, **skip, **annealed))


def test_texts_of_the_whole_run() -> None:
    run = {"global_batch_size": 8, "train_iters": 4}
    assert build(run).num_texts == 32 and build({**run, "skip_samples": ("8-15", "900-999")}).num_texts == 40
    assert build({**run, "skip_samples": ("8-15",), "complementary_masks": True}).num_texts == 20


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ("--skip-samples 5", "--skip-samples 5: '5' is not a range of sample indices FROM-TO"),
        ("--skip-samples 5-9 9-5", "'9-5' is not a range: it must end after its beginning"),
        ("--skip-samples 5--9", "is not a range of sample indices"),
        (f"--skip-samples 5-{2**53}", "must end after its beginning, and below 2**53"),
        ("--skip-samples 4-9 13-15 --complementary-masks", "--skip-samples 13-15: --complementary-masks pairs samples; use 12-15"),
        ("--skip-samples 4-8 --complementary-masks", "use 4-9"),
        ("--on-spike rollback", "--on-spike rollback: has no checkpoints to go back to without --save"),
        ("--max-rollbacks 2", "--max-rollbacks 2: has no effect without --on-spike rollback"),
        ("--on-spike rollback --save x --max-rollbacks 0", "--max-rollbacks 0: must be at least 1"),
        ("--on-spike stop", "must be one of continue, rollback"),
    ],
)  # fmt: skip
def test_what_cannot_be(argv: str, problem: str) -> None:
    assert [line for line in problems_of(*argv.split()) if problem in line], problems_of(*argv.split())


def test_a_recipe_s_ranges(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("skip_samples: [10-12, 5-11]\n")
    assert parse("--config", str(recipe)).skipped.texts() == ("5-12",)
    assert parse("--config", str(recipe), "--skip-samples", "7-7").skipped.texts() == ("7-7",)
