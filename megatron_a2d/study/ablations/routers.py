"""Ablation of router balancing: what conversion does to the loads of experts, and what balance costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_a2d.config.balancing_config import BalancingConfig
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.planner.routing import RankImbalance
from megatron_a2d.report.plot_style import figure
from megatron_a2d.study.confidence import MANY_COMPARISONS, Interval, mean_interval, paired_difference
from megatron_a2d.study.jobs import BASE, Job, Measure, ar_settings
from megatron_a2d.study.load_course import Loads, rank_sizes
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.study.study_base import Record, Report, Study, by_tag, final

BASELINE = "nothing"
GLOBAL = "global_aux_loss"
COEFFS = (0.001, 0.01, 0.1, 1.0)
COEFF = 0.1  # of the variants that differ in something else


def _aux_loss(coeff: float = COEFF, kind: str = GLOBAL, **more: Any) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coeff, **more}


RECOMMENDED = "global, 0.01"  # the recipes' choice
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    **{f"global, {coeff:g}": _aux_loss(coeff) for coeff in COEFFS},
    "global, by kind": _aux_loss(moe_aux_loss_tokens="by_kind"),
    "global, visible only": _aux_loss(moe_aux_loss_tokens="unmasked"),
    "sequence-wise": _aux_loss(kind="seq_aux_loss"),
    "expert bias": {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
    "z-loss": {"moe_z_loss_coeff": 1e-3},
}
BALANCED = "balanced"
STARTS = {BASE: "without balancing", BALANCED: "with balancing"}
ORDER = {name: number for number, name in enumerate(STARTS.values())}
NUM_CHECKPOINTS, NUM_LOGS = 5, 30
PLACEMENTS = ("in order", "placed early", "placed at the end")
KINDS = ("masked", "unmasked")
MASKED = KINDS[0]
Key = tuple[str, str]  # start, variant
Groups = dict[Key, dict[int, Record]]  # by seed
LoadsOf = dict[Key, dict[int, list[Loads]]]  # at the start of conversion, then at each checkpoint
COLUMNS: dict[str, Callable[[Record], float]] = {
    "NELBO": lambda record: final(record)["nelbo"],
    "accuracy": lambda record: final(record)["accuracy"],
    "AR perplexity": lambda record: math.exp(record["ar"]["nelbo"]),
    "cloze accuracy": lambda record: record["cloze"]["accuracy"],
}


def plan(base: RunConfig, seeds: Sequence[int], model_config: ModelConfig) -> list[Job]:
    """Every way to balance, from each start; loads are counted at the start and at `NUM_CHECKPOINTS` checkpoints."""
    causal = ar_settings(base)
    kept = (Measure("ar", "likelihood", causal), Measure("cloze", "cloze", causal))
    iterations = base.num_iterations
    fixed = {
        **dataclasses.asdict(BalancingConfig()),  # the recipe may balance
        "save_interval": max(1, iterations // NUM_CHECKPOINTS),
        "log_interval": max(1, iterations // NUM_LOGS),
        "keep_latest_k": 0,
    }
    jobs = [
        Job(
            f"before_{name.replace(' ', '_')}", {"start": name, "variant": "", "seed": seeds[0]},
            {"keep_latest_k": 0}, start, (*kept, Measure("loads", "loads")), trains=False,
        )
        for start, name in STARTS.items()
    ]  # fmt: skip
    return jobs + [
        Job(
            f"{name}_{variant}_seed{seed}".replace(", ", "_").replace(" ", "_"),
            {"start": name, "variant": variant, "seed": seed},
            {**fixed, **changes, "seed": seed},
            start,
            (*kept, Measure("loads", "loads", options={"every_checkpoint": True})),
        )
        for seed in seeds
        for variant, changes in VARIANTS.items()
        for start, name in STARTS.items()
    ]


def report(records: list[Record], images: Path) -> Report:
    before = {record["start"]: record for record in records if not record["variant"]}
    trained = sorted((record for record in records if record["variant"]), key=lambda record: ORDER[record["start"]])
    groups: Groups = by_tag(trained, "start", "variant")
    loads: LoadsOf = {
        key: {
            seed: [Loads.of(entry) for entry in (*before[key[0]]["loads"], *record["loads"])]
            for seed, record in runs.items()
        }
        for key, runs in groups.items()
    }
    _draw(images / "routers.png", groups, loads)
    num_layers, num_experts = _last(loads)[0].total.shape
    most = num_experts / next(iter(before.values()))["loads"][0]["top_k"]
    rows = _rows(before, groups, loads)
    tables = (_losses(before, groups), _experts(loads), _ranks(loads), _course(loads))
    text = (
        "\n".join(tables) + "\nStart: the autoregressive model, pretrained without or with balanced routers. NELBO "
        "(nats/token) and accuracy on masked tokens of the same held-out samples and masks; AR perplexity and cloze "
        "accuracy: of these weights under the causal mask. Imbalance: choices of the busiest expert over the mean of "
        f"a layer's {num_experts}, mean over {num_layers} layers; at most {most:g}. Dead: experts that no held-out "
        "token chose, of all layers. Busiest rank: its load over the mean, mean over layers, in brackets the worst "
        "layer of any seed; experts in their order, placed by the loads at the first checkpoint of the run, and placed "
        "by the loads at its end. ± is half of a 95% confidence interval over seeds "
        f"(Student's t). {MANY_COMPARISONS}\n\n{_for_planner(rows)}![results](routers.png)\n"
    )
    return Report(text, rows)


def _last(loads: LoadsOf, key: Key | None = None) -> list[Loads]:
    """The loads at the end of each run, of all variants or of one."""
    return [course[-1] for name in loads if key in (None, name) for course in loads[name].values()]


def _losses(before: dict[str, Record], groups: Groups) -> str:
    """What is learned and what is kept, then both minus the same start and seed without balancing."""
    kept = list(COLUMNS)[2:]
    rows = [
        [start, "before conversion", "", "", "", *(f"{COLUMNS[column](record):.3f}" for column in kept)]
        for start, record in before.items()
    ]
    rows += [
        [
            *key,
            str(len(runs)),
            *(mean_interval([read(record) for record in runs.values()]).format(3) for read in COLUMNS.values()),
        ]
        for key, runs in groups.items()
    ]
    differences = [
        [*key, *(_difference(groups, key, column).format(4) for column in COLUMNS)]
        for key in groups
        if key[1] != BASELINE
    ]
    return (
        markdown_table(["start", "balancing", "seeds", *COLUMNS], rows)
        + "\n"
        + markdown_table(["start", f"balancing, minus {BASELINE}", *COLUMNS], differences)
    )


def _difference(groups: Groups, key: Key, column: str) -> Interval:
    """Minus the baseline from the same start with the same seed."""
    values = {
        variant: {seed: COLUMNS[column](record) for seed, record in groups[key[0], variant].items()}
        for variant in {key[1], BASELINE}
    }
    return paired_difference(values[key[1]], values[BASELINE])


def _experts(loads: LoadsOf) -> str:
    """Balance of experts at the end of conversion."""
    rows = [
        [
            *key,
            *(mean_interval([item.imbalance(kind).mean() for item in _last(loads, key)]).format(2) for kind in KINDS),
            *(mean_interval([item.entropy[kind] for item in _last(loads, key)]).format(2) for kind in KINDS),
            mean_interval([item.num_dead for item in _last(loads, key)]).format(1),
        ]
        for key in loads
    ]
    head = [*(f"imbalance, {kind}" for kind in KINDS), *(f"entropy, {kind}" for kind in KINDS), "dead"]
    return markdown_table(["start", "balancing", *head], rows)


def _ranks(loads: LoadsOf) -> str:
    """Load by expert-parallel rank at the end, with the experts in order, placed early, and placed now."""
    columns = _rank_columns(_last(loads)[0].total.shape[1], PLACEMENTS)
    rows = []
    for key, runs in loads.items():
        cells = []
        for size, placed in columns:
            layers = [busiest_ranks(course, size, placed) for course in runs.values()]
            mean, worst = mean_interval([float(found.mean()) for found in layers]), max(map(max, layers))
            cells.append(f"{mean.format(2)} ({worst:.2f})")
        rows.append([*key, *cells])
    head = [f"EP {size}, {placed}" for size, placed in columns]
    return markdown_table(["start", "balancing", *head], rows)


def _rank_columns(num_experts: int, placements: Sequence[str]) -> list[tuple[int, str]]:
    """Numbers of ranks and placements; where a rank is one expert, there is nothing to place."""
    return [
        (size, placed)
        for size in rank_sizes(num_experts)
        for placed in (placements if size < num_experts else placements[:1])
    ]


def busiest_ranks(course: list[Loads], num_ranks: int, placed: str) -> np.ndarray:
    """[layers] load of the busiest rank over the mean at the end of a run; `placed`: one of `PLACEMENTS`.

    `course`: the loads at the start of conversion, then at each checkpoint.
    """
    by = {PLACEMENTS[0]: None, PLACEMENTS[1]: course[1], PLACEMENTS[2]: course[-1]}[placed]
    return course[-1].ranks(num_ranks, by)


def planner_imbalance(rows: Sequence[Record], variant: str) -> RankImbalance:
    """What `plan` assumes by default of runs with this balancing, from this study's rows, from balanced routers.

    Of experts in their order, for the numbers of ranks that hold several: the mean over seeds and layers of the worst
    number, and the largest value of any layer.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row["start"], row["variant"]) == (STARTS[BALANCED], variant):
            for name, by_placement in row["busiest_rank"].items():
                if name != f"EP {row['num_experts']}":
                    found.setdefault(name, []).extend(by_placement[PLACEMENTS[0]])
    means = [sum(values) / len(values) for values in found.values()]
    return RankImbalance(round(max(means), 2), round(max(max(values) for values in found.values()), 2))


