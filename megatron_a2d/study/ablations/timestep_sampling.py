"""Ablation of timestep sampling: its contribution to the variance of a batch's loss and gradient."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import Moments, ratio_interval
from megatron_a2d.study.jobs import BASE, Job, Measure
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study

SCHEMES = {
    "iid": "independent",
    "antithetic": "antithetic pairs",
    "stratified": "low discrepancy by batch (MDLM)",
    "by_index": "low discrepancy by index (ours)",
    "complementary": "by index, complementary masks",
}
MODES = {False: "data and noise", True: "noise alone"}
NUM_GROUPS, BATCHES_PER_GROUP = 16, 8


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """All schemes at half and twice the recipe's batch size, before and after SCP; one seed, many batches."""
    # Even, for pairs of complements.
    sizes = [2 * max(1, base.training.global_batch_size // 4), 2 * base.training.global_batch_size]
    measures = tuple(
        Measure(
            f"{scheme} {size} {MODES[same]}", "gradients",
            {"micro_batch_size": min(size, base.training.micro_batch_size), "global_batch_size": size,
             "rampup_batch_size": [], "batch_schedule": ""},
            {"batch_size": size, "num_groups": NUM_GROUPS, "batches_per_group": BATCHES_PER_GROUP, "scheme": scheme,
             "same_tokens": same},
        )
        for size in sizes for same in MODES for scheme in SCHEMES
    )  # fmt: skip
    tags = {"seed": seeds[0]}
    return [
        Job("before", tags | {"checkpoint": "before SCP"}, {"seed": seeds[0]}, BASE, measures, trains=False),
        Job("scp", tags | {"checkpoint": "after SCP"}, {"seed": seeds[0]}, BASE, measures),
    ]


class Variances(NamedTuple):
    """Variances by group of batches, for paired comparisons of schemes."""

    gradient: list[float]
    loss: list[float]


def variances(moments: Record) -> Variances:
    count = moments["groups"][0]["count"]
    pieces = [moments["losses"][first : first + count] for first in range(0, len(moments["losses"]), count)]
    return Variances(
        [Moments.of(group).variance for group in moments["groups"]],
        [statistics.variance(piece) for piece in pieces],
    )


def report(records: list[Record], images: Path) -> Report:
    lines, rows = [], []
    sizes = sorted({value["batch_size"] for value in records[0].values() if isinstance(value, dict)})
    for record in records:
        for size in sizes:
            for mode in MODES.values():
                of_scheme = {scheme: variances(record[f"{scheme} {size} {mode}"]) for scheme in SCHEMES}
                for scheme, name in SCHEMES.items():
                    line = [record["checkpoint"], size, mode, name]
                    row: Record = {"checkpoint": record["checkpoint"], "batch": size, "varied": mode, "scheme": scheme}
                    for quantity in Variances._fields:
                        ours, theirs, plain = (
                            getattr(of_scheme[other], quantity) for other in (scheme, "iid", "by_index")
                        )
                        row[quantity] = statistics.fmean(ours)
                        found_ratio = ratio_interval(ours, theirs)
                        row[f"{quantity}_ratio"] = list(found_ratio)
                        if scheme == "complementary":
                            row[f"{quantity}_to_by_index"] = list(ratio_interval(ours, plain))
                        line += [f"{row[quantity]:.4g}", "1" if scheme == "iid" else found_ratio.format(2)]
                    lines.append(line)
                    rows.append(row)
    table = markdown_table(
        [
            "checkpoint",
            "batch",
            "varied",
            "times",
            "variance of the gradient",
            "ratio",
            "variance of the loss",
            "ratio",
        ],
        lines,
    )
    _draw(images / "time-sampling.png", rows)
    batches = NUM_GROUPS * BATCHES_PER_GROUP
    text = (
        f"{table}\nVariance over {batches} batches: of the gradient, summed over all parameters (tr V); of the loss, "
        f"in (nats/token)^2; ratio to independent times, with a 95% interval (jackknife over {NUM_GROUPS} groups). All "
        "schemes but the last use the same tokens and the same uniform numbers for the masks; with complementary masks "
        "a batch has half as many texts, each twice, under a mask and its complement. With noise alone, every batch "
        "holds the same tokens, and only times and masks are resampled.\n\n"
        f"{_findings(rows)}\n![results](time-sampling.png)\n"
    )
    return Report(text, rows)


def _findings(rows: list[Record]) -> str:
    """Per scheme and quantity, the number of settings in which it differs from independent timesteps."""
    compared = [(scheme, "ratio", "independent times") for scheme in SCHEMES if scheme != "iid"]
    compared.append(("complementary", "to_by_index", "the same times without complements"))
    lines = []
    for scheme, column, baseline in compared:
        for quantity in Variances._fields:
            ratios = [row[f"{quantity}_{column}"] for row in rows if row["scheme"] == scheme]
            lower, higher = sum(high < 1 for _, _, high in ratios), sum(low > 1 for _, low, _ in ratios)
            values = sorted(value for value, _, _ in ratios)
            lines.append(
                f"- {SCHEMES[scheme]}, variance of the {quantity}: {values[0]:.2f} to {values[-1]:.2f} times that of "
                f"{baseline}; lower in {lower} of {len(ratios)} settings, higher in {higher}, no significant "
                "difference in the others\n"
            )
    return "".join(lines)


def _draw(path: Path, rows: list[Record]) -> None:
    with figure(path, 2, 1, size=(6.5, 4.5)) as axes:
        for axis, quantity in zip(axes, Variances._fields, strict=True):
            settings = list(dict.fromkeys((row["checkpoint"], row["batch"], row["varied"]) for row in rows))
            for number, scheme in enumerate(SCHEMES):
                if scheme == "iid":
                    continue
                chosen = [row[f"{quantity}_ratio"] for row in rows if row["scheme"] == scheme]
                places = [place + 0.18 * (number - 2.5) for place in range(len(settings))]
                low = [value - lower for value, lower, _ in chosen]
                high = [upper - value for value, _, upper in chosen]
                axis.errorbar(
                    [value for value, _, _ in chosen], places, xerr=[low, high], fmt="o", capsize=3,
                    label=SCHEMES[scheme],
                )  # fmt: skip
            axis.axvline(1.0, color="gray", linestyle="--")
            axis.set_yticks(range(len(settings)), [f"{a}, {b}, {c}" for a, b, c in settings], fontsize=7)
            axis.set_title(f"variance of the {quantity}, relative to independent times")
        axes[0].legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3)  # of both


STUDY = Study(
    name="time-sampling",
    title="Timestep sampling",
    question="""
The loss of a sample depends on its time t, so the spread of times over a batch adds to the variance of loss and
gradient. Compared at equal batch, before and after conversion: independent times, antithetic pairs (t and 1 - t), one
stratified set per batch (MDLM), and this project's low-discrepancy times by sample index, which do not depend on the
batch; these also with complementary masks, each text twice under a mask and its complement (LLaDA2.0).
""",
    plan=plan,
    report=report,
    num_seeds=1,
)
