"""--profile in a run on four ranks: it changes nothing, and finds each phase where it happens."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from megatron_a2d.distributed.step_timers import PHASES
from tests.cases import Case
from tests.parity.layouts import EP, PP
from tests.parity.pool import Pool


def test_profile_of_two_stages(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    case = cases["moe"]
    settings = {
        **case.settings,
        **PP,
        **EP,
        "load": case.checkpoint,
        "train_iters": 4,
        "eval_interval": 4,
        "global_batch_size": 16,
    }
    without = pool.run("run", 4, settings={**settings, "save": str(tmp_path / "without")})
    window = {"profile": True, "profile_step_start": 2, "profile_step_end": 3}
    profiled = pool.run("run", 4, settings={**settings, **window, "save": str(tmp_path / "run")})
    assert profiled == without  # losses, weights and moments, bit for bit

    files = {path.name for path in (tmp_path / "run" / "profile").iterdir()}
    assert files == {"iterations_2-3.json", "iterations_2-3_rank_0.json.gz", "iterations_2-3_rank_2.json.gz"}
    result = json.loads((tmp_path / "run" / "profile" / "iterations_2-3.json").read_text())
    first, last = (item["ms_per_step"] for item in result["ranks"])
    assert [item["rank"] for item in result["ranks"]] == [0, 2]
    assert set(first) == set(PHASES)
    assert {name for name, time in first.items() if not time} == {"head"}  # of the last stage
    assert {name for name, time in last.items() if not time} == set()
    assert max(first["other"] / sum(first.values()), last["other"] / sum(last.values())) < 0.2

    names = {*PHASES, "step"} - {"other"}
    for rank, own in ((0, names - {"head"}), (2, names)):
        packed = (tmp_path / "run" / "profile" / f"iterations_2-3_rank_{rank}.json.gz").read_bytes()
        trace = json.loads(gzip.decompress(packed))
        scopes = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
        assert {event["name"] for event in scopes} & {*PHASES, "step"} == own
        steps = [event for event in scopes if event["name"] == "step"]
        assert len(steps) == 2  # the iterations of the window, and no others
        # The table is that of the trace: what both say of a step agrees.
        whole = sum(event["dur"] for event in steps) / 2000  # ms
        assert abs(whole / sum(result["ranks"][rank // 2]["ms_per_step"].values()) - 1) < 0.05
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records if record["kind"] == "profile"] == [3]


def test_a_resumed_run_is_past_its_window(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """The same command again, as a job that was queued again gives it: no error, and no second profile."""
    case = cases["moe"]
    settings = {**case.settings, "load": case.checkpoint, "train_iters": 3, "eval_interval": 3, "save_interval": 1, "save": str(tmp_path / "run"), "profile": True,
                "profile_step_start": 1, "profile_step_end": 3}  # fmt: skip
    pool.run("run", 1, settings=settings, stop_at=2)
    assert not (tmp_path / "run" / "profile").exists()  # it was not complete
    (result,) = pool.run("run", 1, settings=settings)
    assert result["start"] == 2 and result["iteration"] == 3
    assert not (tmp_path / "run" / "profile").exists()
