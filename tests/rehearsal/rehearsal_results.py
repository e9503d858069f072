"""Cases run by worker processes, what is wrong with a result, and the results as a table."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

from megatron_a2d.utils.printable import print_line
from tests.rehearsal.rehearsal_cases import Case

ROOT = Path(__file__).resolve().parents[2]
# Of what was counted; beside it the planner rounds a few small tensors away.
WITHIN = {"activations, logits": 0.05, "peak": 0.05}
STATE_WITHIN = 0.01
TRAFFIC_WITHIN = 0.02


def run_cases(cases: list[Case], num_workers: int) -> Iterator[dict[str, Any]]:
    """Their results, as they come."""
    waiting: Queue[Case] = Queue()
    for case in cases:
        waiting.put(case)
    results: Queue[dict[str, Any]] = Queue()
    threads = [threading.Thread(target=_feed, args=(waiting, results), daemon=True) for _ in range(num_workers)]
    for thread in threads:
        thread.start()
    for _ in cases:
        yield results.get()


def _feed(waiting: Queue[Case], results: Queue[dict[str, Any]]) -> None:
    engine = os.environ.get("A2D_TRANSFORMER_ENGINE", "")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), engine])),
        "OMP_NUM_THREADS": "1",
    }
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.rehearsal.rehearsal_worker"], cwd=ROOT, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdin and worker.stdout and worker.stderr
    while not waiting.empty():
        case = waiting.get()
        print(json.dumps(dataclasses.asdict(case)), file=worker.stdin, flush=True)
        line = worker.stdout.readline()
        if not line:
            results.put({"case": case.name, "ranks": [], "problems": [worker.stderr.read()[-2000:]], "seconds": 0.0})
            return _feed(waiting, results)
        results.put(json.loads(line))
    worker.stdin.close()
    worker.wait()


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


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row for each case, the rank that is furthest from the plan."""
    rows = [
        "| recipe, GPUs | layers | ranks | state, GiB | activations, GiB (plan) | peak, GiB (plan) | largest traffic error | "
        "collectives | pairs | host waits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        ranks = result["ranks"]
        worst = max(ranks, key=lambda rank: _error(rank["memory"]["activations, logits"]))
        state = sum(worst["memory"][name][0] for name in ("weights", "gradients", "optimizer state"))
        traffic = max((_error(part) for rank in ranks for part in rank["traffic"].values()), default=0.0)
        rows.append(
            f"| {result['case']} | {result['layers'].replace('_', ' ')} | {', '.join(str(rank['rank']) for rank in ranks)} "
            f"| {state / 2**30:.1f} | {_with_plan(worst['memory']['activations, logits'])} "
            f"| {_with_plan(worst['memory']['peak'])} | {traffic:.1%} | {max(rank['collectives'] for rank in ranks)} "
            f"| {result['pairs']} | {max(sum(rank['waits'].values()) for rank in ranks)} |"
        )
    return "\n".join(rows)


def _error(part: list[float]) -> float:
    counted, planned = part
    return abs(planned / counted - 1) if counted else float(planned > 0)


def _with_plan(part: list[float]) -> str:
    counted, planned = part
    return f"{counted / 2**30:.2f} ({planned / counted - 1:+.1%})"


def waits(results: list[dict[str, Any]]) -> str:
    """Markdown: every place where the host waits, and how often in a step of the rank that waits there most."""
    most: dict[str, tuple[int, str]] = {}
    for result in results:
        for rank in result["ranks"]:
            for place, number in rank["waits"].items():
                most[place] = max(most.get(place, (0, "")), (number, result["case"]))
    rows = ["| place | most in a step | where |", "| --- | --- | --- |"]
    rows += [f"| `{place}` | {number} | {case} |" for place, (number, case) in sorted(most.items())]
    return "\n".join(rows)


def say(text: str) -> None:
    print_line(text, sys.stderr)
