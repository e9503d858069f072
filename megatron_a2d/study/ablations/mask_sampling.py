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
    "mean embedding": {"mask_token_init": "mean"},
    "document masking": {"reset_attention_mask": True},
}
ATTENTION = {"open": "NELBO, no document masking", "isolated": "NELBO, document masking"}
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
        f"{table}\n{differences}\nNELBO, nats/token, of the same held-out samples under independent masks for all "
        "variants; accuracy on masked tokens and the NELBO at the start use the variant's own document masking. With "
        "document masking fewer tokens are maskable: the two NELBO columns are over different tokens. ± is half of a "
        "95% confidence interval over seeds (Student's t), in the second table of the paired differences. "
        f"{MANY_COMPARISONS}\n\n"
        "Variance of a batch's gradient at the end of the baseline, ratio of exact count to independent masks: "
        f"{ratio.format(3)} ({NUM_GROUPS * BATCHES_PER_GROUP} batches, low-discrepancy times for both; 95% jackknife "
        "interval).\n\n"
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
    title="Mask counts, mask embedding and document masking",
    question="""
Three choices, each against one baseline (independent masking, the mask token's embedding as pretrained, attention
across documents): exact mask counts; the mean embedding for the mask token; document masking.
""",
    plan=plan,
    report=report,
)
