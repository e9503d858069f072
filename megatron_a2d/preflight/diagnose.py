"""Diagnosis of all processes' node reports: a list of problems and a table (pure functions)."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import TypeVar

from rich.table import Table

from megatron_a2d.preflight.allreduce_test import IN_ALL, IN_NODE, IN_PAIR
from megatron_a2d.preflight.node_info import Facts
from megatron_a2d.terminal.console import human

Who = TypeVar("Who")

# A GPU or a link below this fraction of the median is a problem: a run waits for the slowest.
SLOW = 0.6
# A GPU with a smaller fraction of its memory free is used by another program.
FREE = 0.9


def find_problems(facts: list[Facts], checkpoint_bytes: float) -> list[str]:
    """One line per problem, which names the node. `checkpoint_bytes`: size of a checkpoint of the run."""
    hosts = host_names(facts)
    problems = _versions(facts, hosts) + _gpus(facts, hosts) + _network(facts, hosts)
    seen: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        for problem in fact.problems:
            seen[problem].append(hosts[fact.node])
    problems += [f"{_these(nodes)}: {problem}" for problem, nodes in seen.items()]
    for fact in facts:
        if 0 < fact.disk_free < checkpoint_bytes:
            problems.append(
                f"{hosts[fact.node]}: --save has {human(fact.disk_free, 'B')} free, and a checkpoint of this run needs "
                f"about {human(checkpoint_bytes, 'B')}; free disk space"
            )
            break
    return problems


def host_names(facts: list[Facts]) -> dict[int, str]:
    """Node number -> host name; nodes with the same host name also get their number."""
    names = {fact.node: fact.host for fact in facts}
    twice = Counter(names.values())
    return {node: f"{name} (node {node})" if twice[name] > 1 else name for node, name in names.items()}


def missing(num_ranks: int, arrived: dict[int, Facts], per_node: int) -> list[str]:
    """One line per node with processes that have not reported."""
    lost: dict[int, list[int]] = defaultdict(list)
    for rank in range(num_ranks):
        if rank not in arrived:
            lost[rank // per_node].append(rank)
    hosts = host_names(list(arrived.values()))
    return [
        f"{hosts.get(node, f'node {node}')}: ranks {', '.join(map(str, ranks))} have not reported; see its log"
        for node, ranks in lost.items()
    ]


def _versions(facts: list[Facts], hosts: dict[int, str]) -> list[str]:
    problems = []
    for name in dict.fromkeys(name for fact in facts for name in fact.versions):
        nodes: dict[str, set[int]] = defaultdict(set)
        for fact in facts:
            nodes[fact.versions.get(name, "none")].add(fact.node)
        usual = max(nodes, key=lambda version: len(nodes[version]))
        for version, those in nodes.items():
            if version != usual:
                names = _these([hosts[node] for node in sorted(those)])
                problems.append(
                    f"{names}: {name} is {version} there and {usual} elsewhere; install the same version everywhere"
                )
    return problems


def _gpus(facts: list[Facts], hosts: dict[int, str]) -> list[str]:
    with_gpu = [fact for fact in facts if fact.num_gpus]
    if not with_gpu:
        return []
    problems = []
    firsts = {fact.node: fact for fact in reversed(facts)}
    for node, fact in sorted(firsts.items()):
        if fact.num_gpus < fact.num_processes:
            problems.append(
                f"{hosts[node]}: has {fact.num_gpus} GPUs for {fact.num_processes} processes; check its driver, or "
                "start fewer processes per node"
            )
    usual = Counter(fact.gpu for fact in with_gpu).most_common(1)[0][0]
    median = statistics.median(fact.flops for fact in with_gpu)
    for fact in with_gpu:
        which = f"{hosts[fact.node]}, rank {fact.rank}"
        if fact.gpu and fact.gpu != usual:
            problems.append(f"{which}: its GPU is {fact.gpu}, the others' {usual}; use nodes with the same GPUs")
        if fact.memory and fact.memory_free < FREE * fact.memory:
            used = human(fact.memory - fact.memory_free, "B")
            problems.append(f"{which}: {used} of its GPU's memory are in use; stop the program that uses it")
        if fact.gpu and fact.flops < SLOW * median:
            problems.append(
                f"{which}: its GPU reaches {human(fact.flops, 'FLOP/s')} in a matrix product, the others "
                f"{human(median, 'FLOP/s')}; exclude the node"
            )
    return problems


def _network(facts: list[Facts], hosts: dict[int, str]) -> list[str]:
    """Failed or (on GPUs) slow all-reduces: inside nodes, then between nodes, then those that only fail over all."""
    problems = []
    on_gpus = any(fact.gpu for fact in facts)
    figures: dict[str, dict[int, float | str]] = defaultdict(dict)  # by stage, then node
    for fact in facts:
        for stage, speed in fact.speeds.items():
            known = figures[stage].get(fact.node)
            if known is None or isinstance(speed, str):
                figures[stage][fact.node] = speed
    inside = figures.get(IN_NODE, {})
    for node, why in _bad(inside, on_gpus).items():
        problems.append(f"{hosts[node]}: all-reduce inside the node: {why}; exclude the node")
    pairs: dict[tuple[int, int], float | str] = {}
    for stage, by_node in figures.items():
        if stage.startswith(IN_PAIR):
            one, other = map(int, stage.split()[1:])
            # A failure at either end, otherwise the slower one.
            pairs[one, other] = min(by_node.values(), key=lambda speed: -1.0 if isinstance(speed, str) else speed)
    bad = _bad(pairs, on_gpus)
    sick = {node for pair in bad for node in pair if all(other in bad for other in pairs if node in other)}
    for pair, why in bad.items():
        named = [node for node in pair if node in sick] or list(pair)
        where = " or ".join(hosts[node] for node in named)
        ends = " and ".join(hosts[node] for node in pair)
        problems.append(f"{where}: all-reduce between {ends}: {why}; exclude the node")
    failed = {node: why for node, why in figures.get(IN_ALL, {}).items() if isinstance(why, str)}
    if failed and not problems:
        names = _these([hosts[node] for node in sorted(failed)])
        problems.append(f"{names}: all-reduce over all nodes: {next(iter(failed.values()))}; check their network")
    return problems


def _bad(speeds: Mapping[Who, float | str], on_gpus: bool) -> dict[Who, str]:
    """Those that failed or are much slower than the median, with the reason. CPU speeds vary too much to compare."""
    good = [speed for speed in speeds.values() if not isinstance(speed, str)]
    median = statistics.median(good) if good else 0.0
    found = {}
    for who, speed in speeds.items():
        if isinstance(speed, str):
            found[who] = speed
        elif on_gpus and speed < SLOW * median:
            found[who] = f"{human(speed, 'B')}/s, the others {human(median, 'B')}/s"
    return found


def _these(names: list[str]) -> str:
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more nodes" if len(shown) > 4 else "")


def table(facts: list[Facts]) -> Table:
    """Table with one line per node: the worst of its processes."""
    hosts = host_names(facts)
    result = Table(title=f"preflight: {len(hosts)} nodes, {len(facts)} processes", title_justify="left")
    for name in (
        "node",
        "processes",
        "GPU",
        "GPU memory free",
        "matrix product",
        "all-reduce inside",
        "between",
        "disk",
    ):
        result.add_column(name, justify="left" if name in ("node", "GPU") else "right")
    for node in sorted(hosts):
        mine = [fact for fact in facts if fact.node == node]
        result.add_row(
            hosts[node],
            str(len(mine)),
            mine[0].gpu or "none",
            human(min(fact.memory_free for fact in mine), "B") if mine[0].gpu else "-",
            human(min(fact.flops for fact in mine), "FLOP/s"),
            _worst(mine, lambda stage: stage == IN_NODE),
            _worst(mine, lambda stage: stage.startswith(IN_PAIR) or (stage == IN_ALL and len(hosts) > 1)),
            human(mine[0].disk_free, "B") if mine[0].disk_free else "-",
        )
    result.caption = ", ".join(f"{name} {version}" for name, version in facts[0].versions.items())
    result.caption_justify = "left"
    return result


def _worst(facts: list[Facts], wanted: Callable[[str], bool]) -> str:
    speeds = [speed for fact in facts for stage, speed in fact.speeds.items() if wanted(stage)]
    if any(isinstance(speed, str) for speed in speeds):
        return "failed"
    numbers = [speed for speed in speeds if not isinstance(speed, str)]
    return f"{human(min(numbers), 'B')}/s" if numbers else "-"
