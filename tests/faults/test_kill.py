"""SIGKILL at random moments, of one rank or of all: nothing is lost but the steps since the last checkpoint.

Every kill is followed by a new start with the same command, which resumes from the newest whole checkpoint; at the
end the weights and the optimizer equal those of the run that nobody touched, in every bit.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import convert_hf
from megatron_a2d.conversion.checkpoint import TRACKER
from tests.faults.zygote import NUM_RANKS, PATIENCE
from tests.tiny import write_hf, write_tokens

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 30


class Zygote:
    """The process that starts the ranks (zygote.py)."""

    def __init__(self, settings: Path, log: Path):
        self._log = open(log, "w")  # noqa: SIM115
        command = [sys.executable, "-m", "tests.faults.zygote", str(settings)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def attempt(self, kill_after: float | None = None, victims: tuple[int, ...] = ()) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"kill_after": kill_after, "victims": victims}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


@pytest.fixture
def zygotes(tmp_path: Path) -> Iterator[Any]:
    """Start a zygote for a run under tmp_path / name."""
    write_hf(tmp_path / "hf", "moe")
    convert_hf.main(["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "checkpoint")])
    write_tokens(tmp_path / "tokens", 60, 250, seed=0)
    started = []

    def start(name: str) -> Zygote:
        settings = {
            "load": str(tmp_path / "checkpoint"), "train_data_path": str(tmp_path / "tokens"),
            "save": str(tmp_path / name), "train_iters": 6, "save_interval": 2, "log_interval": 1, "keep_last": 2,
            "expert_model_parallel_size": NUM_RANKS, "use_distributed_optimizer": True, "lr_warmup_iters": 3,
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
        started.append(Zygote(tmp_path / f"{name}.json", tmp_path / f"{name}.log"))
        return started[-1]

    yield start
    for zygote in started:
        zygote.close()


def final(save: Path) -> list[tuple[str, str]]:
    results = [json.loads((save / f"final_{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    return [(result["weights"], result["optimizer"]) for result in results]


def test_killed_at_thirty_moments(zygotes: Any, tmp_path: Path) -> None:
    unbroken = zygotes("unbroken").attempt()
    assert unbroken["codes"] == [0] * NUM_RANKS, (tmp_path / "unbroken.log").read_text()[-3000:]
    expected = final(tmp_path / "unbroken")

    zygote = zygotes("killed")
    randomness = random.Random(0)
    kills, completions, slowest, resumed_from = 0, 0, 0.0, []
    for _ in range(4 * NUM_KILLS):
        if kills >= NUM_KILLS and completions:
            break
        tracker = tmp_path / "killed" / TRACKER
        resumed_from.append(tracker.read_text().strip() if tracker.exists() else "release")
        if kills >= NUM_KILLS:
            result = zygote.attempt()
        else:
            victims = randomness.choice([(0,), (1,), (0, 1)])
            result = zygote.attempt(randomness.uniform(0.05, 1.0) * unbroken["seconds"], victims)
            kills += -9 in result["codes"]
            slowest = max(slowest, result["survivors_ended_after"])
            assert None not in result["codes"], f"a rank outlived its dead peer by {PATIENCE} s"
        if result["codes"] == [0] * NUM_RANKS:
            completions += 1
            assert final(tmp_path / "killed") == expected
            # The run is whole: start over, for more moments to be killed at.
            subprocess.run(["rm", "-rf", str(tmp_path / "killed")], check=True)
    assert kills >= NUM_KILLS and completions >= 1
    assert {"release", "2"} <= set(resumed_from), "the kills must have met different stages of the run"
    print(f"{kills} kills, {completions} runs completed bit for bit, survivors ended within {slowest:.1f} s")
