"""What launch/train.sbatch decides, with stand-ins for Slurm's commands (a real Slurm: tests/slurm)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_a2d.utils.exit_codes import ENDINGS, ending

ROOT = Path(__file__).resolve().parents[2]

STUBS = {
    "srun": 'echo "srun $*" >> "$CALLS"; eval "$DURING"; exit "$CODE"',
    "scontrol": 'case $1 in show) printf "n1\\nn2\\n" ;; *) echo "scontrol $*" >> "$CALLS" ;; esac',
    "squeue": "[ $STATE != no-answer ] && echo $STATE",
    "sleep": 'case $1 in 10) ;; *) exec /bin/sleep "$@" ;; esac',
}


def submit(
    directory: Path, code: int, during: str = ":", restarts: int = 0, state: str = "RUNNING", before: str = ""
) -> tuple[str, str, int]:
    """Run train.sbatch with stand-ins for Slurm's commands; what it said, what it called, its exit code.

    ``before``: what bash does before each command of train.sbatch.
    """
    bin_ = directory / "bin"
    bin_.mkdir(parents=True, exist_ok=True)
    for name, body in STUBS.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_ / name).chmod(0o755)
    (directory / "launch").mkdir(exist_ok=True)
    (directory / "launch" / "train.sh").touch(0o755)
    environment = {
        "PATH": f"{bin_}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(directory), "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "run", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": str(restarts), "CODE": str(code), "DURING": during,
        "CALLS": str(directory / "calls"), "STATE": state,
    }  # fmt: skip
    if before:
        (directory / "before.sh").write_text(f"trap '{before}' DEBUG\n")
        environment["BASH_ENV"] = str(directory / "before.sh")
    (directory / "calls").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", ROOT / "launch" / "train.sbatch", "--lr", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == "", done.stderr
    calls = directory / "calls"
    return done.stdout, calls.read_text() if calls.exists() else "", done.returncode


PROGRESS = 'echo 40 > "$A2D_ATTEMPT/progress"; '


def outcome(code: int) -> str:
    row = ending(code)
    return f'echo "{row.code} {"again" if row.is_requeued else "stay"} words" > "$A2D_ATTEMPT/outcome"; '


@pytest.mark.parametrize("code", [row.code for row in ENDINGS if row.code] + [137])
def test_what_is_requeued(code: int, tmp_path: Path) -> None:
    """Of each exit code: with progress as the table says, without it never. srun's own code is that of the last to end."""
    for progress in (False, True):
        during = outcome(code) + PROGRESS * progress
        said, calls, exit_code = submit(tmp_path / str(progress), 143, during)
        assert ("scontrol requeue 17" in calls) == (progress and ending(code).is_requeued), said
        assert exit_code == code and f"exit code {code}: words" in said
    assert "--lr 1" in calls and "launch/train.sh" in calls
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 " in calls and "--cpus-per-task=8 " in calls


def test_what_else_decides(tmp_path: Path) -> None:
    said, calls, code = submit(tmp_path, 0, PROGRESS)
    assert code == 0 and "requeue" not in calls and "the run is complete" in said
    # The launcher was killed before it could say why.
    said, calls, code = submit(tmp_path, 137, PROGRESS)
    assert "scontrol requeue 17" in calls and code == 137
    # Somebody cancelled the job, or Slurm requeues it itself.
    for during, state in ((f"{PROGRESS} kill -TERM $PPID;", "RUNNING"), (PROGRESS, "COMPLETING")):
        said, calls, code = submit(tmp_path, 3, outcome(3) + during, state=state)
        assert "requeue" not in calls and "Slurm has cancelled or requeued the job" in said
    # The controller does not answer: nothing says that the job has ended.
    _, calls, _ = submit(tmp_path, 3, outcome(3) + PROGRESS, state="no-answer")
    assert "scontrol requeue 17" in calls


def test_the_signal_is_passed_on_once_and_srun_waited_for(tmp_path: Path) -> None:
    during = f"trap 'echo got USR1 >> $CALLS; sleep 0.5; {outcome(3)} {PROGRESS} exit 143' USR1; kill -USR1 $PPID; for i in {{1..3000}}; do sleep 0.1; done"
    said, calls, code = submit(tmp_path, 0, during)
    assert calls.count("got USR1") == 1 and "scontrol requeue 17" in calls and code == 3, said


@pytest.mark.parametrize("moment", ["step=*", "trap*TERM"])
def test_a_signal_before_the_step_is_known_is_passed_on(moment: str, tmp_path: Path) -> None:
    """srun runs but its number is not in `step`; srun has not been started."""
    arrives = f"case $BASH_COMMAND in {moment}) kill -USR1 $$ ;; esac"
    during = f"trap 'echo got USR1 >> $CALLS; {outcome(3)} {PROGRESS} exit 143' USR1; for i in {{1..100}}; do sleep 0.1; done"
    said, calls, code = submit(tmp_path, 0, during, before=arrives)
    assert calls.count("got USR1") == 1 and "scontrol requeue 17" in calls and code == 3, said


def test_slurms_own_requeues_end_without_progress(tmp_path: Path) -> None:
    """Node failures are requeued by Slurm, whatever this script thinks of it."""
    for restarts in range(3):
        _, calls, _ = submit(tmp_path, 143, outcome(5), restarts)
        assert "srun" in calls
    said, calls, code = submit(tmp_path, 143, outcome(5), 3)
    assert code == 1 and calls == "" and "the last 3 attempts wrote no checkpoint" in said
    (tmp_path / "logs" / "run-17" / "attempt_2" / "progress").write_text("40\n")
    _, calls, _ = submit(tmp_path, 143, outcome(5), 3)
    assert "srun" in calls
