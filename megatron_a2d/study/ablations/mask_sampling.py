"""Ablation of masking: number of masked tokens, shape of the mask, document masking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import (
    MANY_COMPARISONS,
    Moments,
    mean_interval,
    paired_difference,
    ratio_interval,
    verdict,
)
from megatron_a2d.study.jobs import Job, Measure
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

BASELINE = "baseline"
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {"mask_sampling": "bernoulli", "mask_token_init": "pretrained", "reset_attention_mask": False},
    "exact count": {"mask_sampling": "exact_count"},
    "mean row": {"mask_token_init": "mean"},
    "isolated documents": {"reset_attention_mask": True},
}
ATTENTION = {"open": "NELBO, documents open", "isolated": "NELBO, documents isolated"}
MASK_SAMPLINGS = ("bernoulli", "exact_count")
NUM_GROUPS, BATCHES_PER_GROUP = 16, 8


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """One setting changed per variant; all are evaluated with and without document masking."""
    judged = tuple(Measure(kind, "likelihood", {"reset_attention_mask": kind == "isolated"}) for kind in ATTENTION)
    noise = tuple(
        Measure(
            f"gradients {kind}", "gradients", VARIANTS[BASELINE],
            {"batch_size": base.training.global_batch_size, "num_groups": NUM_GROUPS,
             "batches_per_group": BATCHES_PER_GROUP, "mask_sampling": kind},
        )
        for kind in MASK_SAMPLINGS
    )  # fmt: skip
    return [
        Job(
            f"{name.replace(' ', '_')}_seed{seed}",
            {"variant": name, "seed": seed},
            {**VARIANTS[BASELINE], **changes, "seed": seed},
            measures=judged + (noise if (name, seed) == (BASELINE, seeds[0]) else ()),
        )
        for seed in seeds
        for name, changes in VARIANTS.items()
    ]


def report(records: list[Record], images: Path) -> Report:
    groups = by_tag(records, "variant")
    values: dict[str, dict[str, dict[int, float]]] = {
        name: {
            "NELBO at the start": {seed: record["validation"][0]["nelbo"] for seed, record in runs.items()},
            **{
                title: {seed: record[kind]["nelbo"] for seed, record in runs.items()}
                for kind, title in ATTENTION.items()
            },
            "accuracy": {seed: final(record)["accuracy"] for seed, record in runs.items()},
        }
        for name, runs in groups.items()
    }
    columns = list(values[BASELINE])
    table = markdown_table(
        ["variant", "seeds", *columns],
        [
            [name, len(groups[name]), *(mean_interval(list(found[column].values())).format(3) for column in columns)]
            for name, found in values.items()
        ],
    )
    differences = markdown_table(
        ["against the baseline, same seed", *columns],
        [
            [name, *(paired_difference(found[column], values[BASELINE][column]).format(4) for column in columns)]
            for name, found in values.items()
            if name != BASELINE
        ],
    )
    first = next(iter(groups[BASELINE].values()))
    moments = [
        [Moments.of(group).variance for group in first[f"gradients {kind}"]["groups"]] for kind in MASK_SAMPLINGS
    ]
    ratio = ratio_interval(moments[1], moments[0])
    _draw(images / "masks.png", values, columns[1:3])
    text = (
        f"{table}\n{differences}\nNELBO, nats a token, of the same held-out samples under independent masks, whatever "
        "was trained with; accuracy on masked tokens and the NELBO at the start, each under its own document "
        "attention. Isolated documents have fewer tokens that can be masked: the two NELBO columns are of different "
        "tokens. ± is half of a 95% confidence interval over seeds (Student's t), in the second table of the "
        f"differences pair by pair. {MANY_COMPARISONS}\n\n"
        "Variance of a batch's gradient at the end of the baseline, exact count over independent masks: "
        f"{ratio.format(3)} ({NUM_GROUPS * BATCHES_PER_GROUP} batches, by-index times for both; 95% interval by a "
        "jackknife).\n\n"
        f"{_findings(values)}\n"
        "![results](masks.png)\n"
    )
    rows: list[Record] = [
        {"variant": name, "seed": seed, **{column: values[name][column][seed] for column in columns}}
        for name, runs in groups.items()
        for seed in runs
    ]
    rows.append({"gradient variance, exact count over bernoulli": list(ratio)})
    return Report(text, rows)


def _findings(values: dict[str, dict[str, dict[int, float]]]) -> str:
    """One line per variant and column, with the interval over seeds."""
    return "".join(
        f"- {name}, {column}: {verdict(paired_difference(found[column], values[BASELINE][column]))}\n"
        for name, found in values.items()
        if name != BASELINE
        for column in found
    )


def _draw(path: Path, values: dict[str, dict[str, dict[int, float]]], columns: Sequence[str]) -> None:
    with figure(path, len(columns)) as axes:
        for axis, column in zip(axes, columns, strict=True):
            for place, found in enumerate(values.values()):
                mean = mean_interval(list(found[column].values()))
                width = mean.half_width if mean.num_values > 1 else 0.0
                axis.errorbar([place], [mean.mean], [width], fmt="o", capsize=4)
                axis.plot([place + 0.15] * mean.num_values, list(found[column].values()), ".", color="gray")
            axis.set_xticks(range(len(values)), list(values), fontsize=7)
            axis.set_title(column)


STUDY = Study(
    name="masks",
    title="Masks",
    question="""
Three choices, each against the same baseline (every token masked by a chance of its own, the mask token's row of the
embedding as pretraining left it, documents of a sample open to one another): exactly the share of tokens that the time
asks for; the mean of all rows in the place of the mask token's; documents isolated from one another.
""",
    plan=plan,
    report=report,
)
