"""Ablation of block lengths: full attention or blocks, short, long or lengthened, with and without an AR co-loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import MANY_COMPARISONS, mean_interval, paired_difference, verdict
from megatron_a2d.study.jobs import BASE, Job, Measure, ar_settings
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

LENGTHS = (4, 32)
SCP, SHORT, LONG, LENGTHENED = "SCP", "block 4", "block 32", "block 1 to 32"
CO_LOSS = " + AR"
AR_LOSS_WEIGHT = 1.0  # as in launch/recipes/objectives/block_ar.yaml
TOKENS_PER_PASS = (1, 2, 4, 8, 16)
NUM_TEXTS, NUM_HOLES = 32, 128
# A rank samples with one chunk of the model on whole sequences.
_UNSPLIT = {"num_virtual_stages_per_pipeline_rank": 1, "context_parallel_size": 1}


class Variant(NamedTuple):
    """A run's changes to the base run, and the blocks in which its model is measured."""

    changes: dict[str, Any]
    block_length: int
    ar_loss_weight: float = 0.0

    @property
    def blocks(self) -> dict[str, Any]:
        return {"objective": "block", "block_length": self.block_length, "ar_loss_weight": self.ar_loss_weight}


def lengthening(train_iters: int) -> str:
    """Block lengths 1, 2, 4, 8, 16 over the first half of a run, equally long each (--block-length-schedule)."""
    iterations = max(1, train_iters // 10)
    lengths = [2**power for power in range(5)][: (train_iters - 1) // iterations]
    return ",".join(f"{length}:{iterations}" for length in lengths)


def variants(base: RunConfig) -> dict[str, Variant]:
    """SCP, whose one block is the whole text, and three ways with blocks, each without and with the co-loss."""
    found = {SCP: Variant({}, base.data.seq_length)}
    schedule = {"block_length_schedule": lengthening(base.num_iterations)}
    for weight in (0.0, AR_LOSS_WEIGHT):
        for name, length, changes in ((SHORT, 4, {}), (LONG, 32, {}), (LENGTHENED, 32, schedule)):
            blocks = Variant({}, length, weight)
            found[name + (CO_LOSS if weight else "")] = blocks._replace(changes=blocks.blocks | changes)
    return found


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """Every variant with every seed, at equal tokens; before them the autoregressive model."""
    causal = Measure("ar", "likelihood", ar_settings(base))
    # As a block diffusion model it has blocks of one token.
    one_by_one = Variant({}, 1, AR_LOSS_WEIGHT).blocks | {"label_shift": True}
    jobs = [
        Job(
            "before", {"variant": "", "seed": seeds[0]}, {"seed": seeds[0]}, trains=False,
            measures=(causal, _generation(one_by_one, (1,), 0)),
        )
    ]  # fmt: skip
    for seed in seeds:
        for name, variant in variants(base).items():
            own = _UNSPLIT | variant.blocks
            measures = (
                causal,
                Measure("infill", "infill", own),
                *(Measure(f"block {length}", "likelihood", own, {"block_length": length}) for length in LENGTHS),
                _generation(variant.blocks, TOKENS_PER_PASS, NUM_HOLES),
            )
            tags = {"variant": name, "seed": seed}
            jobs.append(Job(f"{_slug(name)}_seed{seed}", tags, {**variant.changes, "seed": seed}, BASE, measures))
    return jobs


def _generation(blocks: dict[str, Any], tokens_per_pass: Sequence[int], num_holes: int) -> Measure:
    options = {
        "reference": BASE, "tokens_per_pass": list(tokens_per_pass), "num_texts": NUM_TEXTS, "num_holes": num_holes,
    }  # fmt: skip
    return Measure("generation", "generation", _UNSPLIT | blocks, options)


def _slug(name: str) -> str:
    return name.lower().replace(CO_LOSS.lower(), "_ar").replace(" ", "_")


def _block_nelbo(length: int) -> Callable[[Record], float]:
    return lambda record: record[f"block {length}"]["nelbo"]


_COLUMNS: dict[str, Callable[[Record], float]] = {
    "NELBO, own attention": lambda record: final(record)["nelbo"],
    **{f"block NELBO, {length}": _block_nelbo(length) for length in LENGTHS},
    "AR perplexity": lambda record: math.exp(record["ar"]["nelbo"]),
    "infilling from both sides": lambda record: record["infill"]["accuracy"],
    "infilling as sampled": lambda record: record["generation"]["infill_accuracy"],
}


class Point(NamedTuple):
    """A model's text at one speed."""

    tokens_per_pass: float
    nll: float  # nats/token by the autoregressive model
    entropy: float  # of a text's tokens, nats


def course(record: Record) -> list[Point]:
    """Text at each speed, without those that a short block makes equal."""
    points = {round(item["tokens_per_pass"], 6): Point(**item) for item in record["generation"]["courses"]}
    return list(points.values())


def fastest(points: Sequence[Point], nll: float) -> float:
    """The most tokens per forward pass at which the text's loss is `nll` or less, by rising speed.

    Interpolated over the logarithm of the speed; the highest measured speed if its text is good enough; nan if none is.
    """
    good = [place for place, point in enumerate(points) if point.nll <= nll]
    if not good:
        return math.nan
    slow, *rest = points[good[-1] :]
    if not rest:
        return slow.tokens_per_pass
    share = (nll - slow.nll) / (rest[0].nll - slow.nll)
    return slow.tokens_per_pass * (rest[0].tokens_per_pass / slow.tokens_per_pass) ** share


Groups = dict[str, dict[int, Record]]
Values = dict[str, dict[int, float]]


def speeds(groups: Groups) -> Values:
    """Tokens per forward pass of each variant and seed at the quality that every variant of the seed reaches.

    That is the quality of the worst at one token per forward pass, so that none has fewer.
    """
    courses = {name: {seed: course(record) for seed, record in runs.items()} for name, runs in groups.items()}
    common = {seed: max(runs[seed][0].nll for runs in courses.values()) for seed in next(iter(courses.values()))}
    return {
        name: {seed: fastest(points, common[seed]) for seed, points in runs.items()} for name, runs in courses.items()
    }


EQUAL_QUALITY = "tokens per forward pass"


def report(records: list[Record], images: Path) -> Report:
    before, *runs = records
    groups: Groups = by_tag(runs, "variant")
    values: dict[str, Values] = {
        column: {name: {seed: read(record) for seed, record in of.items()} for name, of in groups.items()}
        for column, read in _COLUMNS.items()
    }
    values[EQUAL_QUALITY] = speeds(groups)
    shown = {**dict.fromkeys(values, ""), "AR perplexity": f"{math.exp(before['ar']['nelbo']):.3f}"}
    table = markdown_table(
        ["variant", "seeds", *values],
        [
            ["before conversion", "", *shown.values()],
            *(
                [name, len(of), *(mean_interval(list(found[name].values())).format(3) for found in values.values())]
                for name, of in groups.items()
            ),
        ],
    )
    text = before["generation"]["text"]
    _draw(images / "block.png", groups, values)
    page = (
        f"{table}\nNELBO, nats/token, of the same held-out text: with the attention of training, and in blocks of "
        f"{' and '.join(map(str, LENGTHS))} tokens. AR perplexity: of the same weights under the causal mask. "
        "Infilling of 16 tokens, share restored: all at once under full attention; one per forward pass as the model "
        "samples, seeing the text before and the rest of the block that the hole ends in. Tokens per forward pass: at "
        "the quality that all variants of a seed reach, from the next table. ± is half of a 95% confidence interval "
        f"over seeds (Student's t). {MANY_COMPARISONS}\n\n"
        f"{_quality(before, groups)}\n"
        "Continuations of held-out text at temperature 1: loss by the autoregressive model that the study began with, "
        "nats/token, and the entropy of a text's tokens, by tokens per forward pass. Held-out text itself: "
        f"{text['nll']:.3f}, {text['entropy']:.3f}. A block of 4 allows no more than 4 tokens per forward pass.\n\n"
        f"{''.join(_findings(values))}\n![results](block.png)\n"
    )
    rows: list[Record] = [
        {
            "variant": name, "seed": seed, **{column: found[name][seed] for column, found in values.items()},
            "text": [point._asdict() for point in course(record)],
        }
        for name, of in groups.items() for seed, record in of.items()
    ]  # fmt: skip
    first = {
        "variant": "before conversion", "AR perplexity": math.exp(before["ar"]["nelbo"]),
        "text": before["generation"]["courses"], "held out": text,
    }  # fmt: skip
    return Report(page, [first, *rows])


def _quality(before: Record, groups: Groups) -> str:
    """Loss and entropy of texts by tokens per forward pass."""
    (alone,) = course(before)
    rows = [["before conversion", f"{alone.nll:.3f}, {alone.entropy:.3f}"] + [""] * (len(TOKENS_PER_PASS) - 1)]
    for name, of in groups.items():
        cells = []
        for at in zip(*(course(record) for record in of.values()), strict=True):
            nll, entropy = (mean_interval([getattr(point, name) for point in at]) for name in ("nll", "entropy"))
            cells.append(f"{nll.format(3)}, {entropy.mean:.3f}")
        rows.append([name, *cells, *[""] * (len(TOKENS_PER_PASS) - len(cells))])
    return markdown_table(["variant", *map(str, TOKENS_PER_PASS)], rows)


def _findings(values: dict[str, Values]) -> Iterator[str]:
    """Paired by seed: blocks against SCP and against one another, and with against without co-loss."""
    comparisons = {
        "against SCP": [(name, SCP) for name in (SHORT, LONG, LENGTHENED)],
        f"against {LONG}": [(SHORT, LONG), (LENGTHENED, LONG)],
        "with against without AR co-loss": [(name + CO_LOSS, name) for name in (SHORT, LONG, LENGTHENED)],
    }
    for column, found in values.items():
        for against, pairs in comparisons.items():
            told = [f"{name} {verdict(paired_difference(found[name], found[other]))}" for name, other in pairs]
            yield f"- {column}, {against}: {'; '.join(told)}\n"


def _draw(path: Path, groups: Groups, values: dict[str, Values]) -> None:
    with figure(path, 2, size=(6.0, 4.4)) as axes:
        for number, (name, of) in enumerate(groups.items()):
            color, style = f"C{number if number < 4 else number - 3}", "--" if name.endswith(CO_LOSS) else "-"
            by_speed = list(zip(*(course(record) for record in of.values()), strict=True))
            axes[0].plot(
                [mean_interval([point.tokens_per_pass for point in at]).mean for at in by_speed],
                [mean_interval([point.nll for point in at]).mean for at in by_speed],
                "o" + style, color=color, label=name,
            )  # fmt: skip
            axes[1].plot(
                list(values["AR perplexity"][name].values()), list(values["NELBO, own attention"][name].values()),
                "s" if style == "--" else "o", color=color, label=name,
            )  # fmt: skip
        axes[0].set_xscale("log", base=2)
        axes[0].set_xlabel("tokens per forward pass")
        axes[0].set_title("loss of drawn text by the AR model, nats/token")
        axes[1].set_xlabel("AR perplexity after conversion")
        axes[1].set_title("held-out NELBO, own attention, nats/token")
        axes[1].legend(fontsize=7)


STUDY = Study(
    name="block",
    title="Block lengths",
    question="""
From one autoregressive checkpoint, at equal tokens: SCP (the whole text is one block), blocks of 4 tokens, of 32, and
growing from 1 to 32 (doubled at equal intervals over the first half of training); blocks without and with a next-token
loss on the clean text, under which finished blocks attend causally. What does a shorter block gain in likelihood, what
remains of the autoregressive model, and how many tokens does a forward pass give at equal quality?
""",
    plan=plan,
    report=report,
)
