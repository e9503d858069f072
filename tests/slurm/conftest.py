"""One cluster, one small model and one unbroken run for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.slurm_cluster import Cluster, obstacle
from tests.slurm.slurm_jobs import Job, Material
from tests.tiny import write_hf, write_tokens


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(reason)
    root = tmp_path_factory.mktemp("slurm")
    with Cluster(root) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    from checkpoints_tools import convert_hf

    root = tmp_path_factory.mktemp("material")
    write_hf(root / "hf", "dense", num_hidden_layers=2, max_window_layers=2)
    convert_hf.main(["--hf-model", str(root / "hf"), "--out", str(root / "checkpoint")])
    write_tokens(root / "tokens", 60, 250, seed=0)
    return Material(root / "checkpoint", root / "tokens")


@pytest.fixture(scope="session")
def unbroken(cluster: Cluster, material: Material, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The run that nothing happens to."""
    job = Job(cluster, material, tmp_path_factory.mktemp("unbroken"))
    job.wait_until_over()
    assert job.state() == "COMPLETED", job.story()
    return job
