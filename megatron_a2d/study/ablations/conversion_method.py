"""Ablation of the conversion method, the initialisation of the diffusion model (Fig. 3.1 of the RND1 report)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig, settings
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import MANY_COMPARISONS, mean_interval, paired_difference, verdict
from megatron_a2d.study.jobs import Job, Measure
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

NUM_VALIDATIONS = 4


def conversions(base: RunConfig) -> dict[str, dict[str, Any]]:
    """Conversion method -> its changes to the base run."""
    return {
        # From scratch every layer has to learn, so all roles have the full learning rate.
        "random": {"conversion": "random", "finetune": False, "lr_mult": {}},
        "annealing": {"conversion": "annealing", "attention_annealing_iters": max(1, base.num_iterations // 2)},
        "grafting": {"conversion": "grafting", "grafting_iters": max(1, base.num_iterations // 4)},
        "scp": {"conversion": "scp"},
    }


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """Every method with every seed, at equal tokens."""
    ways = conversions(base)
    interval = max(1, base.num_iterations // NUM_VALIDATIONS)
    assert {name for changes in ways.values() for name in changes} <= settings().keys()
    return [
        Job(
            f"{way}_seed{seed}",
            {"conversion": way, "seed": seed},
            {**changes, "seed": seed, "eval_interval": interval},
            measures=(Measure("infill", "infill"),),
        )
        for seed in seeds
        for way, changes in ways.items()
    ]


def _training_loss(record: Record) -> float:
    """Mean training loss of the last fifth of the log."""
    losses = [item["loss"] for item in record["training"]]
    return statistics.fmean(losses[-max(1, len(losses) // 5) :])


_COLUMNS: dict[str, Callable[[Record], float]] = {
    "NELBO at the start": lambda record: record["validation"][0]["nelbo"],
    "training loss": _training_loss,
    "NELBO": lambda record: final(record)["nelbo"],
    "accuracy on masked tokens": lambda record: final(record)["accuracy"],
    "infilling accuracy": lambda record: record["infill"]["accuracy"],
}


def report(records: list[Record], images: Path) -> Report:
    groups = by_tag(records, "conversion")
    table = markdown_table(
        ["conversion", "seeds", *_COLUMNS],
        [
            [way, len(runs)]
            + [mean_interval([value(record) for record in runs.values()]).format(3) for value in _COLUMNS.values()]
            for way, runs in groups.items()
        ],
    )
    _draw(images / "probe.png", groups)
    rows = [
        {"conversion": way, "seed": seed, **{name: value(record) for name, value in _COLUMNS.items()}}
        for way, runs in groups.items()
        for seed, record in runs.items()
    ]
    text = (
        f"{table}\nTraining loss: mean of the last fifth of the log, nats/token. The other columns are held out: NELBO "
        "in nats/token; infilling of 16 tokens at once; ± is half of a 95% confidence interval over seeds (Student's "
        f"t). {MANY_COMPARISONS}\n\n"
        f"{_findings(groups)}\n![results](probe.png)\n"
    )
    return Report(text, rows)


def _findings(groups: dict[str, dict[int, Record]]) -> str:
    """Each method compared with SCP, paired by seed."""
    lines = []
    for name, value in list(_COLUMNS.items())[1:]:
        found = {way: {seed: value(record) for seed, record in runs.items()} for way, runs in groups.items()}
        against = [
            f"{way} {verdict(paired_difference(values, found['scp']))}" for way, values in found.items() if way != "scp"
        ]
        lines.append(f"- {name}, against SCP with the same seed: {'; '.join(against)}\n")
    return "".join(lines)


def _draw(path: Path, groups: dict[str, dict[int, Record]]) -> None:
    with figure(path, 3) as axes:
        for number, (way, runs) in enumerate(groups.items()):
            for seed, record in runs.items():
                first = seed == min(runs)
                # None while attention is grafted.
                training = [item for item in record["training"] if item["loss"] is not None]
                axes[0].plot(
                    [item["consumed_samples"] for item in training],
                    [item["loss"] for item in training],
                    color=f"C{number}", alpha=0.6, linewidth=1, label=way if first else None,
                )  # fmt: skip
            iterations = [item["iteration"] for item in next(iter(runs.values()))["validation"]]
            means = [
                mean_interval([record["validation"][place]["nelbo"] for record in runs.values()])
                for place in range(len(iterations))
            ]
            widths = [item.half_width if item.num_values > 1 else 0.0 for item in means]
            axes[1].errorbar(
                iterations, [item.mean for item in means], widths, fmt="o-", capsize=3, color=f"C{number}", label=way
            )
            infill = mean_interval([record["infill"]["accuracy"] for record in runs.values()])
            width = infill.half_width if infill.num_values > 1 else 0.0
            axes[2].bar([number], [infill.mean], yerr=[width], capsize=4, color=f"C{number}")
        axes[2].set_xticks(range(len(groups)), list(groups))
        for axis, title in zip(
            axes, ("training loss", "held-out NELBO, nats/token", "infilling accuracy"), strict=True
        ):
            axis.set_title(title)
        axes[0].set_xlabel("samples")
        axes[1].set_xlabel("iteration")
        axes[0].legend()


STUDY = Study(
    name="probe",
    title="Conversion methods",
    question="""
From one autoregressive checkpoint, at equal tokens: SCP (simple continual pretraining: full attention at once),
annealing (entries above the diagonal are allowed at random, more and more over the first half of training;
DiffuLLaMA), grafting (over the first quarter, bidirectional attention is regressed on causal attention and swapped in
layer by layer; those tokens count), and random weights (LLaDA), which get the full learning rate in every layer.
""",
    plan=plan,
    report=report,
)
