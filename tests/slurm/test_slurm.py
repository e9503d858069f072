"""launch/train.sbatch, as users submit it, on a real Slurm of two nodes: signals, faults, requeues, and their limits.

    make test-slurm            skipped without Slurm; A2D_INSTALL_SLURM=1 installs Debian's packages first

Whatever happens to a run, its final weights and optimizer equal the unbroken run's, bit by bit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.slurm_cluster import Cluster
from tests.slurm.slurm_jobs import Job, Material, differences, final

pytestmark = pytest.mark.full


def test_the_time_limit_comes(cluster: Cluster, material: Material, unbroken: Job, tmp_path: Path) -> None:
    """SIGUSR1 to the batch script, as --signal sends it: save after the current step, requeue, resume.

    The job was given two tasks a node: there is one torchrun on each all the same.
    """
    job = Job(
        cluster, material, tmp_path, fault={"iteration": 4, "do": "hold"}, options=("--ntasks-per-node=2",)
    )  # fmt: skip
    job.wait_until_held(attempt=0, iteration=4)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for(lambda: "SIGUSR1: the run saves" in job.log(), "answer to the signal")
    job.release()
    job.wait_until_over()
    assert job.state() == "COMPLETED" and job.restarts() == 1, job.story()
    assert job.starts() == [0, 4], job.story()
    assert (
        "exit code 3: SIGUSR1 or SIGTERM" in job.log() and "requeued after the checkpoint of iteration 4" in job.log()
    )
    assert not differences(final(job.save), final(unbroken.save))


def test_a_node_goes_down(cluster: Cluster, material: Material, unbroken: Job, tmp_path: Path) -> None:
    """Slurm requeues the job; it waits for the node and resumes from the last checkpoint."""
    job = Job(cluster, material, tmp_path, fault={"iteration": 4, "do": "hold"})
    job.wait_until_held(attempt=0, iteration=4)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    job.wait_for(lambda: job.restarts() == 1, "requeue")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume", check=False)  # it may have come back by itself
    job.wait_until_over()
    assert job.state() == "COMPLETED" and job.restarts() == 1, job.story()
    assert job.starts() == [0, 2], job.story()
    assert not differences(final(job.save), final(unbroken.save))


def test_a_rank_stands_still(cluster: Cluster, material: Material, unbroken: Job, tmp_path: Path) -> None:
    """The log names it and not its peer; the job resumes from the last checkpoint."""
    job = Job(
        cluster,
        material,
        tmp_path,
        fault={"rank": 1, "iteration": 4, "do": "hang"},
        preflight=False,
        distributed_timeout_minutes=0.2,
    )
    job.wait_until_over()
    assert job.state() == "COMPLETED" and job.restarts() == 1, job.story()
    (line,) = [line for line in job.log().splitlines() if "exit code 6: " in line]
    assert "exit code 6: hung for 12 s: rank 1 (n2, pid" in line and "rank 0" not in line, job.story()
    assert "in iteration 4, reading samples, at sitecustomize.py" in line and "1 other waiting" in line
    assert job.starts() == [0, 2], job.story()
    assert not differences(final(job.save), final(unbroken.save))


def test_without_progress_there_is_no_requeue(cluster: Cluster, material: Material, tmp_path: Path) -> None:
    """A fault in iteration 4 of every attempt: the first one wrote a checkpoint, the second one has not."""
    fault = {"attempt": None, "rank": 0, "iteration": 4, "do": "raise"}
    job = Job(cluster, material, tmp_path, fault=fault, preflight=False)
    job.wait_until_over()
    assert job.state() == "FAILED" and job.restarts() == 1, job.story()
    assert job.starts() == [0, 2], job.story()
    requeued, ended = (line for line in job.log().splitlines() if "requeued" in line)
    assert "attempt 0: requeued after the checkpoint of iteration 2" in requeued, job.story()
    assert "attempt 1: not requeued: no checkpoint was written since the start" in ended, job.story()


def test_a_user_error_is_never_requeued(cluster: Cluster, material: Material, tmp_path: Path) -> None:
    job = Job(cluster, material, tmp_path, tensor_model_parallel_size=3)
    job.wait_until_over()
    assert job.state() == "FAILED" and job.restarts() == 0, job.story()
    assert "exit code 2: " in job.log() and "not requeued: the same error would occur again" in job.log(), job.story()
    errors = [line for line in job.log().splitlines() if line.startswith("error: ")]
    assert len(errors) == len(set(errors)) and not job.save.exists(), job.story()
    assert any(line.startswith("error: --tensor-model-parallel-size 3 x ") for line in errors), job.story()


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, material: Material, tmp_path: Path) -> None:
    """It has written a checkpoint, and ends as after the other signal."""
    job = Job(cluster, material, tmp_path, fault={"iteration": 4, "do": "hold"}, preflight=False)
    job.wait_until_held(attempt=0, iteration=4)
    cluster.run("scancel", job.id)
    job.release()
    job.wait_until_over()
    cluster.wait_idle()
    assert job.state() == "CANCELLED" and job.restarts() == 0 and "requeued after" not in job.log(), job.story()


def test_the_comparison_can_fail(unbroken: Job) -> None:
    assert differences(final(unbroken.save), unbroken.save / "iter_0000004")
