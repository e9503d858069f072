"""Critical batch size by branching from one checkpoint, for the diffusion and the autoregressive objective."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import Moments, RatioInterval, mean_interval, ratio_interval
from megatron_a2d.study.jobs import BASE, Job, Measure, ar_settings, scaled_batch
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # times the recipe's global batch
TOLERANCE = 0.01  # relative increase of the loss that counts as worse
OBJECTIVES = {"mdlm": "diffusion", "ar": "autoregressive"}
NUM_GROUPS, BATCHES_PER_GROUP = 8, 16
_NUM_DRAWS = 4000

Losses = dict[int, dict[int, float]]  # batch size -> seed -> loss


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """One SCP run, diffusion branches from its end, and autoregressive branches from its start."""
    noise = {
        "batch_size": base.training.global_batch_size,
        "num_groups": NUM_GROUPS,
        "batches_per_group": BATCHES_PER_GROUP,
        "scheme": "iid",  # the estimate is of samples that are independent, their times included
    }
    fresh = {"seed": seeds[0] + 500}  # other samples than at the start of SCP
    jobs = [
        Job("scp", {"objective": "mdlm"}, {"seed": seeds[0]}, measures=(Measure("noise", "gradients", fresh, noise),)),
        Job(
            "ar_noise", {"objective": "ar"}, {"seed": seeds[0]}, trains=False,
            measures=(Measure("noise", "gradients", ar_settings(base) | fresh, noise),),
        ),
    ]  # fmt: skip
    for seed in seeds:
        for objective in OBJECTIVES:
            for factor in FACTORS:
                settings = {**scaled_batch(base, factor, round(max(FACTORS))), "seed": seed + 500}
                if objective == "ar":
                    settings |= ar_settings(base)
                tags = {"objective": objective, "batch": settings["global_batch_size"], "seed": seed}
                start = "scp" if objective == "mdlm" else BASE
                jobs.append(Job(f"{objective}_batch{tags['batch']}_seed{seed}", tags, settings, start))
    return jobs


class Critical(NamedTuple):
    """Critical batch size with its interval, in samples; inf: above the largest tested."""

    value: float
    low: float
    high: float

    def show(self, largest: int) -> str:
        def one(value: float) -> str:
            return f"> {largest}" if math.isinf(value) else "?" if math.isnan(value) else f"{round(value)}"

        return f"{one(self.value)} ({one(self.low)} to {one(self.high)})"


def critical_batch(losses: Mapping[int, Mapping[int, float]], tolerance: float = TOLERANCE, seed: int = 0) -> Critical:
    """The largest batch whose loss at equal tokens is within `tolerance` of the lowest, with a 95% interval.

    `losses`: {batch: {seed: loss}}, every seed with every batch. The loss is linear in log2 of the batch between those
    that were tried. The interval: a parametric bootstrap of the means. What a seed adds to all of its batches moves the
    whole curve, and not the place where it leaves the band: it is no part of the spread. The spread itself is known
    from few seeds, and drawn too (its square is chi-squared), so that the interval is as wide as Student's t would be.
    The lowest of noisy means lies too low, that of drawn ones twice as much: by what the draws show of it the band is
    lifted. On known curves the interval holds the truth in 90 to 96 of 100 studies
    (tests/unit/test_study_statistics.py).
    """
    batches = sorted(losses)
    seeds = list(losses[batches[0]])
    means = [statistics.fmean(losses[batch].values()) for batch in batches]
    degrees = (len(seeds) - 1) * (len(batches) - 1)
    if degrees < 1:
        return Critical(_crossing(batches, means, tolerance), math.nan, math.nan)
    whole = statistics.fmean(means)
    shifts = {number: statistics.fmean(losses[batch][number] for batch in batches) - whole for number in seeds}
    squares = sum(
        (losses[batch][number] - mean - shifts[number]) ** 2
        for batch, mean in zip(batches, means, strict=True)
        for number in seeds
    )
    draw = random.Random(seed)

    def drawn() -> list[float]:
        error = math.sqrt(squares / draw.gammavariate(degrees / 2, 2) / len(seeds))
        return [draw.gauss(mean, error) for mean in means]

    draws = [drawn() for _ in range(_NUM_DRAWS)]
    lift = min(means) - statistics.fmean(map(min, draws))
    found = sorted(_crossing(batches, values, tolerance, 2 * lift) for values in draws)
    low, high = found[int(0.025 * _NUM_DRAWS)], found[int(0.975 * _NUM_DRAWS)]
    return Critical(_crossing(batches, means, tolerance, lift), low, high)


def _crossing(batches: Sequence[int], means: Sequence[float], tolerance: float, lift: float = 0.0) -> float:
    """Where the curve leaves the band above its minimum, which is assumed to be higher by `lift`."""
    best = min(range(len(means)), key=means.__getitem__)
    limit = (means[best] + lift) * (1 + tolerance)
    for place in range(best, len(means) - 1):
        if means[place + 1] > limit:
            part = (limit - means[place]) / (means[place + 1] - means[place])
            return float(2 ** (math.log2(batches[place]) + part * math.log2(batches[place + 1] / batches[place])))
    return math.inf


def noise_scale(moments: Record) -> RatioInterval:
    """B_simple in samples: of the groups' tr V and |G|^2, each without bias, the ratio of the means."""
    found = [Moments.of(group) for group in moments["groups"]]
    return ratio_interval([moments["batch_size"] * item.variance for item in found], [item.square for item in found])