def _for_planner(rows: Sequence[Record]) -> str:
    if (STARTS[BALANCED], RECOMMENDED) not in {(row["start"], row["variant"]) for row in rows}:
        return ""
    shown = [
        f"{variant} {found.mean:.2f} for time and {found.peak:.2f} for memory"
        for variant, found in ((variant, planner_imbalance(rows, variant)) for variant in (RECOMMENDED, BASELINE))
    ]
    return (
        f"Default of `plan --imbalance`, from the start with balancing: {'; '.join(shown)} (experts in order, ranks of "
        "several experts: the larger mean over layers and seeds, and the largest value).\n\n"
    )


def _course(loads: LoadsOf) -> str:
    """Loads from the start of conversion to its end, without balancing."""
    columns = _rank_columns(_last(loads)[0].total.shape[1], (PLACEMENTS[0], "placed at iteration 0"))
    rows: list[list[Any]] = []
    for (start, variant), runs in loads.items():
        if variant != BASELINE:
            continue
        for number, at in enumerate(zip(*runs.values(), strict=True)):
            begin = next(iter(runs.values()))[0]  # the same for all seeds
            cells = [[float(item.imbalance(kind).mean()) for item in at] for kind in KINDS]
            cells += [
                [float(item.ranks(size, None if placed == PLACEMENTS[0] else begin).mean()) for item in at]
                for size, placed in columns
            ]
            dead = mean_interval([item.num_dead for item in at]).format(1)
            shown = [mean_interval(values).format(2) for values in cells]
            rows.append([start, at[0].iteration if number else 0, dead, *shown])
    head = [*(f"imbalance, {kind}" for kind in KINDS), *(f"EP {size}, {placed}" for size, placed in columns)]
    return markdown_table(["start", f"iteration, {BASELINE}", "dead", *head], rows)


