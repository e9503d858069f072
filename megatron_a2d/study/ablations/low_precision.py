"""Ablation of low precision: FP8 and NVFP4 recipes, emulated, against bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import ROLES, RunConfig
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import MANY_COMPARISONS, Interval, mean_interval, paired_difference, verdict
from megatron_a2d.study.jobs import BASE, Job, Measure
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

BASELINE = "bf16"
ENDS = {"first_last_layers_bf16": True}
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "tensorwise": {"fp8_recipe": "tensorwise"},
    "blockwise": {"fp8_recipe": "blockwise"},
    "mxfp8": {"fp8_recipe": "mxfp8"},
    "nvfp4": {"fp4_recipe": "nvfp4"},
    "mxfp8, first and last layers in bf16": {"fp8_recipe": "mxfp8", **ENDS},
    "nvfp4, first and last layers in bf16": {"fp4_recipe": "nvfp4", **ENDS},
    "mxfp8 with the head": {"fp8_recipe": "mxfp8", "fp8_output_proj": True},
}
# Emulated experts are computed one at a time; with the others too, all variants and fp32 have the same parameters.
FIXED = {"bf16": True, "transformer_impl": "local", "moe_grouped_gemm": False}
TIMESTEPS = (0.1, 0.5, 0.9)
NUM_BATCHES = 2
RANGES = ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0))


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """Every variant trains with its recipe emulated, and is compared with fp32 at its own final weights."""
    error = {"batch_size": base.training.global_batch_size, "num_batches": NUM_BATCHES, "timesteps": list(TIMESTEPS)}
    measures = (
        Measure("gradient", "gradient_error", options=error),
        Measure("drift", "drift", options={"reference": BASE}),
    )
    return [
        Job(
            f"{name.replace(', ', '_').replace(' ', '_')}_seed{seed}",
            {"variant": name, "seed": seed},
            {**FIXED, **changes, "seed": seed},
            measures=measures,
        )
        for seed in seeds
        for name, changes in VARIANTS.items()
    ]


def _nelbo_in(record: Record, low: float, high: float) -> float:
    """NELBO of the last validation's samples with t in this range."""
    buckets = [bucket for bucket in final(record)["nelbo_by_time"] if low - 1e-6 < bucket["low"] < high - 1e-6]
    return sum(bucket["mean"] * bucket["num_samples"] for bucket in buckets) / sum(b["num_samples"] for b in buckets)


def _range(low: float, high: float) -> str:
    return f"NELBO, t {low:g} to {high:g}"


_COLUMNS: dict[str, Callable[[Record], float]] = {
    "NELBO": lambda record: final(record)["nelbo"],
    **{_range(*ends): lambda record, ends=ends: _nelbo_in(record, *ends) for ends in RANGES},  # type: ignore[misc]
    "NELBO of the weights in fp32": lambda record: record["gradient"]["nelbo_fp32"],
    "accuracy": lambda record: final(record)["accuracy"],
}


def report(records: list[Record], images: Path) -> Report:
    groups = by_tag(records, "variant")
    values = {
        name: {column: {seed: read(record) for seed, record in runs.items()} for column, read in _COLUMNS.items()}
        for name, runs in groups.items()
    }
    roles = [role for role in ROLES if role in records[0]["drift"]]

    def mean(name: str, read: Callable[[Record], float]) -> Interval:
        return mean_interval([read(record) for record in groups[name].values()])

    table = markdown_table(
        ["variant", "seeds", *_COLUMNS],
        [
            [name, len(groups[name]), *(mean_interval(list(found[column].values())).format(3) for column in _COLUMNS)]
            for name, found in values.items()
        ],
    )
    differences = markdown_table(
        ["minus bf16, same seed", *_COLUMNS],
        [
            [name, *(paired_difference(found[column], values[BASELINE][column]).format(4) for column in _COLUMNS)]
            for name, found in values.items()
            if name != BASELINE
        ],
    )
    gradients = markdown_table(
        [
            "gradient against fp32", *(f"cosine, t = {timestep:g}" for timestep in TIMESTEPS),
            *(f"relative error, t = {timestep:g}" for timestep in TIMESTEPS), "lowest cosine of a role, t = 0.5",
        ],
        [
            [
                name, *(mean(name, _gradient(number, "cosine")).format(5) for number in range(len(TIMESTEPS))),
                *(mean(name, _gradient(number, "relative_error")).format(4) for number in range(len(TIMESTEPS))),
                _lowest(groups[name]),
            ]
            for name in groups
        ],
    )  # fmt: skip
    drift = markdown_table(
        ["drift", *roles],
        [
            [name, *(mean(name, lambda record, role=role: record["drift"][role]).format(4) for role in roles)]  # type: ignore[misc]
            for name in groups
        ],
    )
    _draw(images / "precision.png", values, groups)
    text = (
        f"{table}\n{differences}\n{gradients}\n{drift}\nNELBO (nats/token) and accuracy of the same held-out samples "
        "and masks, in the variant's own precision unless said otherwise. Gradients: of "
        f"{NUM_BATCHES} batches a timestep at each run's final weights, against the same batches and weights in fp32; "
        "so the bf16 row is the error of bf16 itself. Drift: |W - W0| / |W0|. ± is half of a 95% confidence interval "
        f"over seeds (Student's t), in the second table of the paired differences. {MANY_COMPARISONS}\n\n"
        f"{_findings(values)}\n![results](precision.png)\n"
    )
    rows: list[Record] = [
        {
            "variant": name, "seed": seed, **{column: values[name][column][seed] for column in _COLUMNS},
            "gradient": record["gradient"]["by_timestep"], "drift": record["drift"],
            "nelbo_by_time": final(record)["nelbo_by_time"],
        }
        for name, runs in groups.items()
        for seed, record in runs.items()
    ]  # fmt: skip
    return Report(text, rows)


