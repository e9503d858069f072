"""Batch sizes over a run: Megatron's ramp, files of pairs, and what is counted in samples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_a2d.config.batch_schedule import BatchSchedule, Stage, batch_schedule, read_pairs
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.data.dataloader import MicroBatches
from megatron_a2d.diffusion.corruption import next_token
from megatron_a2d.training.gradient_noise import small_batch_size
from tests.unit.test_diffusion_samples import LENGTH, same, sample_of

# START, INCREMENT, SAMPLES, --global-batch-size: even and uneven parts; parts of less than a batch, and of less than a
# sample, whose stages are skipped; divisions that floats round down (10 / 3, 3 of 49).
RAMPS = [(8, 8, 96, 32), (4, 2, 12, 8), (2, 1, 10, 5), (1, 1, 49, 50), (16, 16, 7, 64), (1, 1, 2, 5), (3, 5, 1000, 18)]


def drawn_ramps() -> list[tuple[int, int, int, int]]:
    draw = random.Random(0)
    ramps = []
    for _ in range(100):
        start, increment = draw.randint(1, 40), draw.randint(1, 20)
        ramps.append((start, increment, draw.randint(1, 3000), start + increment * draw.randint(1, 30)))
    return ramps


def walked(schedule: BatchSchedule, iterations: int) -> list[tuple[int, int]]:
    """First sample and batch size of each iteration, counted one by one."""
    found, sample = [], 0
    for _ in range(iterations):
        size = next(stage.batch_size for stage in reversed(schedule.stages) if stage.first_sample <= sample)
        found.append((sample, size))
        sample += size
    return found


@pytest.mark.parametrize("ramp", [*RAMPS, *drawn_ramps()], ids=str)
def test_a_ramp_is_megatrons(ramp: tuple[int, int, int, int]) -> None:
    """At every iteration, until some after the end of the ramp."""
    start, increment, samples, full = ramp
    theirs = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 0, start, increment, samples)
    ours = batch_schedule(full, (start, increment, samples))
    consumed = iteration = 0
    while consumed <= samples + 3 * full:
        theirs.update(consumed, consistency_check=True)
        size = theirs.get_current_global_batch_size()
        assert (ours.batch_size_at(consumed), ours.iteration_of(consumed)) == (size, iteration)
        assert ours.samples_before(iteration) == consumed
        consumed, iteration = consumed + size, iteration + 1
    assert ours.spans[-1].batch_size == full


@pytest.mark.parametrize(("samples", "count"), [(3, 59), (5, 29), (7, 100)])
def test_stages_begin_where_megatrons_division_of_floats_puts_them(samples: int, count: int) -> None:
    """Which is not always where the exact quotient lies: here a stage begins a sample later."""
    theirs = RampupBatchsizeNumMicroBatchesCalculator(1 + count, 1, 1, False, 0, 1, 1, samples)
    sizes = []
    for consumed in range(samples + 1):
        theirs.update(consumed, consistency_check=False)
        sizes.append(theirs.get_current_global_batch_size())
    assert sizes != [1 + consumed * count // samples for consumed in range(samples + 1)]
    stages = batch_schedule(1 + count, (1, 1, samples)).stages
    ours = [next(stage.batch_size for stage in reversed(stages) if stage.first_sample <= n) for n in range(samples + 1)]
    assert ours == sizes


@pytest.mark.parametrize("stages", [((0, 3),), ((0, 4), (10, 6), (11, 2), (13, 5)), ((0, 2), (5, 2), (7, 9), (100, 1))])
def test_iterations_and_samples_determine_one_another(stages: tuple[tuple[int, int], ...]) -> None:
    schedule = BatchSchedule(tuple(Stage(*stage) for stage in stages))
    for iteration, (first, size) in enumerate(walked(schedule, 40)):
        assert schedule.samples_before(iteration) == first
        for sample in range(first, first + size):
            assert schedule.iteration_of(sample) == iteration and schedule.batch_size_at(sample) == size
            assert schedule.iterations_within(sample) == iteration
    assert schedule.is_constant == (len({size for _, size in walked(schedule, 200)}) == 1)


def test_pairs_of_a_file(tmp_path: Path) -> None:
    """A batch that is due in the middle of an iteration begins with the next one."""
    path = tmp_path / "batches.csv"
    path.write_text(
        "\ufeffsamples,batch\n\n0, 16   # the critical batch at the start\n40 32\n1_000,\t64\r\n", encoding="utf-8"
    )
    pairs = read_pairs(str(path))
    assert pairs == "0:16,40:32,1000:64" == read_pairs(pairs) and read_pairs("") == ""
    schedule = batch_schedule(64, (), pairs)
    assert [(span.iteration, span.sample, span.batch_size) for span in schedule.spans] == [(0, 0, 16), (3, 48, 32), (33, 1008, 64)]  # fmt: skip
    config = parse("--batch-schedule", str(path), "--global-batch-size", "64")
    assert config.training.batch_schedule == pairs and config.batch_sizes == schedule
    path.write_text("0 8")
    assert build(config.to_dict()).batch_sizes == schedule, "a record of a run needs no file"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("0 16\nmany 32\n", "line 2: 'many 32' is not two whole numbers"),
        ("0 16\n32\n", "line 2: '32' is not two whole numbers"),
        ("0 16\n32 64 128\n", "line 2: '32 64 128' is not"),
        ("0 16\n-3 64\n", "line 2: '-3 64' is not"),
        ("0 16\n1.5 64\n", "line 2: '1.5 64' is not"),
        ("samples batch\nsamples batch\n", "line 2: 'samples batch' is not"),
        ("# nothing\n5 16\n", "line 2: begins at sample 5; the first batch size must be that of sample 0"),
        ("0 16\n\n10 0\n", "line 3: the batch size from sample 10 on must be at least 1"),
        ("0 16\n10 32\n10 64\n", "line 3: sample 10 does not come after sample 10"),
        (f"0 16\n{2**53} 32\n", "line 2: 9007199254740992 is too large"),
        ("# nothing\n", "holds no pairs"),
        ("\n".join(f"{number} 16" for number in range(10_001)), "holds 10001 pairs; at most 10000"),
        ("0 16\n40 32\n", "ends with a batch of 32, --global-batch-size is 64; make them equal"),
        (None, "the schedule is missing; check the path"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_schedule(content: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "batches.txt"
    if content is not None:
        path.write_text(content)
    assert f"--batch-schedule {path}: {problem}" in "\n".join(problems_of("--batch-schedule", str(path))).replace(
        "--batch-schedule 0:16,40:32", f"--batch-schedule {path}"
    )


def parse(*argv: str) -> RunConfig:
    return parse_run(Parser(), ["--load", "x", "--train-data-path", "y", *argv])[0]


def problems_of(*argv: str, processes: int = 1) -> list[str]:
    from megatron_a2d.utils.errors import UserError

    try:
        return find_problems(parse("--global-batch-size", "64", *argv), None, processes)
    except UserError as error:
        return list(error.problems)


@pytest.mark.parametrize(
    ("argv", "processes", "problem"),
    [
        ("--rampup-batch-size 16 8", 1, "--rampup-batch-size: expected 3 arguments"),
        ("--rampup-batch-size 16 8 many", 1, "--rampup-batch-size 16 8 many: must be a whole number"),
        ("--rampup-batch-size 0 8 100", 1, "--rampup-batch-size 0 8 100: START, INCREMENT and SAMPLES must be at least 1"),
        ("--rampup-batch-size 64 8 100", 1, "START must be below --global-batch-size 64"),
        ("--rampup-batch-size 16 9 100", 1, "INCREMENT does not divide the 48 samples from START to --global-batch-size 64"),
        ("--rampup-batch-size 16 8 9007199254740992", 1, "numbers must be below 2**53"),
        ("--rampup-batch-size 1 1 100 --global-batch-size 20001", 1, "has 20000 increments; fewer than 10000"),
        ("--rampup-batch-size 16 8 100 --batch-schedule 0:64", 1, "are different schedules of one run"),
        # A layout has to hold every batch, also one that this run would not reach.
        ("--rampup-batch-size 8 8 700 --micro-batch-size 4", 4, "--global-batch-size 8, from sample 0 (iteration 0) on: is not a multiple of --micro-batch-size 4 x 4"),
        ("--rampup-batch-size 16 8 600 --train-samples 64", 16, "--global-batch-size 24, from sample 112 (iteration 7) on: is not a multiple of --micro-batch-size 1 x 16"),
        ("--batch-schedule 0:64,640:40,700:64 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 16, "--global-batch-size 40, from sample 640 (iteration 10) on: the interleaved schedule needs a multiple of 2 micro-batches, not 5; use a multiple of 16"),
        ("--batch-schedule 0:2,20:5,35:64 --complementary-masks", 1, "--complementary-masks True: needs an even --global-batch-size, not 5 from sample 20 on"),
        ("--rampup-batch-size 16 8 600 --cuda-graph-impl transformer_engine --pipeline-model-parallel-size 2", 2, "--cuda-graph-impl transformer_engine: the graphs of a pipeline"),
        # The length of the run.
        ("--train-iters 10 --train-samples 640", 1, "--train-iters 10, --train-samples 640: are different lengths of one run"),
        ("--train-samples 640 --train-tokens 100000", 1, "--train-samples 640, --train-tokens 100000: are different"),
        ("--train-samples 0", 1, "--train-samples 0: must be at least 1"),
        ("--train-iters 0", 1, "--train-iters 0: must be at least 1"),
        ("--train-samples 63", 1, "--train-samples 63: 63 samples are less than the first global batch of 64"),
        ("--train-tokens 262143 --seq-length 4096", 1, "--train-tokens 262143: 63 samples are less than"),
        ("--train-samples 640 --profile --save z", 1, "--profile-step-end 12: exceeds the 10 iterations of --train-samples 640"),
        # The learning rate has the unit of the length.
        ("--train-samples 640 --lr-warmup-iters 3", 1, "--lr-warmup-iters 3: with --train-samples 640 this is --lr-warmup-samples; use that, with 192"),
        ("--train-samples 96 --rampup-batch-size 16 16 64 --lr-decay-style WSD --lr-wsd-decay-iters 1", 1, "--lr-wsd-decay-iters 1: with --train-samples 96 this is --lr-wsd-decay-samples; use that, with 32"),
        ("--train-iters 10 --lr-warmup-samples 3", 1, "--lr-warmup-samples 3: with --train-iters 10 this is --lr-warmup-iters; use that, or --train-samples"),
        ("--train-samples 640 --lr-warmup-samples 640", 1, "--lr-warmup-samples 640: the warm-up does not end within --train-samples 640"),
        ("--train-samples 640 --lr-decay-style WSD --lr-wsd-decay-samples 641", 1, "--lr-wsd-decay-samples 641: WSD's final decay must be at least 1 and fit into --train-samples 640"),
        ("--train-samples 640 --lr-wsd-decay-samples 64", 1, "--lr-wsd-decay-samples 64: has no effect with --lr-decay-style cosine"),
        ("--lr-warmup-samples -1", 1, "--lr-warmup-samples -1: must not be negative"),
        # Schedules of the objective have either.
        ("--objective block --block-length 8 --block-length-schedule 1:2 --block-length-schedule-samples 1:9", 1, "are two schedules of one run"),
        ("--objective block --block-length 8 --block-length-schedule-samples 1:x", 1, "'1:x' is not LENGTH:SAMPLES"),
        ("--train-samples 640 --objective block --block-length 8 --block-length-schedule-samples 1:640", 1, "its 640 samples leave none of --train-samples 640"),
        ("--block-length-schedule-samples 1:9", 1, "has no effect without --objective block"),
        ("--conversion annealing", 1, "--attention-annealing-iters 0: --conversion annealing needs at least 1"),
        ("--conversion annealing --attention-annealing-samples -5", 1, "--conversion annealing needs at least 1"),
        ("--conversion grafting --grafting-samples 5 --grafting-iters 5", 1, "--grafting-samples 5: --grafting-iters is given too"),
        ("--grafting-samples 5", 1, "--grafting-samples 5: has no effect without --conversion grafting"),
    ],
)  # fmt: skip
def test_what_cannot_be(argv: str, processes: int, problem: str) -> None:
    found = [line for line in problems_of(*argv.split(), processes=processes) if problem in line]
    assert len(found) == 1 and "\n" not in found[0], problems_of(*argv.split(), processes=processes)


def test_a_recipe_s_length_gives_way_to_a_flag_s(tmp_path: Path) -> None:
    """In another unit too: what has been given last counts, and two of one source contradict each other."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_iters: 100\nlr_warmup_iters: 10\nrampup_batch_size: [16, 8, 600]\nglobal_batch_size: 64\n")
    flags = ("--train-tokens", "8_192_000", "--seq-length", "4096", "--lr-warmup-samples", "320")
    config = parse("--config", str(recipe), *flags, "--batch-schedule", "0:32,64:64")
    assert config.lr_schedule == (2000, 320, 0) and config.train_samples == 2000
    assert config.num_iterations == 2 + (2000 - 64) // 64 and config.num_samples == 64 + 30 * 64
    assert not find_problems(config, None, 1)
    whole = tmp_path / "whole.yaml"
    whole.write_text("".join(f"{name}: {value!r}\n" for name, value in config.to_dict().items() if isinstance(value, str | int)) + "train_iters: null\n")  # fmt: skip
    assert parse("--config", str(recipe), str(whole)).lr_schedule == (2000, 320, 0)
    assert parse("--config", str(whole), "--train-iters", "7").training.train_tokens is None


