"""Ablation of learning rates by role: what conversion learns, and what it forgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import ROLES, RunConfig
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import MANY_COMPARISONS, Interval, mean_interval, paired_difference, verdict
from megatron_a2d.study.jobs import BASE, Job, Measure, ar_settings, optimizer_settings
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

RATIOS = (1.0, 0.3, 0.1, 0.03, 0.0)
ATTENTION_LR = (1.0, 3.0)  # multiples of the recipe's
REST = tuple(role for role in ROLES if role != "attention")
_NAMES = {"adam": "AdamW", "muon": "Muon"}

Arm = tuple[str, float, float]  # optimizer, factor on the learning rate, ratio of the rest's to attention's


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """Each ratio at two attention learning rates; the higher one with the first seed only.

    With --optimizer muon these are Muon's, and the same ratios at the recipe's rate follow with AdamW.
    """
    causal = ar_settings(base)
    kept = (Measure("ar", "likelihood", causal), Measure("cloze", "cloze", causal))
    jobs = [Job("before", {"optimizer": "", "lr": 0.0, "rest": 0.0, "seed": seeds[0]}, {}, measures=kept, trains=False)]
    roles = [role for role in REST if model_config.has_role(role)]
    others = ("adam",) if base.optimization.optimizer == "muon" else ()
    for seed in seeds:
        factors = ATTENTION_LR if seed == seeds[0] else ATTENTION_LR[:1]
        arms = [(base.optimization.optimizer, factor) for factor in factors]
        for optimizer, factor in (*arms, *((other, ATTENTION_LR[0]) for other in others)):
            for ratio in RATIOS:
                prefix = "" if optimizer == "adam" else f"{optimizer}_"
                jobs.append(
                    Job(
                        f"{prefix}lr{factor:g}_rest{ratio:g}_seed{seed}",
                        {"optimizer": optimizer, "lr": factor, "rest": ratio, "seed": seed},
                        {
                            **optimizer_settings(base, optimizer),
                            "seed": seed,
                            "lr": base.optimization.lr * factor,
                            "min_lr": base.optimization.min_lr * factor,
                            "lr_mult": {role: ratio for role in roles},
                        },
                        measures=(
                            *kept,
                            Measure("infill", "infill"),
                            Measure("drift", "drift", options={"reference": BASE}),
                        ),
                    )
                )
    return jobs


_COLUMNS: dict[str, Callable[[Record], float]] = {
    "NELBO": lambda record: final(record)["nelbo"],
    "infilling accuracy": lambda record: record["infill"]["accuracy"],
    "AR perplexity": lambda record: math.exp(record["ar"]["nelbo"]),
    "cloze accuracy": lambda record: record["cloze"]["accuracy"],
}


def report(records: list[Record], images: Path) -> Report:
    before, *runs = records
    groups = by_tag(runs, "optimizer", "lr", "rest")
    roles = [role for role in ROLES if role in runs[0]["drift"]]

    def column(key: Arm, value: Callable[[Record], float]) -> Interval:
        return mean_interval([value(record) for record in groups[key].values()])

    table = markdown_table(
        ["attention lr", "rest : attention", "seeds", *_COLUMNS, *(f"drift, {role}" for role in roles)],
        [
            [
                "before conversion",
                "",
                "",
                "",
                "",
                f"{math.exp(before['ar']['nelbo']):.3f}",
                f"{before['cloze']['accuracy']:.3f}",
            ]
            + [""] * len(roles),
            *(
                [_rate(key), f"{key[2]:g}", len(groups[key])]
                + [column(key, value).format(3) for value in _COLUMNS.values()]
                + [column(key, lambda record, role=role: record["drift"][role]).format(3) for role in roles]  # type: ignore[misc]
                for key in groups
            ),
        ],
    )
    _draw(images / "layer-lr.png", before, groups)
    text = (
        f"{table}\nNELBO, nats/token, and infilling (16 tokens at once) of held-out text with the bidirectional "
        "mask. AR perplexity and cloze accuracy: of the same weights under the causal mask; cloze accuracy over "
        f"{before['cloze']['num_facts']:,} facts of the training text that recur in held-out text. Drift: "
        f"|W - W0| / |W0|. ± is half of a 95% confidence interval over seeds (Student's t). {MANY_COMPARISONS}\n\n"
        f"{_findings(groups)}\n![results](layer-lr.png)\n"
    )
    rows = [
        {name: record[name] for name in ("name", "optimizer", "lr", "rest", "seed")}
        | {name: value(record) for name, value in _COLUMNS.items()}
        | {"drift": record["drift"]}
        for record in runs
    ]
    rows.insert(
        0,
        {
            "name": "before",
            "AR perplexity": math.exp(before["ar"]["nelbo"]),
            "cloze accuracy": before["cloze"]["accuracy"],
        },
    )
    return Report(text, rows)


def _rate(arm: Arm) -> str:
    return f"{arm[1]:g} x" + (f", {_NAMES[arm[0]]}" if arm[0] != "adam" else "")


def _findings(groups: dict[Arm, dict[int, Record]]) -> str:
    """Each ratio compared with 1 : 1 at the recipe's learning rate, and Muon with AdamW, paired by seed."""
    lines = []
    first = (*next(iter(groups))[:1], ATTENTION_LR[0], RATIOS[0])
    for name, value in _COLUMNS.items():
        found = {key: {seed: value(record) for seed, record in runs.items()} for key, runs in groups.items()}
        against = [
            f"1 : {key[2]:g} {verdict(paired_difference(values, found[first]))}"
            for key, values in found.items()
            if key[:2] == first[:2] and key != first
        ]
        lines.append(f"- {name}, against 1 : {first[2]:g} with the same seed: {'; '.join(against)}\n")
        by_ratio = [
            f"1 : {key[2]:g} {verdict(paired_difference(values, found[other]))}"
            for key, values in found.items()
            if key[0] == "muon" and (other := ("adam", *key[1:])) in found
        ]
        if by_ratio:
            lines.append(f"- {name}, Muon against AdamW with the same seed: {'; '.join(by_ratio)}\n")
    return "".join(lines)


def _draw(path: Path, before: Record, groups: dict[Arm, dict[int, Record]]) -> None:
    marks = {"AR perplexity": math.exp(before["ar"]["nelbo"]), "cloze accuracy": before["cloze"]["accuracy"]}
    with figure(path, 2, 2) as axes:
        for axis, (name, value) in zip(axes, _COLUMNS.items(), strict=True):
            for arm in dict.fromkeys(key[:2] for key in groups):
                keys = [key for key in groups if key[:2] == arm]
                found = [mean_interval([value(record) for record in groups[key].values()]) for key in keys]
                axis.errorbar(
                    range(len(keys)), [item.mean for item in found],
                    [item.half_width if item.num_values > 1 else 0.0 for item in found],
                    fmt="o-", capsize=3, label=f"attention lr {_rate(keys[0])}",
                )  # fmt: skip
                axis.set_xticks(range(len(keys)), [f"1 : {key[2]:g}" for key in keys])
            if name in marks:
                axis.axhline(marks[name], color="gray", linestyle="--", label="before conversion")
            axis.set_title(name)
            axis.set_xlabel("attention : rest")
            axis.legend(fontsize=8)


STUDY = Study(
    name="layer-lr",
    title="Learning rates by layer",
    question="""
Conversions of one autoregressive checkpoint that differ in the learning rate of everything but attention, from
attention's own rate (1 : 1) to none (1 : 0, only attention is trained). How low is the diffusion loss, and how much of
the autoregressive model remains: its loss under the causal mask, its facts, its weights?
""",
    plan=plan,
    report=report,
)