def report(records: list[Record], images: Path) -> Report:
    noise = {record["objective"]: record["noise"] for record in records[:2]}
    groups = by_tag(records[2:], "objective", "batch")
    losses: dict[str, Losses] = {objective: {} for objective in OBJECTIVES}
    for (objective, batch), runs in groups.items():
        losses[objective][batch] = {seed: final(record)["nelbo"] for seed, record in runs.items()}
    batches = list(losses["mdlm"])
    table = markdown_table(
        ["batch size, samples", *(f"{name}, nats/token" for name in OBJECTIVES.values())],
        [
            [batch, *(mean_interval([*losses[objective][batch].values()]).format(4) for objective in OBJECTIVES)]
            for batch in batches
        ],
    )
    rows: list[Record] = [
        {"objective": objective, "batch": batch, "seed": seed, "loss": final(record)["nelbo"],
         "standard_error": final(record)["nelbo_standard_error"]}
        for (objective, batch), runs in groups.items() for seed, record in runs.items()
    ]  # fmt: skip
    estimates, found_batches = [], {}
    for objective, name in OBJECTIVES.items():
        found = found_batches[objective] = critical_batch(losses[objective])
        scale = noise_scale(noise[objective])
        estimates.append([name, found.show(batches[-1]), scale.format(0)])
        rows.append({"objective": objective, "critical_batch": list(found), "noise_scale": list(scale)})
    summary = markdown_table(
        [
            "objective",
            f"critical batch, samples (within {TOLERANCE:.0%} of the lowest loss)",
            "gradient noise scale, samples",
        ],
        estimates,
    )
    _draw(images / "critical-batch.png", losses)
    text = (
        f"{table}\nHeld-out loss after equal tokens, ± half of a 95% confidence interval over seeds.\n\n{summary}\n"
        "95% intervals in brackets. Critical batch: where the loss, interpolated linearly in log2 of the batch size, "
        "leaves the band above the lowest; interval by a parametric bootstrap over seeds. Merrill et al. compare "
        "branches with the batch size of the run that they branch from; the lowest loss does not depend on which that "
        "was. Noise scale: tr V / |G|^2 at the checkpoint where the branches start (McCandlish et al. 2018), with "
        "independent samples and times; the branches' own times are low-discrepancy. All branches of an objective "
        "start from one checkpoint: the intervals say nothing about other checkpoints, sizes or data."
        f"\n\n{_caveats(losses, groups)}"
        f"The claim that diffusion has the larger critical batch is {_claim(found_batches)}.\n\n"
        "![results](critical-batch.png)\n"
    )
    return Report(text, rows)


def _caveats(losses: dict[str, Losses], groups: dict[tuple[str, int], dict[int, Record]]) -> str:
    """Caveats that apply to these results."""
    lines = []
    for objective, name in OBJECTIVES.items():
        means = {batch: statistics.fmean(found.values()) for batch, found in losses[objective].items()}
        if min(means, key=means.__getitem__) == min(means):
            lines.append(
                f"- {name}: the smallest batch has the lowest loss. A still smaller one may have a lower one, and the "
                "critical batch then be smaller than shown.\n"
            )
    samples = {
        batch: record["training"][-1]["consumed_samples"]
        for (_, batch), runs in groups.items()
        for record in runs.values()
    }
    most = max(samples.values())
    lines += [
        f"- Batch size {batch}: {count:,} samples in all, where others have {most:,}; that raises its loss.\n"
        for batch, count in samples.items()
        if count < most
    ]
    return "".join(lines) + ("\n" if lines else "")


def _claim(found: dict[str, Critical]) -> str:
    """A sentence that compares the two objectives by their intervals."""
    diffusion, autoregressive = found["mdlm"], found["ar"]
    if any(math.isnan(item.low) for item in (diffusion, autoregressive)):
        return "undecided: one seed gives no interval"
    if diffusion.low > autoregressive.high:
        return "supported by these runs"
    if diffusion.high < autoregressive.low:
        return "contradicted by these runs"
    if math.isinf(diffusion.low) and math.isinf(autoregressive.low):
        return "undecided: both exceed the largest batch tried"
    return "undecided: the intervals overlap"


def _draw(path: Path, losses: dict[str, Losses]) -> None:
    with figure(path, 2) as axes:
        for axis, (objective, name) in zip(axes, OBJECTIVES.items(), strict=True):
            batches = sorted(losses[objective])
            found = [mean_interval([*losses[objective][batch].values()]) for batch in batches]
            axis.errorbar(
                batches, [item.mean for item in found],
                [item.half_width if item.num_values > 1 else 0 for item in found], fmt="o-", capsize=3,
            )  # fmt: skip
            lowest = min(item.mean for item in found)
            axis.axhspan(lowest, lowest * (1 + TOLERANCE), alpha=0.2, color="green", label=f"within {TOLERANCE:.0%}")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("batch size, samples")
            axis.set_title(f"{name}: held-out loss, nats/token")
            axis.legend()


STUDY = Study(
    name="critical-batch",
    title="Critical batch size",
    question="""
Branches from one checkpoint that differ in global batch size only: the learning rate follows its square root, warm-up
and decay keep their positions in tokens, and all train on the same number of tokens (after Merrill et al. 2025). Up to
which batch size is the loss at equal tokens unchanged? For diffusion from a checkpoint after SCP, and for the
autoregressive objective from the one before it. RND1 reports that diffusion tolerates larger batches.
""",
    plan=plan,
    report=report,
    num_seeds=2,
)
