"""bench/paired.py and what it measures with: order of turns, ratios, noise, CPU time of trees, the page cache."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from bench import page_cache, process_tree
from bench.paired import Comparison, Spread, Usage, compare, in_process
from bench.result_file import Figure
from megatron_a2d.utils.errors import UserError

BURN = "import time\nwhile time.process_time() < {0}: pass\n"


def test_sides_take_turns_in_alternating_order() -> None:
    """Times that rise from run to run are met by both sides alike."""
    order: list[str] = []

    def side(name: str, factor: float) -> Usage:
        order.append(name)
        return Usage(wall=factor * len(order), cpu=factor)

    sides = {"a": lambda: side("a", 3.0), "b": lambda: side("b", 1.5)}
    compared = compare("x", sides, [("a", "b")], rounds=4)
    assert "".join(order) == "baabbaabba"  # a warm-up round, then four
    assert [usage.wall for usage in compared.runs["a"]] == [9.0, 18.0, 21.0, 30.0]
    assert compared.ratio("a", "b", "cpu") == Spread(2.0, 2.0, 2.0, 4)
    assert compared.median("b", "cpu") == 1.5


def test_what_precedes_runs_is_done_before_each() -> None:
    done: list[str] = []

    def side(name: str) -> Usage:
        done.append(name)
        return Usage(1.0, 1.0)

    compare(
        "x", {"a": lambda: side("a"), "b": lambda: side("b")}, [("a", "b")], rounds=1, warm_up=0,
        prepare=lambda: done.append("-"),
    )  # fmt: skip
    assert done == ["-", "a", "-", "b"]


def test_ratios_are_of_the_same_round() -> None:
    """The machine is twice as slow in the second round: medians of the sides would say 1.5."""
    runs = {"a": [Usage(2, 2), Usage(4, 4), Usage(2, 2)], "b": [Usage(1, 1), Usage(2, 2), Usage(1, 1)]}
    assert Comparison("x", runs, [("a", "b")]).ratio("a", "b", "wall") == Spread(2.0, 2.0, 2.0, 3)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 1.04, 1.08, 1.06, 1.02], "1.04 (1.02 to 1.06)"),
        ([0.9, 1.0, 1.1, 1.2, 1.3], "noisy"),  # quartiles 1.0 and 1.2
        ([1.0, 1.02, 1.09], "1.02 (1.00 to 1.09)"),  # too few for quartiles: the smallest and the largest
        ([1.0, 1.1, 1.2], "noisy"),
        ([1.0, 1.0], "noisy"),  # nothing to judge by
        ([1.0], "noisy"),
    ],
)
def test_quartiles_further_apart_than_a_tenth_are_noise(values: list[float], text: str) -> None:
    assert Spread.of(values).text() == text


def test_a_comparison_is_noisy_when_no_clock_is_good() -> None:
    steady, wild = [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]
    for walls, cpus, noisy in ((wild, steady, False), (steady, wild, False), (wild, wild, True)):
        runs = {"a": [Usage(*times) for times in zip(walls, cpus, strict=True)], "b": [Usage(1, 1)] * 3}
        assert Comparison("x", runs, [("a", "b")]).noisy is noisy
    assert not Figure("x", "bytes", [1.0]).noisy and Figure("x", "s", [1.0, 2.0, 3.0]).noisy


def test_stored_and_read_again() -> None:
    runs = {"a": [Usage(3, 2), Usage(4, 3)], "b": [Usage(1, 1), Usage(2, 1)]}
    compared = Comparison("x", runs, [("a", "b")], "cold", {"forwards": 3})
    stored = compared.to_json()
    assert Comparison.from_json(stored) == compared
    assert stored["ratios"] == [
        {"of": "a", "over": "b", "cpu": {"median": 2.5, "quartiles": [2.0, 3.0], "noisy": True},
         "wall": {"median": 2.5, "quartiles": [2.0, 3.0], "noisy": True}}
    ]  # fmt: skip
    assert stored["median_seconds"]["b"] == {"cpu": 1, "wall": 1.5}


def test_times_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    walls, cpus = iter([10.0, 17.0]), iter([1.0, 3.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(walls))
    monkeypatch.setattr(time, "process_time", lambda: next(cpus))
    calls: list[str] = []
    assert in_process(lambda: calls.append("run"), lambda: calls.append("finish"))() == Usage(wall=7.0, cpu=2.0)
    assert calls == ["run", "finish"]


def test_cpu_time_of_a_tree_has_its_orphans() -> None:
    """A child that nobody waits for, in a session of its own, and that outlives the command."""
    burn = BURN.format(0.25)
    start = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {burn!r}], start_new_session=True)\n"
    usage = process_tree.run([sys.executable, "-S", "-c", start])
    assert 0.25 < usage.cpu < 2.0
    assert process_tree.run([sys.executable, "-S", "-c", "pass"]).cpu < 0.2


def test_commands_cache_bytecode_as_users_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "imported.py").write_text("")
    process_tree.run([sys.executable, "-S", "-c", "import imported"], directory=tmp_path)
    assert list(tmp_path.rglob("*.pyc"))


def test_a_command_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3: .*no such thing"):
        process_tree.run([sys.executable, "-S", "-c", "import sys; print('no such thing'); sys.exit(3)"])
    assert process_tree.run([sys.executable, "-S", "-c", "raise SystemExit(3)"], code=3).wall > 0


def test_memory_of_a_tree_has_its_children() -> None:
    hold = "import time; x = bytearray(80_000_000); time.sleep(0.5)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {hold!r}], check=True)"
    assert 80_000_000 < process_tree.peak_memory([sys.executable, "-S", "-c", start]) < 200_000_000


def test_a_cold_file_is_not_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gone, other = tmp_path / "files", tmp_path / "out", tmp_path / "out.bin"
    folder.mkdir()
    gone.mkdir()
    other.write_bytes(b"x")
    (folder / "a.bin").write_bytes(os.urandom(1_000_001))
    (folder / "empty").touch()
    assert page_cache.resident(folder / "a.bin") == 1.0 and page_cache.resident(folder / "empty") == 0.0
    page_cache.before("cold", [folder], [gone, other, tmp_path / "nothing"])()
    assert not gone.exists() and not other.exists()
    assert page_cache.resident(folder / "a.bin") == 0.0
    page_cache.before("warm", [folder])()
    assert page_cache.resident(folder / "a.bin") == 1.0
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)  # as where the file system keeps them
    with pytest.raises(UserError, match=r"a.bin: 100% of it stays in the page cache"):
        page_cache.cold([folder])