def _gradient(number: int, name: str) -> Callable[[Record], float]:
    return lambda record: record["gradient"]["by_timestep"][number][name]


def _lowest(runs: dict[int, Record]) -> str:
    """The role whose gradient is furthest from fp32's, and its mean cosine."""
    tables = [record["gradient"]["by_timestep"][TIMESTEPS.index(0.5)]["cosine_by_role"] for record in runs.values()]
    means = {role: mean_interval([table[role] for table in tables]) for role in tables[0]}
    role = min(means, key=lambda role: means[role].mean)
    return f"{role} {means[role].format(4)}"


def _findings(values: dict[str, dict[str, dict[int, float]]]) -> str:
    return "".join(
        f"- {name}, {column}: {verdict(paired_difference(found[column], values[BASELINE][column]), 4)}\n"
        for name, found in values.items()
        if name != BASELINE
        for column in _COLUMNS
    )


def _draw(path: Path, values: dict[str, dict[str, dict[int, float]]], groups: dict[Any, dict[int, Record]]) -> None:
    with figure(path, 3, size=(5.5, 4.2)) as axes:
        others = [name for name in values if name != BASELINE]
        for place, name in enumerate(others):
            difference = paired_difference(values[name]["NELBO"], values[BASELINE]["NELBO"])
            width = difference.half_width if difference.num_values > 1 else 0.0
            axes[0].errorbar([difference.mean], [place], xerr=[width], fmt="o", capsize=4)
            by_range = [
                paired_difference(values[name][_range(*ends)], values[BASELINE][_range(*ends)]) for ends in RANGES
            ]
            axes[1].plot(range(len(RANGES)), [item.mean for item in by_range], "o-", label=name)
        for name, runs in groups.items():
            errors = [
                mean_interval([_gradient(number, "relative_error")(record) for record in runs.values()]).mean
                for number in range(len(TIMESTEPS))
            ]
            axes[2].plot(TIMESTEPS, errors, "o-", label=name)
        axes[0].set_yticks(range(len(others)), others, fontsize=7)
        axes[0].axvline(0, color="gray", linestyle="--")
        axes[0].set_title("NELBO minus bf16's")
        axes[1].axhline(0, color="gray", linestyle="--")
        axes[1].set_xticks(range(len(RANGES)), [f"t {low:g} to {high:g}" for low, high in RANGES])
        axes[1].set_title("NELBO minus bf16's, by t")
        axes[1].legend(fontsize=6)
        axes[2].set_yscale("log")
        axes[2].set_xlabel("t")
        axes[2].set_title("relative error of the gradient against fp32")
        axes[2].legend(fontsize=6)


STUDY = Study(
    name="precision",
    title="Low precision: FP8 and NVFP4",
    question="""
FP8 and NVFP4 recipes, emulated with Transformer Engine's rounding, against bf16; MXFP8 and NVFP4 also with the first
and last layer in bf16, and MXFP8 with the LM head. What does a recipe cost in held-out loss, at which timesteps, and
how far is its gradient from fp32's?
""",
    plan=plan,
    report=report,
)
