"""What is wrong with the result of a case, and the results as a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("RESULTS.md")
# Of what was counted; beside it the planner rounds a few small tensors away.
WITHIN = {"activations, logits": 0.05, "peak": 0.05}
STATE, STATE_WITHIN = ("weights", "gradients", "optimizer state"), 0.01
TRAFFIC_WITHIN = 0.02


def problems_of(result: dict[str, Any]) -> list[str]:
    """Where the planner is off, and sends that do not pair up."""
    found = list(result["problems"])
    for rank in result["ranks"]:
        for kind, parts in (("memory", rank["memory"]), ("traffic", rank["traffic"])):
            for name, (counted, planned) in parts.items():
                limit = WITHIN.get(name, STATE_WITHIN) if kind == "memory" else TRAFFIC_WITHIN
                if abs(planned - counted) > limit * max(counted, planned):
                    found.append(
                        f"rank {rank['rank']}: {name} of {counted:,.0f} bytes, planned {planned:,.0f} "
                        f"({planned / max(counted, 1) - 1:+.1%})"
                    )
    return found


def page(results: list[dict[str, Any]]) -> str:
    """The page of all results, Markdown."""
    return _TEXT.format(
        summary=summary(results), memory=memory(results), traffic=traffic(results), waits=waits(results)
    )


_TEXT = """# Rehearsals

Written by `make test-rehearsal`: every recipe on the numbers of GPUs of docs/planning.md that it fits (as a GPU of the first cluster
that it fits), and layouts that no recipe has. The first, a middle and the last rank of each pipeline stage are built at their real size
with tensors that hold no data, and take one step; of the micro-batches as many as fill the pipeline. Each figure is what was counted,
and in parentheses the error of the plan. Memory must be within 5% of the plan (weights, gradients and optimizer state within 1%), and
traffic within 2%; sends and receives of all stages must pair up. Host waits are those of one step.

{summary}

## Memory

GiB of the rank whose activations are furthest from the plan.

{memory}

## Traffic

GiB that leave the rank in the step, by kind; of the rank that is furthest from the plan.

{traffic}

## Where the host waits

{waits}
"""


def summary(results: list[dict[str, Any]]) -> str:
    """One sentence with the largest errors of the plan."""
    ranks = [rank for result in results for rank in result["ranks"]]
    state = max(_error(rank["memory"][name]) for rank in ranks for name in STATE)
    activations, peak = (max(_error(rank["memory"][name]) for rank in ranks) for name in WITHIN)
    sent = max(_error(part) for rank in ranks for part in rank["traffic"].values())
    return (
        f"{len(results)} cases, {len(ranks)} ranks: weights, gradients and optimizer state within {state:.1%} of the plan, "
        f"activations within {activations:.1%}, the peak within {peak:.1%}, traffic within {sent:.1%}; "
        f"{sum(result['pairs'] for result in results):,} sends and receives, all paired."
    )


def memory(results: list[dict[str, Any]]) -> str:
    """A row for each case: the rank whose activations are furthest from the plan."""
    rows = []
    for result in results:
        worst = max(result["ranks"], key=lambda rank: _error(rank["memory"]["activations, logits"]))
        parts = [_with_plan(part) for part in worst["memory"].values()]
        counts = [max(count(rank) for rank in result["ranks"]) for count in (_collectives, _waits)]
        rows.append([
            result["case"], result["cluster"], result["layers"].replace("_", " "), _numbers(result), worst["rank"], *parts,
            counts[0], result["pairs"], counts[1],
        ])  # fmt: skip
    head = ["recipe, GPUs", "cluster", "layers", "ranks", "shown", *results[0]["ranks"][0]["memory"]]
    return _markdown([*head, "collectives", "pairs", "host waits"], rows)


def traffic(results: list[dict[str, Any]]) -> str:
    """A row for each case: the rank whose traffic is furthest from the plan."""
    kinds = list(dict.fromkeys(kind for result in results for rank in result["ranks"] for kind in rank["traffic"]))
    rows = []
    for result in results:
        worst = max(result["ranks"], key=lambda rank: max(map(_error, rank["traffic"].values()), default=0.0))
        sent = [_with_plan(worst["traffic"][kind]) if kind in worst["traffic"] else "" for kind in kinds]
        rows.append([result["case"], worst["rank"], *sent])
    return _markdown(["recipe, GPUs", "rank", *kinds], rows)


def waits(results: list[dict[str, Any]]) -> str:
    """Every place where the host waits, and how often in a step of the rank that waits there most."""
    most: dict[str, tuple[int, str]] = {}
    for result in results:
        for rank in result["ranks"]:
            for place, number in rank["waits"].items():
                most[place] = max(most.get(place, (0, "")), (number, result["case"]))
    rows = [[f"`{place}`", number, case] for place, (number, case) in sorted(most.items())]
    return _markdown(["place", "most in a step", "where"], rows)


def cases_of(text: str) -> list[str]:
    """The names of the cases whose memory a page shows."""
    return re.findall(r"^\| (\S.*?) \|", text.split("## Memory")[1].split("## Traffic")[0], re.MULTILINE)[2:]


def _markdown(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _numbers(result: dict[str, Any]) -> str:
    return ", ".join(str(rank["rank"]) for rank in result["ranks"])


def _collectives(rank: dict[str, Any]) -> int:
    return rank["collectives"]


def _waits(rank: dict[str, Any]) -> int:
    return sum(rank["waits"].values())


def _error(part: list[float]) -> float:
    counted, planned = part
    return abs(planned / counted - 1) if counted else float(planned > 0)


def _with_plan(part: list[float]) -> str:
    counted, planned = part
    return f"{counted / 2**30:.3g} ({planned / counted - 1:+.1%})" if counted else f"0 ({planned / 2**30:.3g})"
