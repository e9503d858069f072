"""SIGKILL at random moments and at chosen points, of one rank or of all: nothing is lost but the last interval.

Every kill is followed by a new start with the same command, which resumes from the newest whole checkpoint; at the
end the weights and the optimizer equal those of the run that nobody touched, in every bit. Ranks that outlive a
dead one end within seconds, and name it.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import convert_hf
from megatron_a2d.checkpoint.directory import latest_iteration
from megatron_a2d.utils.exit_codes import PEER_LOST
from tests.exactness import Exactness, Fault
from tests.faults.fork_server import NUM_RANKS, OF_FIRST_RANK, PATIENCE, POINTS, SLOW_WRITER
from tests.parity.layouts import DISTRIBUTED, EP, PP, TP_SP
from tests.parity.pool import Pool
from tests.tiny import write_hf, write_tokens

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
TRAIN_ITERS, SAVE_INTERVAL = 6, 2
RANDOM_KILLS = 8  # in each layout
LAYOUTS = {
    "EP2, distributed optimizer": {**EP, **DISTRIBUTED},
    "TP2+SP, EP2": {**TP_SP, **EP},
    "PP2, asynchronous saves": {**PP, "async_save": True},
    "DP2, distributed optimizer, asynchronous saves": {**DISTRIBUTED, "async_save": True},
}


class ForkServer:
    """The process that starts the ranks (fork_server.py)."""

    def __init__(self, settings: Path, log: Path):
        self._log = open(log, "w")  # noqa: SIM115
        command = [sys.executable, "-m", "tests.faults.fork_server", str(settings)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def attempt(
        self, victims: tuple[int, ...] = (), after: float | None = None, point: str | None = None, pass_by: int = 0
    ) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        command = {"victims": victims, "after": after, "point": point, "pass_by": pass_by}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Run:
    """A run that is killed repeatedly, compared with one that is not."""

    def __init__(self, root: Path, layout: dict[str, Any]):
        settings = {
            "load": str(root / "checkpoint"), "train_data_path": str(root / "tokens"), "train_iters": TRAIN_ITERS,
            "save_interval": SAVE_INTERVAL, "log_interval": 1, "keep_latest_k": 1, "lr_warmup_iters": 3, **layout,
        }  # fmt: skip
        self.save, self.slowest, self.survivors = root / "killed", 0.0, 0
        self.interval = SAVE_INTERVAL * (2 if layout.get("async_save") else 1)
        self._fork_servers = []
        for name in ("unbroken", "killed"):
            (root / f"{name}.json").write_text(json.dumps({**settings, "save": str(root / name)}))
            self._fork_servers.append(ForkServer(root / f"{name}.json", root / f"{name}.log"))
        result = self._fork_servers[0].attempt()
        assert result["codes"] == [0] * NUM_RANKS, result
        self.seconds, self._expected = result["seconds"], self._final(root / "unbroken")

    def kill(self, **how: Any) -> int | None:
        """Start, be killed; steps lost since the newest checkpoint, None if the run had not begun or was over before."""
        if self._steps() == 0 or self.reached() == TRAIN_ITERS:
            shutil.rmtree(self.save, ignore_errors=True)  # whole or not begun: a fresh one
        before, starts = self.reached(), self._starts()
        result = self._fork_servers[1].attempt(**how)
        assert None not in result["codes"], f"a rank outlived its dead peer by {PATIENCE} s: {result}"
        dead = {rank for rank, code in enumerate(result["codes"]) if code == -9}
        if not dead:
            assert result["codes"] == [0] * NUM_RANKS, result
            self.check_equal()
            return None
        assert self.reached() >= before, "a checkpoint that was complete is gone"
        if self._starts() == starts:
            return None
        for rank in set(range(NUM_RANKS)) - dead:
            if result["codes"][rank] == 0 and self.reached() == TRAIN_ITERS:
                continue  # the last checkpoint was complete, and nothing left to do with the other
            assert result["codes"][rank] == PEER_LOST, result
            assert all(f"rank {other} (" in result["said"][rank] for other in dead), result
            self.slowest = max(self.slowest, result["survivors_ended_after"])
            self.survivors += 1
        lost = max(0, self._steps() - self.reached())
        assert lost <= self.interval, result
        return lost

    def complete(self) -> None:
        """Let it run to its end, and compare it with the uninterrupted one."""
        result = self._fork_servers[1].attempt()
        assert result["codes"] == [0] * NUM_RANKS, result
        self.check_equal()

    def check_equal(self) -> None:
        assert self._final(self.save) == self._expected

    def reached(self) -> int:
        """The newest complete checkpoint."""
        return (latest_iteration(self.save) or 0) if self.save.exists() else 0

    def close(self) -> None:
        for fork_server in self._fork_servers:
            fork_server.close()

    def _starts(self) -> int:
        """How often the loop has begun."""
        return sum(record["kind"] == "start" for record in self._log())

    def _steps(self) -> int:
        """The last step that was taken."""
        return next((record["iteration"] for record in reversed(self._log()) if record["kind"] == "train"), 0)

    def _log(self) -> list[dict[str, Any]]:
        log = self.save / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def _final(self, save: Path) -> list[tuple[str, str]]:
        results = [json.loads((save / f"final_{rank}.json").read_text()) for rank in range(NUM_RANKS)]
        return [(result["weights"], result["optimizer"]) for result in results]


@pytest.fixture(params=list(LAYOUTS))
def run(request: pytest.FixtureRequest, tmp_path: Path, pool: Pool) -> Iterator[tuple[str, Run]]:
    pool.close()  # its idle processes keep threads of earlier groups busy; the next test that needs it starts it
    write_hf(tmp_path / "hf", "moe")
    convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "checkpoint")])
    write_tokens(tmp_path / "tokens", 60, 250, seed=0)
    run = Run(tmp_path, LAYOUTS[request.param])
    yield request.param, run
    run.close()


def test_killed_at_random_moments(run: tuple[str, Run], exactness: Exactness) -> None:
    name, killed = run
    randomness = random.Random(name)
    lost: list[int] = []
    for _ in range(5 * RANDOM_KILLS):
        if len(lost) == RANDOM_KILLS:
            break
        victims = randomness.choice([(0,), (1,), (0, 1)])
        steps = killed.kill(victims=victims, after=randomness.uniform(0.05, 1.0) * killed.seconds)
        if steps is not None:
            lost.append(steps)
    assert len(lost) == RANDOM_KILLS
    killed.complete()
    exactness.faults.append(
        Fault(f"SIGKILL at random moments, of one rank or both; {name}", len(lost), up_to(lost), ended(killed))
    )


def test_killed_at_chosen_points(run: tuple[str, Run], exactness: Exactness) -> None:
    name, killed = run
    """Each time a fresh run, killed once and completed by a second start."""
    lost: list[int] = []
    points = [point for point in POINTS if point != SLOW_WRITER or "asynchronous" in name]
    # How often a point is passed before: the first step or save, that there be something to lose; the step of the slow
    # writer is the first after a save.
    passes = {"while it loads the checkpoint": 0, SLOW_WRITER: 2}
    for number, point in enumerate(points):
        victim = 0 if point in OF_FIRST_RANK else number % NUM_RANKS
        shutil.rmtree(killed.save, ignore_errors=True)
        steps = killed.kill(victims=(victim,), point=point, pass_by=passes.get(point, 1))
        assert steps is not None or "load" in point, f"{point}: the run ended without coming there"
        lost.append(steps or 0)
        killed.complete()
    exactness.faults.append(
        Fault(f"SIGKILL of one rank {', '.join(points)}; {name}", len(points), up_to(lost), ended(killed))
    )


def up_to(lost: list[int]) -> str:
    return f"up to {max(lost)} steps at a --save-interval of {SAVE_INTERVAL}, {sum(lost) / len(lost):.1f} on average"


def ended(run: Run) -> str:
    survivors = f"all {run.survivors} survivors named the dead rank and ended within {run.slowest:.0f} s"
    return f"resumed runs end bitwise as the uninterrupted one; {survivors}"
