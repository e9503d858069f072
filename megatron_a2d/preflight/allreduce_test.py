"""All-reduce test: inside each node, between neighbouring nodes, and over all nodes. Speeds are bus bandwidths.

Each stage runs in a thread with a deadline, so that a hung communicator does not hang the process. The pairs identify
a bad node: it is in every pair that fails or is slow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_a2d.megatron_compat.device import communication_backend, device

# Longer than any stage may take: NCCL would end the process at its timeout.
_NEVER = timedelta(hours=1)
IN_NODE, IN_PAIR, IN_ALL = "node", "pair", "all"


class Stage(NamedTuple):
    """An all-reduce among `ranks`; `name` is the key of its result."""

    name: str
    ranks: list[int]


def rounds(node_of: list[int], rank: int) -> list[Stage | None]:
    """The stage of `rank` in each round, None where it is idle. `node_of`: the node of each rank, 0 to N - 1."""
    members: dict[int, list[int]] = {}
    for other, node in enumerate(node_of):
        members.setdefault(node, []).append(other)
    pairs = pairs_of(len(members))
    # Even pairs first, then odd ones; in a ring of odd length the closing pair has its own round.
    closing = pairs[-1:] if len(members) % 2 else []
    rest = pairs[: len(pairs) - len(closing)]
    plan: list[list[Stage]] = [[Stage(IN_NODE, ranks) for ranks in members.values()]]
    plan += [
        [Stage(pair_name(*pair), sorted(members[pair[0]] + members[pair[1]])) for pair in some]
        for some in (rest[0::2], rest[1::2], closing)
    ]
    plan.append([Stage(IN_ALL, list(range(len(node_of))))])
    plan = [[stage for stage in stages if len(stage.ranks) > 1] for stages in plan]
    return [next((stage for stage in stages if rank in stage.ranks), None) for stages in plan if stages]


def pairs_of(num_nodes: int) -> list[tuple[int, int]]:
    """Pairs of neighbours on a ring, each node in two of them; none for fewer than three nodes."""
    return [(node, (node + 1) % num_nodes) for node in range(num_nodes)] if num_nodes > 2 else []


def pair_name(one: int, other: int) -> str:
    return f"{IN_PAIR} {one} {other}"


def measure(
    store: dist.Store, rank: int, node_of: list[int], num_bytes: int, repeats: int, deadline: float
) -> dict[str, float | str]:
    """Bytes/s, or an error message, by name of this rank's stages. A stage has `deadline` seconds."""
    if len(node_of) == 1:
        return {}

    def begin() -> float:
        backend = communication_backend()
        dist.init_process_group(backend, store=store, rank=rank, world_size=len(node_of), timeout=_NEVER)
        return 0.0

    if isinstance(failure := within(deadline, begin), str):
        return {IN_ALL: failure}
    results: dict[str, float | str] = {}
    for number, stage in enumerate(rounds(node_of, rank)):
        # All start a round together, so that a rank that waited for a bad node is not late for the next round.
        wait_for_all(store, f"round_{number}", len(node_of), 2 * deadline)
        if stage:
            results[stage.name] = within(deadline, partial(_all_reduce, stage, num_bytes, repeats))
    return results


def wait_for_all(store: dist.Store, key: str, size: int, patience: float) -> None:
    """Wait until all ranks are here, at most `patience` seconds."""
    store.add(key, 1)
    end = time.monotonic() + patience
    while store.add(key, 0) < size and time.monotonic() < end:
        time.sleep(0.05)


def within(deadline: float, work: Callable[[], float]) -> float | str:
    """The result of `work`, or an error message."""
    box: list[float | str] = []

    def run() -> None:
        try:
            box.append(work())
        except Exception as error:
            box.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(deadline)
    return box[0] if box else f"no result within {deadline:.0f} s"


def _all_reduce(stage: Stage, num_bytes: int, repeats: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # a new thread starts with device 0
    # Only the group's members rendezvous for it.
    group = dist.new_group(stage.ranks, timeout=_NEVER, use_local_synchronization=True)
    best = float("inf")
    size = len(stage.ranks)
    for _ in range(1 + repeats):  # the first one sets up the connections
        values = torch.full((num_bytes // 4,), float(dist.get_rank() + 1), device=device())
        values[:1].item()  # synchronises
        begin = time.perf_counter()
        dist.all_reduce(values, group=group)
        ends = values[[0, -1]].tolist()
        best = min(best, time.perf_counter() - begin)
        expected = float(sum(rank + 1 for rank in stage.ranks))
        if ends != [expected, expected]:
            raise ArithmeticError(f"the sum is {ends[0]:g}, not {expected:g}")
    return 2 * (size - 1) / size * num_bytes / best
