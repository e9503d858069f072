"""How large a batch may be before tokens are wasted: branches from one checkpoint, for both objectives."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_a2d.architecture import Architecture
from megatron_a2d.config import RunConfig
from megatron_a2d.study.page import figure, markdown_table
from megatron_a2d.study.plan import BASE, Job, Measure, ar_settings, scaled_batch
from megatron_a2d.study.statistics import Moments, RatioInterval, mean_interval, ratio_interval
from megatron_a2d.study.study import Record, Report, Study, by_tag, final

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # times the recipe's global batch
TOLERANCE = 0.01  # a loss that is higher by this part counts as worse
OBJECTIVES = {"mdlm": "diffusion", "ar": "autoregressive"}
NUM_GROUPS, BATCHES_PER_GROUP = 8, 16
_NUM_DRAWS = 4000


def plan(base: RunConfig, seeds: Sequence[int], architecture: Architecture) -> list[Job]:
    """One SCP run; from its end the diffusion branches, from its start the autoregressive ones."""
    noise = {
        "batch_size": base.training.global_batch_size,
        "num_groups": NUM_GROUPS,
        "batches_per_group": BATCHES_PER_GROUP,
    }
    jobs = [
        Job("scp", {"objective": "mdlm"}, {"seed": seeds[0]}, measures=(Measure("noise", "gradients", {}, noise),)),
        Job(
            "ar_noise", {"objective": "ar"}, {"seed": seeds[0]}, trains=False,
            measures=(Measure("noise", "gradients", ar_settings(base), noise),),
        ),
    ]  # fmt: skip
    for seed in seeds:
        for objective in OBJECTIVES:
            for factor in FACTORS:
                settings = {**scaled_batch(base, factor), "seed": seed + 500}  # not the samples that SCP began with
                if objective == "ar":
                    settings |= ar_settings(base)
                tags = {"objective": objective, "batch": settings["global_batch_size"], "seed": seed}
                start = "scp" if objective == "mdlm" else BASE
                jobs.append(Job(f"{objective}_batch{tags['batch']}_seed{seed}", tags, settings, start))
    return jobs


class Critical(NamedTuple):
    """Batch sizes, in samples; inf: above the largest that was tried."""

    value: float
    low: float
    high: float

    def show(self, largest: int) -> str:
        def one(value: float) -> str:
            return f"> {largest}" if math.isinf(value) else "?" if math.isnan(value) else f"{round(value)}"

        return f"{one(self.value)} ({one(self.low)} to {one(self.high)})"


def critical_batch(losses: dict[int, list[float]], tolerance: float = TOLERANCE, seed: int = 0) -> Critical:
    """The largest batch whose loss at equal tokens is within `tolerance` of the lowest, with a 95% interval.

    The loss is linear in log2 of the batch between those that were tried. The interval: seeds' spread, pooled over
    batches, drawn again and again (parametric bootstrap).
    """
    batches = sorted(losses)
    means = [statistics.fmean(losses[batch]) for batch in batches]
    residuals = [value - mean for batch, mean in zip(batches, means, strict=True) for value in losses[batch]]
    degrees = len(residuals) - len(batches)
    spread = math.sqrt(sum(value**2 for value in residuals) / degrees) if degrees > 0 else math.nan
    value = _crossing(batches, means, tolerance)
    if math.isnan(spread):
        return Critical(value, math.nan, math.nan)
    draw = random.Random(seed)
    errors = [spread / math.sqrt(len(losses[batch])) for batch in batches]
    found = sorted(
        _crossing(batches, [draw.gauss(mean, error) for mean, error in zip(means, errors, strict=True)], tolerance)
        for _ in range(_NUM_DRAWS)
    )
    return Critical(value, found[int(0.025 * _NUM_DRAWS)], found[int(0.975 * _NUM_DRAWS)])


def _crossing(batches: Sequence[int], means: Sequence[float], tolerance: float) -> float:
    best = min(range(len(means)), key=means.__getitem__)
    limit = means[best] * (1 + tolerance)
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
    losses: dict[str, dict[int, list[float]]] = {objective: {} for objective in OBJECTIVES}
    for (objective, batch), runs in groups.items():
        losses[objective][batch] = [final(record)["nelbo"] for record in runs.values()]
    batches = list(losses["mdlm"])
    table = markdown_table(
        ["samples a batch", *(f"{name}, nats a token" for name in OBJECTIVES.values())],
        [
            [batch, *(mean_interval(losses[objective][batch]).format(4) for objective in OBJECTIVES)]
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
        "In brackets 95% intervals. Critical batch: where the loss, linear in log2 of the batch between the measured "
        "ones, leaves the band above the lowest; interval by a parametric bootstrap of the seeds' spread. Noise scale: "
        "tr V / |G|^2 at the checkpoint where the branches begin (McCandlish et al. 2018).\n\n"
        f"The claim that diffusion's critical batch is the larger one: {_claim(found_batches)}.\n\n"
        "![results](critical-batch.png)\n"
    )
    return Report(text, rows)


def _claim(found: dict[str, Critical]) -> str:
    """By the intervals of both."""
    diffusion, autoregressive = found["mdlm"], found["ar"]
    if diffusion.low > autoregressive.high:
        return "supported by these runs"
    if diffusion.high < autoregressive.low:
        return "contradicted by these runs"
    return "not decided by these runs: the intervals overlap"


def _draw(path: Path, losses: dict[str, dict[int, list[float]]]) -> None:
    with figure(path, 2) as axes:
        for axis, (objective, name) in zip(axes, OBJECTIVES.items(), strict=True):
            batches = sorted(losses[objective])
            found = [mean_interval(losses[objective][batch]) for batch in batches]
            axis.errorbar(
                batches, [item.mean for item in found],
                [item.half_width if item.num_values > 1 else 0 for item in found], fmt="o-", capsize=3,
            )  # fmt: skip
            lowest = min(item.mean for item in found)
            axis.axhspan(lowest, lowest * (1 + TOLERANCE), alpha=0.2, color="green", label=f"within {TOLERANCE:.0%}")
            axis.set_xscale("log", base=2)
            axis.set_xlabel("samples a batch")
            axis.set_title(f"{name}: held-out loss, nats a token")
            axis.legend()


STUDY = Study(
    name="critical-batch",
    title="Critical batch size",
    question="""
From one checkpoint, branches that differ in their global batch only: the learning rate follows its square root, warm-up
and decay keep their places in tokens, and all see the same number of tokens (after Merrill et al. 2025). Up to which
batch does the loss at equal tokens stay? Asked of the diffusion objective, from a checkpoint after SCP, and of the
autoregressive one, from the checkpoint before it: RND1 reports that diffusion takes larger batches.
""",
    plan=plan,
    report=report,
    num_seeds=2,
)
