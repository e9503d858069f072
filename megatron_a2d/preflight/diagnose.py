"""What is wrong, from all processes' reports: pure, and so is the table."""

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

# Below this part of the median, a GPU or a link is not fit for a run in which all wait for the slowest.
SLOW = 0.6
# A GPU with less of its memory free serves somebody else.
FREE = 0.9


def find_problems(facts: list[Facts], checkpoint_bytes: float) -> list[str]:
    """A line for each problem, with the node that has it. `checkpoint_bytes`: the size of the run's checkpoints."""
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
                f"{hosts[fact.node]}: --save has {human(fact.disk_free, 'B')} left, and a checkpoint of this run takes "
                f"about {human(checkpoint_bytes, 'B')}; make room"
            )
            break
    return problems


def host_names(facts: list[Facts]) -> dict[int, str]:
    """A name for each node, by number; nodes that call themselves the same are told apart by their number."""
    names = {fact.node: fact.host for fact in facts}
    twice = Counter(names.values())
    return {node: f"{name} (node {node})" if twice[name] > 1 else name for node, name in names.items()}


def missing(num_ranks: int, arrived: dict[int, Facts], per_node: int) -> list[str]:
    """A line for each node of which processes have not reported."""
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
                    f"{names}: {name} is {version} there and {usual} elsewhere; install the same everywhere"
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
                f"{hosts[node]}: has {fact.num_gpus} GPUs for {fact.num_processes} processes; check its driver, or ask "
                "for fewer processes a node"
            )
    usual = Counter(fact.gpu for fact in with_gpu).most_common(1)[0][0]
    median = statistics.median(fact.flops for fact in with_gpu)
    for fact in with_gpu:
        which = f"{hosts[fact.node]}, rank {fact.rank}"
        if fact.gpu and fact.gpu != usual:
            problems.append(f"{which}: its GPU is {fact.gpu}, the others' {usual}; use nodes of one kind")
        if fact.memory and fact.memory_free < FREE * fact.memory:
            used = human(fact.memory - fact.memory_free, "B")
            problems.append(f"{which}: {used} of its GPU's memory are in use; end what uses it")
        if fact.gpu and fact.flops < SLOW * median:
            problems.append(
                f"{which}: its GPU multiplies matrices at {human(fact.flops, 'FLOP/s')}, the others at "
                f"{human(median, 'FLOP/s')}; leave the node out"
            )
    return problems


def _network(facts: list[Facts], hosts: dict[int, str]) -> list[str]:
    """Nodes inside which, then nodes between which, all-reduces fail or (on GPUs) crawl; last, what only all show."""
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
        problems.append(f"{hosts[node]}: all-reduce inside the node: {why}; leave the node out")
    pairs: dict[tuple[int, int], float | str] = {}
    for stage, by_node in figures.items():
        if stage.startswith(IN_PAIR):
            one, other = map(int, stage.split()[1:])
            # A failure of either end, else the slower one.
            pairs[one, other] = min(by_node.values(), key=lambda speed: -1.0 if isinstance(speed, str) else speed)
    bad = _bad(pairs, on_gpus)
    sick = {node for pair in bad for node in pair if all(other in bad for other in pairs if node in other)}
    for pair, why in bad.items():
        named = [node for node in pair if node in sick] or list(pair)
        where = " or ".join(hosts[node] for node in named)
        ends = " and ".join(hosts[node] for node in pair)
        problems.append(f"{where}: all-reduce between {ends}: {why}; leave the node out")
    failed = {node: why for node, why in figures.get(IN_ALL, {}).items() if isinstance(why, str)}
    if failed and not problems:
        names = _these([hosts[node] for node in sorted(failed)])
        problems.append(f"{names}: all-reduce over all nodes: {next(iter(failed.values()))}; check their network")
    return problems


def _bad(speeds: Mapping[Who, float | str], on_gpus: bool) -> dict[Who, str]:
    """Those that failed, or are slow for their kind, with the reason. On CPUs speeds say too little."""
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
    """A row for each node: the worst of its processes."""
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
