"""What preflight makes of reports: which node is named, for what."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

from megatron_a2d.preflight.allreduce_test import IN_ALL, IN_NODE, pair_name, pairs_of, rounds, within
from megatron_a2d.preflight.diagnose import find_problems, missing
from megatron_a2d.preflight.node_checks import _end, _make_probe
from megatron_a2d.preflight.node_info import Facts, check_files

GB = 1e9


def cluster(num_nodes: int = 4, per_node: int = 2) -> list[Facts]:
    """Reports of nodes with GPUs on which all is well."""
    facts = []
    for rank in range(num_nodes * per_node):
        node = rank // per_node
        speeds: dict[str, float | str] = {IN_NODE: 400 * GB, IN_ALL: 45 * GB}
        speeds |= {pair_name(*pair): 50 * GB for pair in pairs_of(num_nodes) if node in pair}
        facts.append(
            Facts(
                rank, node, f"n{node}", {"torch": "2.9", "driver": "580"}, per_node, per_node, "H200", int(141 * GB),
                int(140 * GB), 7e14, int(1e13), [], speeds,
            )
        )  # fmt: skip
    return facts


def change(facts: list[Facts], node: int, **changes: Any) -> None:
    for place, fact in enumerate(facts):
        if fact.node == node:
            facts[place] = dataclasses.replace(fact, **changes)


def test_nothing_is_found_where_all_is_well() -> None:
    assert find_problems(cluster(), 1e12) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"versions": {"torch": "2.9", "driver": "570"}}, ["n2: driver is 570 there and 580 elsewhere"]),
        ({"versions": {"driver": "580"}}, ["n2: torch is none there and 2.9 elsewhere"]),
        ({"num_gpus": 0, "gpu": "", "memory": 0, "flops": 0.0}, ["n2: has 0 GPUs for 2 processes"]),
        ({"gpu": "H100"}, ["n2, rank 4: its GPU is H100, the others' H200", "n2, rank 5: "]),
        ({"memory_free": int(80 * GB)}, ["n2, rank 4: 61 GB of its GPU's memory are in use", "n2, rank 5: "]),
        ({"flops": 3e14}, ["n2, rank 4: its GPU reaches 300 TFLOP/s", "n2, rank 5: "]),
        ({"problems": ["/data/x.bin: cannot be read there"]}, ["n2: /data/x.bin: cannot be read there"]),
        ({"disk_free": int(1e11)}, ["n2: --save has 100 GB free, and a checkpoint of this run needs about 1 TB"]),
    ],
)
def test_the_node_is_named(changes: dict[str, Any], said: list[str]) -> None:
    facts = cluster()
    change(facts, 2, **changes)
    problems = find_problems(facts, 1e12)
    assert len(problems) == len(said), problems
    assert all(problem.startswith(start) for problem, start in zip(problems, said, strict=True)), problems


def spoil(facts: list[Facts], stage: str, speed: float | str) -> None:
    for fact in facts:
        if stage in fact.speeds:
            fact.speeds[stage] = speed


def test_a_sick_node_is_told_from_its_neighbours() -> None:
    facts = cluster(5)
    for pair in pairs_of(5):
        if 3 in pair:
            spoil(facts, pair_name(*pair), "no result within 90 s")
    spoil(facts, IN_ALL, "no result within 90 s")
    problems = find_problems(facts, 0.0)
    assert len(problems) == 2 and all(problem.startswith("n3: all-reduce between ") for problem in problems), problems
    # One pair alone: it may be the cable.
    facts = cluster(5)
    spoil(facts, pair_name(2, 3), 4 * GB)
    (problem,) = find_problems(facts, 0.0)
    assert problem.startswith("n2 or n3: all-reduce between n2 and n3: 4 GB/s, the others 50 GB/s")


def test_inside_a_node_and_over_all() -> None:
    facts = cluster()
    change(facts, 1, speeds={IN_NODE: "ArithmeticError: the sum is 2, not 3"})
    (problem,) = find_problems(facts, 0.0)
    assert problem.startswith("n1: all-reduce inside the node: ArithmeticError")
    facts = cluster(2, 1)
    spoil(facts, IN_ALL, "no result within 90 s")
    (problem,) = find_problems(facts, 0.0)
    assert problem.startswith("n0, n1: all-reduce over all nodes: no result")


def test_speeds_of_cpus_say_too_little() -> None:
    facts = [dataclasses.replace(fact, gpu="", num_gpus=0, memory=0, memory_free=0) for fact in cluster()]
    facts[4].speeds[IN_NODE] = 1.0
    facts[5].flops = 1.0
    assert find_problems(facts, 0.0) == []


def test_who_has_not_come() -> None:
    arrived = {fact.rank: fact for fact in cluster() if fact.rank not in (3, 6, 7)}
    assert [line.split(" have")[0] for line in missing(8, arrived, 2)] == ["n1: ranks 3", "node 3: ranks 6, 7"]


@pytest.mark.parametrize("num_nodes", range(1, 8))
def test_every_pair_meets_once_and_nobody_waits_for_two(num_nodes: int) -> None:
    node_of = [rank // 2 for rank in range(2 * num_nodes)]
    plans = [rounds(node_of, rank) for rank in range(len(node_of))]
    assert len({len(plan) for plan in plans}) == 1, "all meet before each round"
    seen = set()
    for stages in zip(*plans, strict=True):
        for rank, stage in enumerate(stages):
            if stage:
                seen.add(stage.name)
                assert rank in stage.ranks and all(stages[other] == stage for other in stage.ranks)
    pairs = {pair_name(*pair) for pair in pairs_of(num_nodes)}
    assert seen - {IN_NODE, IN_ALL} == pairs and len(pairs) == (num_nodes if num_nodes > 2 else 0)


def test_what_hangs_is_left_behind() -> None:
    import time

    assert within(300.0, lambda: 3.0) == 3.0
    assert within(0.1, lambda: time.sleep(30) or 0.0) == "no result within 0 s"

    def broken() -> float:
        raise RuntimeError("no\nroute")

    assert within(5.0, broken) == "RuntimeError: no route"


def test_files_that_differ_and_a_directory_that_is_not_shared(tmp_path: Any) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345")
    facts = cluster(1, 1)[0]
    inputs = {str(tmp_path / "a.bin"): 5, str(tmp_path / "b.bin"): 5}
    probe = tmp_path / "probe"
    check_files(facts, inputs, str(tmp_path), str(probe))
    assert len(facts.problems) == 2 and "b.bin: cannot be read there" in facts.problems[0]
    assert f"--save {tmp_path}: is a different directory there" in facts.problems[1]
    facts.problems.clear()
    probe.touch()
    inputs = {str(tmp_path / "a.bin"): 6}
    check_files(facts, inputs, str(tmp_path), str(probe))
    assert facts.problems == [
        f"{tmp_path / 'a.bin'}: has 5 bytes there and 6 on the first node; make the files identical"
    ]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    probe, problems = _make_probe(str(tmp_path / "file" / "sub"))
    assert probe is None and len(problems) == 1 and "file/sub: cannot write checkpoints there" in problems[0]
    probe, problems = _make_probe(str(tmp_path / "new"))
    assert probe is not None and Path(probe).exists() and problems == []


def test_problems_are_printed_before_any_rank_exits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun stops the other ranks of a node when one has exited."""
    printed: list[str] = []

    class Store(HashStore):
        def add(self, key: str, amount: int) -> int:
            printed.append(capsys.readouterr().err)
            return super().add(key, amount)

    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        _end(Store(), 0, 1, ["n2: has no GPU"])
    assert ended.value.code == 2 and printed[0] == "error: n2: has no GPU\n"


def test_the_first_node_may_exit_before_the_others_have_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the store, and exits as soon as all ranks have read the result."""
    first_node = (
        "import torch.distributed as dist\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "while store.add('read', 0) < 1: pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", first_node], stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout
        store = TCPStore("127.0.0.1", int(node.stdout.readline()), is_master=False)
        monkeypatch.setattr(os, "_exit", sys.exit)
        try:
            with pytest.raises(SystemExit) as ended:
                _end(store, 1, 2, ["n2: has no GPU"])
        finally:
            node.kill()
    assert ended.value.code == 2