def _rows(before: dict[str, Record], groups: Groups, loads: LoadsOf) -> list[Record]:
    rows: list[Record] = [
        {"start": start, "variant": "", **{column: COLUMNS[column](record) for column in list(COLUMNS)[2:]}}
        for start, record in before.items()
    ]
    for (start, variant), runs in groups.items():
        for seed, record in runs.items():
            course = loads[start, variant][seed]
            rows.append(
                {
                    "start": start, "variant": variant, "seed": seed, "num_experts": course[-1].total.shape[1],
                    **{column: read(record) for column, read in COLUMNS.items()},
                    "course": [
                        {
                            "iteration": item.iteration if number else 0, "dead": item.num_dead,
                            **{kind: _rounded(item.imbalance(kind)) for kind in KINDS},
                            "entropy": item.entropy,
                        }
                        for number, item in enumerate(course)
                    ],
                    "busiest_rank": {
                        f"EP {size}": {placed: _rounded(busiest_ranks(course, size, placed)) for placed in PLACEMENTS}
                        for size in rank_sizes(course[-1].total.shape[1])
                    },
                }
            )  # fmt: skip
    return rows


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def _draw(path: Path, groups: Groups, loads: LoadsOf) -> None:
    sizes = rank_sizes(_last(loads)[0].total.shape[1])
    starts = list(dict.fromkeys(start for start, _ in groups))
    with figure(path, 3, 2, size=(5.5, 4.2)) as axes:
        for number, start in enumerate(starts):
            style = "-" if number == 0 else "--"
            for color, variant in enumerate(VARIANTS):
                runs, courses = groups[start, variant], list(loads[start, variant].values())
                look = {"color": f"C{color}", "linestyle": style, "label": variant if number == 0 else None}
                for axis, kind in zip(axes, KINDS, strict=False):
                    axis.plot(*_logged(runs, f"load_imbalance_{kind}"), **look, linewidth=1)
                iterations = [entry.iteration if place else 0 for place, entry in enumerate(courses[0])]
                dead = [mean_interval([entry.num_dead for entry in at]).mean for at in zip(*courses, strict=True)]
                axes[2].plot(iterations, dead, **look, linewidth=1)
                difference = _difference(groups, (start, variant), "NELBO")
                axes[3].errorbar(
                    [mean_interval([course[-1].imbalance(MASKED).mean() for course in courses]).mean],
                    [difference.mean], [difference.half_width if difference.half_width > 0 else 0.0],
                    fmt="o" if number == 0 else "s", color=f"C{color}", capsize=3,
                )  # fmt: skip
        for axis, placed in zip(axes[4:], PLACEMENTS[::2], strict=True):
            for number, start in enumerate(starts):
                for color, variant in enumerate(VARIANTS):
                    values = [
                        mean_interval(
                            [
                                float(busiest_ranks(course, size, placed).mean())
                                for course in loads[start, variant].values()
                            ]
                        ).mean
                        for size in sizes
                    ]
                    axis.plot(range(len(sizes)), values, "o-" if number == 0 else "s--", color=f"C{color}")
            axis.set_xticks(range(len(sizes)), [f"EP {size}" for size in sizes])
            axis.set_title(f"busiest rank over the mean, {placed}")
        for axis, kind in zip(axes, KINDS, strict=False):
            axis.set_title(f"imbalance of {kind} tokens; dashed: {starts[-1]}")
        axes[2].set_title("dead experts")
        axes[3].legend(*axes[0].get_legend_handles_labels(), fontsize=7)
        for axis in axes[:3]:
            axis.set_xlabel("iteration")
        axes[3].axhline(0, color="gray", linestyle="--")
        axes[3].set_xlabel("imbalance of masked tokens at the end")
        axes[3].set_title(f"NELBO minus {BASELINE}")


def _logged(runs: dict[int, Record], name: str) -> tuple[list[int], list[float]]:
    """Iterations, and the mean over seeds of a router metric in the log."""
    logs = [record["training"] for record in runs.values()]
    iterations = [entry["iteration"] for entry in logs[0]]
    return iterations, [
        mean_interval([log[place]["moe"][name] for log in logs]).mean for place in range(len(iterations))
    ]


STUDY = Study(
    name="routers",
    title="Routers and load balancing",
    question="""
Conversions of autoregressive models that were pretrained without and with balanced routers: without balancing; with an
auxiliary loss over the global batch at four coefficients, for masked and visible tokens separately, or for visible
tokens only; with one by sequence; with an expert bias; and with a z-loss. Does conversion collapse the routers, and how
fast? Does that hurt the loss, or only speed? What does balance cost, and is placing the experts enough?
""",
    plan=plan,
    report=report,
    starts={BALANCED: "another autoregressive checkpoint to start from, pretrained with balanced routers"},
)