def test_the_ranks_read_the_samples_in_order() -> None:
    """Whatever the layout, an iteration of a ramp is the next samples."""

    class Data:
        def tokens(self, sample_index: int) -> Any:
            import numpy as np

            return np.full(4, sample_index)

    sizes = batch_schedule(8, (4, 2, 12))
    for dp_size, micro in ((1, 1), (1, 2), (2, 1)):
        arguments: dict[str, Any] = {
            "micro_batch_size": micro,
            "global_batch_size": 8,
            "dp_size": dp_size,
            "num_workers": 0,
        }
        ranks = [
            MicroBatches(Data(), lambda tokens, _: next_token(tokens), dp_rank=rank, **arguments)
            for rank in range(dp_size)
        ]  # fmt: skip
        for iteration in range(6):
            first, size = sizes.samples_before(iteration), sizes.batch_size_at(sizes.samples_before(iteration))
            read = [batch.sample_index for rank in ranks for batch in rank.iteration(size)]
            assert sorted(index for indices in read for index in indices.tolist()) == list(range(first, first + size))


RAMP = {"global_batch_size": 8, "rampup_batch_size": (4, 2, 12)}


def test_a_sample_knows_its_iteration() -> None:
    """Iterations of 4, 4, 6, 8 and 8 samples."""
    schedule = {"objective": "block", "block_length": 8, "block_length_schedule": "1:2,4:1,40:1", **RAMP}
    lengths = [len(sample_of(index, **schedule).noise_segments) for index in (0, 7, 8, 13, 14, 21, 22)]  # type: ignore[arg-type]
    assert lengths == [LENGTH, LENGTH, LENGTH // 4, LENGTH // 4, 1, 1, LENGTH // 8]
    grafts = {"conversion": "grafting", **RAMP}
    for settings in ({"grafting_iters": 2}, {"grafting_samples": 5}, {"grafting_samples": 8}):
        assert build({**grafts, **settings}).grafting_iters == 2
        silent = [index for index in range(16) if not sample_of(index, **grafts, **settings).weights.any()]
        assert silent == list(range(8)), "whole iterations"


def test_schedules_in_samples_do_not_see_the_batch() -> None:
    """A sample is the same in a ramp and in runs of any constant batch."""
    for settings in (
        {},
        {"conversion": "annealing", "attention_annealing_samples": 12},
        {"objective": "block", "block_length": 8, "block_length_schedule_samples": "1:3,4:7"},
        {"objective": "block", "block_length": 8, "block_length_schedule_samples": "1:3", "complementary_masks": True},
    ):
        for index in range(14):
            in_a_ramp = sample_of(index, **settings, **RAMP)
            assert all(same(in_a_ramp, sample_of(index, **settings, global_batch_size=size)) for size in (2, 8, 64))
    by_sample = {"objective": "block", "block_length": 8, "block_length_schedule_samples": "1:3,4:7"}
    lengths = [len(sample_of(index, **by_sample).noise_segments) for index in (2, 3, 9, 10)]  # type: ignore[arg-type]
    assert lengths == [LENGTH, LENGTH // 4, LENGTH // 4, LENGTH // 8]
    pair = {**by_sample, "complementary_masks": True}
    assert len(sample_of(3, **pair).noise_segments) == LENGTH, "both samples of a text have its blocks"  # type: ignore[arg-type]
    annealed = {"conversion": "annealing", "attention_annealing_samples": 12}
    keys = [sample_of(index, **annealed).annealing for index in (2, 5, 11)]
    assert keys[2] is None and [key[1] * 12 / 2**53 for key in keys[:2]] == [3, 6]  # type: ignore[index]
    constant = {"conversion": "annealing", "global_batch_size": 4}
    last_of_an_iteration = sample_of(7, **constant, attention_annealing_samples=12)
    assert same(last_of_an_iteration, sample_of(7, **constant, attention_annealing_iters=3))


def test_the_small_batch_of_the_noise_scale_follows_the_ramp() -> None:
    config = build({"micro_batch_size": 4})
    assert [small_batch_size(config, count) for count in (1, 2, 4, 8)] == [(1, 1), (1, 1), (1, 4), (1, 4)]
