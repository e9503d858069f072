"""A batch that grows during the run against the constant batches that it begins and ends with, at equal tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import MANY_COMPARISONS, mean_interval, paired_difference, verdict
from megatron_a2d.study.jobs import Job, ramped_batch, scaled_batch
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

RAMP = (1.0, 2.0, 4.0)  # times the recipe's global batch: the sizes of the batch that grows, each for as many tokens


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """One SCP run, and from its end for each seed a branch that grows and two that do not."""
    largest = round(max(RAMP) / min(RAMP))
    ends = [scaled_batch(base, factor, largest) for factor in (RAMP[0], RAMP[-1])]
    sizes = [settings["global_batch_size"] for settings in ends]
    branches = {str(size): settings for size, settings in zip(sizes, ends, strict=True)}
    branches[f"{sizes[0]} to {sizes[1]}"] = ramped_batch(base, RAMP, largest)
    jobs = [Job("scp", {}, {"seed": seeds[0]})]
    for seed in seeds:
        for batch, settings in branches.items():
            fresh = {"seed": seed + 500}  # other samples than at the start of SCP
            tags = {"batch": batch, "seed": seed}
            jobs.append(Job(f"batch_{batch.replace(' ', '_')}_seed{seed}", tags, {**settings, **fresh}, "scp"))
    return jobs


def report(records: list[Record], images: Path) -> Report:
    scp, *branches = records
    groups = by_tag(branches, "batch")
    losses = {batch: {seed: final(record)["nelbo"] for seed, record in runs.items()} for batch, runs in groups.items()}
    *constant, growing = losses
    table = markdown_table(
        ["batch size, samples", "steps", "held-out NELBO, nats/token", "growing minus constant"],
        [
            [
                batch,
                max(record["iteration"] for run in groups[batch].values() for record in run["training"]),
                mean_interval([*found.values()]).format(4),
                "" if batch == growing else paired_difference(losses[growing], found).format(4),
            ]
            for batch, found in losses.items()
        ],
    )
    findings = "".join(
        f"- {growing} samples against {batch}, with the same seed: "
        f"{verdict(paired_difference(losses[growing], losses[batch]), 4)}\n"
        for batch in constant
    )
    _draw(images / "batch-ramp.png", groups)
    text = (
        f"{table}\nAfter equal tokens; ± is half of a 95% confidence interval over seeds (Student's t). The growing "
        "batch has each of its sizes for an equal part of the tokens, and the learning rate of the smallest "
        "throughout; constant batches have the square root's. All branches start from one SCP checkpoint, whose NELBO "
        f"is {final(scp)['nelbo']:.4f}. {MANY_COMPARISONS}\n\n{findings}\n![results](batch-ramp.png)\n"
    )
    rows = [
        {
            "batch": batch,
            "seed": seed,
            "loss": final(record)["nelbo"],
            "standard_error": final(record)["nelbo_standard_error"],
        }
        for batch, runs in groups.items()
        for seed, record in runs.items()
    ]
    return Report(text, rows)


def _draw(path: Path, groups: dict[str, dict[int, Record]]) -> None:
    """The training loss over tokens, and the batch size; of the first seed."""
    with figure(path, 2) as axes:
        for batch, runs in groups.items():
            training = next(iter(runs.values()))["training"]
            tokens = [record["consumed_tokens"] / 1000 for record in training]
            axes[0].plot(tokens, [record["loss"] for record in training], label=batch)
            axes[1].step(tokens, [record["batch_size"] for record in training], where="pre", label=batch)
        for axis, title in zip(axes, ("training loss, nats/token", "batch size, samples"), strict=True):
            axis.set_title(title)
            axis.set_xlabel("thousand tokens")
            axis.legend()


STUDY = Study(
    name="batch-ramp",
    title="Batch ramp",
    question="""
The critical batch size grows as the loss falls (McCandlish et al. 2018): a run that begins with a small batch and ends
with a large one could have the small batch's loss in fewer steps. Branches from one checkpoint after SCP, at equal
tokens: a constant small batch, a constant large one, and one that grows from the first to the second.
""",
    plan=plan,
    report=report,
)
