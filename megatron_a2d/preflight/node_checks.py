"""Checks across all nodes: a report from each process, all-reduces between them, and the diagnosis on rank 0."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from rich.table import Table

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.planner.cluster import Cluster
from megatron_a2d.planner.run_forecast import checkpoint_bytes
from megatron_a2d.preflight import allreduce_test, diagnose
from megatron_a2d.preflight.node_info import Facts, check_files, gather_facts, sizes
from megatron_a2d.terminal.console import PlainConsole, console
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.exit_codes import USER_ERROR
from megatron_a2d.utils.printable import print_line

_CHECKING = timedelta(hours=2)  # rank 0 may verify the checksums of a large checkpoint or corpus
_ARRIVAL = 120.0  # seconds; torchrun starts all processes at about the same time
_FAREWELL = 60.0  # seconds for all ranks to read the result, since the store ends with the first node
_STAGE = 90.0  # seconds for one all-reduce, including the connection setup
_MESSAGE, _THOROUGH_MESSAGE = 64 << 20, 1 << 30  # bytes


def check_nodes(config: RunConfig, thorough: bool, cluster: Cluster | None) -> None:
    from megatron_a2d.distributed import process_groups

    rank, size = process_groups.rank(), process_groups.world_size()
    store = process_groups.meet(_CHECKING, "preflight")
    mine = gather_facts(rank)
    store.set(f"arrived/{rank}", json.dumps(dataclasses.asdict(mine)))
    arrived = {}
    if rank == 0:
        inputs, checkpoint_bytes, problems = _check_run(config, size, cluster)
        if not problems:
            arrived = _wait_for(store, "arrived", size)
            # If some nodes have no GPUs, the network is not tested.
            problems = diagnose.missing(size, arrived, mine.num_processes)
            problems += diagnose.find_problems(list(arrived.values()), 0.0)
        if problems and arrived:
            _show(diagnose.table(list(arrived.values())))
        probe = None
        if not problems:
            probe, problems = _make_probe(config.training.save)
        readers = len(arrived) or size  # missing ranks are not waited for
        nodes = [] if problems else [arrived[other].node for other in range(size)]
        store.set(
            "plan",
            json.dumps({"inputs": inputs, "probe": probe, "nodes": nodes, "problems": problems, "readers": readers}),
        )
    plan = json.loads(store.get("plan"))
    if plan["problems"]:
        _end(store, rank, plan["readers"], plan["problems"])
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_files(mine, plan["inputs"], config.training.save, plan["probe"])
    # Small without GPUs: enough for loopback and Ethernet.
    num_bytes = _THOROUGH_MESSAGE if thorough else _MESSAGE if mine.gpu else _MESSAGE // 16
    mine.speeds = allreduce_test.measure(store, rank, plan["nodes"], num_bytes, 10 if thorough else 3, _STAGE)
    store.set(f"report/{rank}", json.dumps(dataclasses.asdict(mine)))
    if rank == 0:
        reports = _wait_for(store, "report", size)
        problems = diagnose.missing(size, reports, mine.num_processes)
        problems += diagnose.find_problems(list(reports.values()), checkpoint_bytes)
        if plan["probe"]:
            Path(plan["probe"]).unlink(missing_ok=True)
        _show(diagnose.table(list(reports.values())))
        store.set("verdict", json.dumps(problems))
    problems = json.loads(store.get("verdict"))
    _end(store, rank, size, problems)


def _check_run(config: RunConfig, size: int, cluster: Cluster | None) -> tuple[dict[str, int], float, list[str]]:
    """Sizes of the run's input files, the size of its checkpoints, and problems with the settings."""
    from megatron_a2d.training.startup_checks import check_run, input_files

    try:
        checked = check_run(config, size, cluster)
    except UserError as error:
        return {}, 0.0, error.problems
    inputs = sizes(input_files(config, checked.start.directory))
    return inputs, checkpoint_bytes(config, checked.model_config), []


def _make_probe(save: str | None) -> tuple[str | None, list[str]]:
    """A file in --save that the other nodes must see, or the problem with creating it."""
    if save is None:
        return None, []
    directory = Path(save).absolute()
    probe = directory / f".preflight-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        return None, [f"--save {save}: cannot write checkpoints there ({error.strerror}); choose another directory"]
    return str(probe), []


def _wait_for(store: dist.Store, stage: str, size: int) -> dict[int, Facts]:
    """The reports of all ranks that arrive in time."""
    patience = _ARRIVAL if stage == "arrived" else 10 * _STAGE
    end = time.monotonic() + patience
    found: dict[int, Facts] = {}
    while len(found) < size:
        for rank in set(range(size)) - found.keys():
            if store.check([f"{stage}/{rank}"]):
                found[rank] = Facts(**json.loads(store.get(f"{stage}/{rank}")))
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return dict(sorted(found.items()))


def _show(table: Table) -> None:
    """Print the table, wide enough if the output is a log."""
    (console if console.is_terminal else PlainConsole(stderr=True, width=150)).print(table)


def _end(store: dist.Store, rank: int, num_readers: int, problems: list[str]) -> None:
    """Exit when all ranks have read the result; without cleanup, which a hung communicator would block."""
    if rank == 0:  # before any rank exits: torchrun then stops the others on its node
        for problem in problems:
            print_line(f"error: {problem}", sys.stderr)
    with contextlib.suppress(dist.DistNetworkError):  # the first node has seen all ranks arrive, and has exited
        allreduce_test.wait_for_all(store, "read", num_readers, _FAREWELL)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(USER_ERROR if problems else 0)
