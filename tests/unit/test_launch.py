"""How runs end and come back: exit codes, heartbeats, the launcher (train.sbatch: test_train_sbatch.py)."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_a2d.distributed import hang_watchdog
from megatron_a2d.distributed.hang_watchdog import Beat, Heartbeat, Watchdog, judge
from megatron_a2d.utils import exit_codes
from megatron_a2d.utils.exit_codes import ENDINGS, ending, most_telling
from tests.slurm.slurm_cluster import INSTALL, obstacle

ROOT = Path(__file__).resolve().parents[2]


def test_the_documented_table_is_the_one_in_use() -> None:
    assert exit_codes.as_markdown() in (ROOT / "docs" / "cluster.md").read_text()


@pytest.mark.parametrize(
    ("script", "given", "words"),
    [
        ("train.sh", {"NPROC": "8x"}, "NPROC=8x: is not a number of processes"),
        ("train.sh", {"NPROC": "0"}, "NPROC=0: is not a number of processes"),
        ("train.sh", {"NNODES": "two"}, "NNODES=two: is not a number of nodes"),
        ("train.sh", {"NNODES": "2"}, "needs MASTER_ADDR"),
        ("train.sh", {"NNODES": "2", "MASTER_ADDR": "no..where"}, "MASTER_ADDR=no..where: does not resolve on "),
        ("train.sh", {"NODE_RANK": "-1"}, "NODE_RANK=-1: is not a number"),
        ("train.sh", {"NODE_RANK": "1"}, "NODE_RANK=1: is not below NNODES=1"),
        ("train.sh", {"NODE_RANK": "2", "NNODES": "2", "MASTER_ADDR": "localhost"}, "is not below NNODES=2"),
        ("train.sh", {"MASTER_PORT": "x"}, "MASTER_PORT=x: is not a port"),
        ("train.sh", {"MASTER_PORT": "65535"}, "MASTER_PORT=65535: is not a port from 1 to 65534"),
        ("train.sh", {"BIN": "/nowhere"}, "BIN=/nowhere: has no python3 or python; correct it"),
        ("train.sbatch", {}, "is for Slurm; submit it with sbatch"),
        ("train.sbatch", {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/usr"}, "/usr has no launch/train.sh; submit from"),
        ("tokenize.sbatch", {}, "is for Slurm; submit it with sbatch, or use make data"),
        ("tokenize.sbatch", {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/usr"}, "/usr has no data_prep; submit from"),
        ("tokenize.sbatch", {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT)}, "is no array; add --array 1-N"),
        ("tokenize.sbatch", {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "3",
                             "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_ARRAY_TASK_COUNT": "1"},
         "--array is not 1-N; set SHARDS"),
        ("tokenize.sbatch", {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "1",
                             "SHARDS": "1", "BIN": "/nowhere"}, "BIN=/nowhere: has no python3 or python; correct it"),
        ("node.sh", {}, "is for Slurm; start it with srun"),
        ("node.sh", {"SLURM_JOB_ID": "1", "BIN": "/nowhere"}, "BIN=/nowhere: has no python3 or python; correct it"),
        ("node.sh", {"SLURM_JOB_ID": "1", "NPROC": "8x"}, "NPROC=8x: is not a number of processes"),
    ],
)  # fmt: skip
def test_variables_that_are_wrong(script: str, given: dict[str, str], words: str, tmp_path: Path) -> None:
    (tmp_path / "python3").touch(0o755)  # empty: a script that starts it succeeds
    environment = {"PATH": "/usr/bin:/bin", "BIN": str(tmp_path), **given}
    done = subprocess.run(["bash", ROOT / "launch" / script], env=environment, capture_output=True, text=True)
    assert done.returncode == exit_codes.USER_ERROR and words in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_refused_settings_leave_their_reason_for_the_batch_script(tmp_path: Path) -> None:
    """Found before torchrun starts: the job is not requeued, however srun ends the other nodes."""
    command = ["bash", ROOT / "launch" / "train.sh", "--lr", "-1"]
    environment = {**os.environ, "BIN": str(Path(sys.executable).parent), "A2D_ATTEMPT": str(tmp_path)}
    for _ in range(2):  # the second node finds the first one's
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "error: --lr -1.0: must be positive" in done.stderr
        assert (tmp_path / "outcome").read_text() == "2 stay the settings were refused\n"


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, 1), ({"PREFLIGHT": "0"}, 1), ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "localhost"}, 0)],
)
def test_an_old_flag_is_warned_of_once(given: dict[str, str], count: int, tmp_path: Path) -> None:
    """Three processes read the settings, on each node. In their place stands one that reads the flags alone."""
    read = (
        "import sys; from megatron_a2d.config.renamed import modernise_flags as read; read(sys.argv, ['--fp8-recipe'])"
    )
    (tmp_path / "python3").write_text(f'#!/bin/sh\necho "$@"\nexec {sys.executable} -c "{read}" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "BIN": str(tmp_path), "NPROC": "1", **given}
    command = ["bash", ROOT / "launch" / "train.sh", "--fp8", "mxfp8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("--fp8 mxfp8") == (1 if "PREFLIGHT" in given else 3), done.stdout
    assert done.stderr.count("warning: --fp8 is now --fp8-recipe") == count, done.stderr


def test_one_node_of_a_larger_allocation(tmp_path: Path) -> None:
    """Slurm's number of the node is not that of a run on this node alone. In Python's place stands one that prints it."""
    (tmp_path / "python3").write_text("#!/bin/sh\necho $NNODES $NODE_RANK\n")
    (tmp_path / "python3").chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "BIN": str(tmp_path), "PREFLIGHT": "0", "SLURM_NODEID": "3"}
    for more, said in (({}, "1 0\n"), ({"NNODES": "4", "MASTER_ADDR": "localhost"}, "4 3\n")):
        command = ["bash", ROOT / "launch" / "train.sh"]
        assert subprocess.check_output(command, env=environment | more, text=True) == said


@pytest.mark.parametrize("num_gpus", [0, 3])
def test_a_process_for_each_gpu(num_gpus: int, tmp_path: Path) -> None:
    """NPROC unset; 1 without a GPU. Fakes of nvidia-smi and of Python, which prints its arguments."""
    tools = {"nvidia-smi": f'for i in $(seq {num_gpus}); do echo "GPU $i: H100"; done', "python": 'echo "$@"'}
    for name, line in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BIN": str(tmp_path), "PREFLIGHT": "0"}
    done = subprocess.run(["bash", ROOT / "launch" / "train.sh"], env=environment, capture_output=True, text=True)
    assert f"--nproc-per-node {max(num_gpus, 1)} " in done.stdout, done.stderr


def test_exit_codes() -> None:
    assert len({row.code for row in ENDINGS}) == len(ENDINGS)
    assert not ending(exit_codes.USER_ERROR).is_requeued and ending(exit_codes.SIGNALLED).is_requeued
    assert ending(-9) == ending(137) and "SIGKILL" in ending(137).meaning and ending(137).is_requeued
    assert ending(77).is_requeued and ending(77).meaning == "exit code 77"
    # One process found its peer dead, the other was asked to end: the third is the cause.
    assert most_telling([exit_codes.PEER_LOST, -15, exit_codes.SAVE_FAILED]).code == exit_codes.SAVE_FAILED
    assert most_telling([exit_codes.PEER_LOST, -9]).code == 137
    # torchrun ends the others with SIGTERM: never the cause, where another one has a reason.
    assert most_telling([exit_codes.PEER_LOST, -15]).code == exit_codes.PEER_LOST
    assert most_telling([143, 1]).code == exit_codes.FAILED and most_telling([0, -15]).code == 143


def beat(rank: int, **changes: Any) -> Beat:
    usual = Beat(rank, f"n{rank}", 100 + rank, 7, 12, 3, "update", 50.0, 40.0, "at x.py:1 f", True)
    return dataclasses.replace(usual, **changes)


@pytest.mark.parametrize(
    ("beats", "silent", "culprits"),
    [
        # All wait for rank 2, which is behind.
        ([beat(0), beat(1), beat(2, place=2, waits=False)], {}, {2}),
        # In the same place of the program, but not in a collective.
        ([beat(0), beat(1, waits=False), beat(2)], {}, {1}),
        # A later stage of the pipeline is behind because it waits.
        ([beat(0, waits=False), beat(1, place=2)], {}, {0}),
        # A node that is frozen writes nothing.
        ([beat(0), beat(1, still=1.0), beat(2)], {1: 55.0}, {1}),
        # Nothing tells them apart: all are named.
        ([beat(0), beat(1)], {}, {0, 1}),
        # Nobody is late.
        ([beat(0, still=39.0), beat(1, still=1.0)], {}, set()),
    ],
)
def test_who_stands_still(beats: list[Beat], silent: dict[int, float], culprits: set[int]) -> None:
    verdict = judge(beats, {**dict.fromkeys(range(3), 0.0), **silent})
    named = {rank for rank in range(3) if f"rank {rank} (n{rank}," in (verdict or "")}
    assert named == culprits and (verdict is None) == (not culprits)


def test_marks_become_a_file_that_a_watch_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own: how fast the machine is does not matter."""
    now = [1000.0]
    monkeypatch.setenv(hang_watchdog.ATTEMPT, str(tmp_path))
    monkeypatch.setattr(hang_watchdog, "_last", hang_watchdog._last)
    monkeypatch.setattr(hang_watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    watchdog, path = Watchdog(tmp_path), tmp_path / hang_watchdog.HEARTBEATS / "rank_00003"

    def beats_after(seconds: float) -> None:
        """Two beats, the second of which has seen all that was marked; this thread stays in this file meanwhile."""
        now[0] += seconds
        for _ in range(2):
            before, now[0] = inode(path), now[0] + 0.06  # a little more than a pause
            while inode(path) == before:
                time.sleep(0.01)

    with Heartbeat(3):
        hang_watchdog.mark("reading samples", iteration=5, limit=0.5)
        hang_watchdog.mark("micro-batch")
        beats_after(0.1)
        assert watchdog.look() is None and watchdog.pause == hang_watchdog.pause(0.5)
        beats_after(0.5)
        verdict = watchdog.look()
        assert verdict and "rank 3 (" in verdict and "in iteration 5, micro-batch, at test_launch.py:" in verdict
        for _ in range(3):
            hang_watchdog.mark("micro-batch")
            beats_after(0.3)
            assert watchdog.look() is None
    assert list(hang_watchdog.read_beats(tmp_path / hang_watchdog.HEARTBEATS)) == [], "who has left holds nobody up"


def inode(path: Path) -> int:
    """0 while there is no file; each beat is a new one."""
    try:
        return os.stat(path).st_ino * 2**32 + os.stat(path).st_mtime_ns % 2**32
    except FileNotFoundError:
        return 0


WORKER = """
import fcntl, os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
if how == "by itself":  # the first rank, and the second because of it: a lock is let go when its process has ended
    lock, held = open(os.path.join(sys.argv[2], "lock"), "a"), os.path.join(sys.argv[2], "held")
    while rank == 1 and not os.path.exists(held):
        time.sleep(0.01)
    fcntl.flock(lock, fcntl.LOCK_EX)
    open(held, "a").close()
    sys.exit([74, 5][rank])
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: (time.sleep(1), sys.exit(3)))
open(os.path.join(sys.argv[2], f"ready_{rank}"), "w").close()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "number", "expected"),
    [("by itself", None, "74 stay"), ("signal", signal.SIGUSR1, "3 again"), ("signal", signal.SIGTERM, "3 again")],
)
def test_the_launcher_keeps_exit_codes(how: str, number: signal.Signals | None, expected: str, tmp_path: Path) -> None:
    """torchrun itself would end with 1, and with the signal's number."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "launch.torchrun", "--standalone", "--nproc-per-node", "2"]
    launcher = subprocess.Popen(
        [*command, str(tmp_path / "worker.py"), how, str(tmp_path)],
        cwd=ROOT, env={**os.environ, hang_watchdog.ATTEMPT: str(tmp_path)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if number:
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("ready_*"))) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        launcher.send_signal(number)
    _, said = launcher.communicate(timeout=300)
    assert (tmp_path / "outcome").read_text().startswith(expected), said
    assert launcher.returncode == int(expected.split()[0]) and "Traceback" not in said


def test_where_slurm_is_missing_its_tests_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv(INSTALL, raising=False)
    assert "slurmctld, " in (reason := obstacle() or "") and f"{INSTALL}=1" in reason


def test_two_nodes_are_compared(tmp_path: Path) -> None:
    """Two launchers for two nodes; one of them has another numpy. That all can be well: tests/slurm."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(
        "import importlib.metadata as m, socket\nreal = m.version\n"
        "m.version = lambda name: '0.1' if name == 'numpy' else real(name)\nsocket.gethostname = lambda: 'odd-node'\n"
    )
    from checkpoints_tools import convert_hf
    from tests.tiny import write_hf, write_tokens

    write_hf(tmp_path / "hf", "dense")
    convert_hf.main(["--hf-model", str(tmp_path / "hf"), "--out", str(tmp_path / "checkpoint")])
    write_tokens(tmp_path / "tokens", 40, 250, seed=0)
    flags = [
        "--load", str(tmp_path / "checkpoint"), "--train-data-path", str(tmp_path / "tokens"), "--seq-length", "32",
        "--save", str(tmp_path / "run"),
    ]  # fmt: skip
    codes, said = preflight_on_two_nodes(flags, str(other))
    assert codes == [2, 2], said
    (problem,) = [line for line in said[0].splitlines() if line.startswith("error: ")]
    assert problem.startswith("error: odd-node: numpy is 0.1 there and ") and "preflight: 2 nodes" in said[0], said
    assert not list((tmp_path / "run").glob("*")), "nothing is left where the run will save"


def preflight_on_two_nodes(flags: list[str], path_of_second: str) -> tuple[list[int], list[str]]:
    """Exit codes of both nodes' launchers, and what they said."""
    from torch.distributed import TCPStore

    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    nodes = []
    for node in range(2):
        environment = {**os.environ, "NNODES": "2", "NODE_RANK": str(node), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        environment.pop(hang_watchdog.ATTEMPT, None)
        if node:
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [path_of_second, os.environ.get("PYTHONPATH", "")])
            )
        command = [
            sys.executable, "-m", "launch.torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node),
            "--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "megatron_a2d.preflight", *flags,
        ]  # fmt: skip
        nodes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
    said = [""] * 2

    def read(node: int) -> None:
        said[node] = nodes[node].communicate(timeout=600)[0]

    threads = [threading.Thread(target=read, args=(node,)) for node in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [node.returncode for node in nodes], said


def test_one_task_a_node_finds_the_others(tmp_path: Path) -> None:
    """launch/node.sh under Slurm's variables: what it would start (a stand-in for Python and scontrol)."""
    for name, script in (("python", 'echo "$@"'), ("scontrol", "[ $3 = n[3-4] ] && printf 'n3\\nn4\\n'")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_NODEID": "1",
                 "SLURM_STEP_ID": "3", "SLURM_GPUS_ON_NODE": "8"}  # fmt: skip
    here = {"BIN": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def started(**more: str) -> str:
        command = [ROOT / "launch" / "node.sh", "-m", "some.module", "--an", "argument"]
        return subprocess.run(command, env=here | variables | more, check=True, capture_output=True, text=True).stdout

    torchrun, program = "-m launch.torchrun --nnodes", "-m some.module --an argument\n"
    both = f"{torchrun} 2 --nproc-per-node 8 --node-rank 1 --master-addr n3 --master-port 20017 {program}"
    assert started() == both
    assert started(SLURM_STEP_NUM_NODES="1", NPROC="2") == f"{torchrun} 1 --nproc-per-node 2 --standalone {program}"
