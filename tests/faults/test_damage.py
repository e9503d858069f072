"""Damaged checkpoints, full disks and changed settings: what a run does, seen through the training loop itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.checkpoint.directory import list_iterations
from megatron_a2d.checkpoint.manifest import check_manifest
from megatron_a2d.config.settings import build
from megatron_a2d.training.resume import FIXED, differences, find_start
from megatron_a2d.utils.errors import UserError
from tests.cases import Case, copy_of
from tests.exactness import Exactness, Fault
from tests.parity.parity_jobs import SETTINGS
from tests.parity.pool import Pool


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_rank_measures_what_it_wrote(trained: dict[str, Any]) -> None:
    """The manifest of a run on two ranks lists every file, and all are as it says."""
    directory = Path(trained["settings"]["save"]) / "iter_0000002"
    files = set(json.loads((directory / "manifest.json").read_text())["files"])
    assert {".metadata", "common.pt", "metadata.json", "run.json", "hf/config.json"} < files
    assert {name[:4] for name in files if name.endswith(".distcp")} == {"__0_", "__1_"}
    assert check_manifest(directory) == []


def test_a_damaged_checkpoint_is_passed_over(
    trained: dict[str, Any], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    """The newest has a flipped bit, the next a truncated file, the next lacks one: the run resumes from the one before those
    and ends with the same weights, bit by bit. One that is asked for by --ckpt-step is an error instead."""
    settings = copy_of(trained, tmp_path)
    root = Path(settings["save"])
    flip_a_bit(root / "iter_0000004" / "__1_0.distcp")
    os.truncate(root / "iter_0000003" / "__0_0.distcp", 1000)
    (root / "iter_0000002" / "hf" / "tokenizer.json").unlink()
    said: list[str] = []
    start = find_start(build(SETTINGS | settings), report=said.append)
    assert start == (root / "iter_0000001", False)
    assert len(said) == 3 and "iter_0000004/__1_0.distcp: is damaged" in said[0]
    assert "iter_0000003/__0_0.distcp: has" in said[1] and "iter_0000002/hf/tokenizer.json: is missing" in said[2]
    for number in (4, 3, 2):
        with pytest.raises(UserError, match=f"iter_000000{number}.*leave out --ckpt-step {number}"):
            find_start(build(SETTINGS | settings | {"ckpt_step": number}))
    resumed = pool.run("run", 2, settings=settings)
    for before, after in zip(trained["results"], resumed, strict=True):
        assert after["start"] == 1 and after["losses"] == before["losses"][1:]
        assert after["weights"] == before["weights"] and after["optimizer"] == before["optimizer"]
    assert check_manifest(root / "iter_0000004") == []  # written again
    end = "identified; resumes from the one before, then bitwise as the uninterrupted run"
    for damage in ("a flipped bit in", "a truncated file of", "a file missing from"):
        exactness.faults.append(Fault(f"{damage} the newest checkpoint", 1, "that checkpoint", end))


def test_old_checkpoints_are_removed(cases: dict[str, Case], pool: Pool, tmp_path: Path) -> None:
    """Of iterations 1 to 5 the last two stay, and with --save-retain-interval 2 the even ones. The run's own start is removed while
    it continues: the model's files still reach every later checkpoint."""
    case = cases["moe"]
    settings = {**case.settings, "load": case.checkpoint, "save": str(tmp_path / "run"), "save_interval": 1}
    pool.run("run", 1, settings={**settings, "train_iters": 1})
    pool.run("run", 1, settings={**settings, "train_iters": 5, "keep_latest_k": 2, "save_retain_interval": 2})
    assert list_iterations(tmp_path / "run") == [2, 4, 5]
    assert check_manifest(tmp_path / "run" / "iter_0000005") == []
    assert (tmp_path / "run" / "iter_0000005" / "hf" / "config.json").exists()
    assert not list((tmp_path / "run").glob(".*"))


def test_settings_that_are_bound(trained: dict[str, Any]) -> None:
    """Each fixed setting, changed alone, is one line with both values; free ones say nothing."""
    settings = SETTINGS | trained["settings"]
    directory = Path(settings["save"]) / "iter_0000004"
    assert differences(build(settings), directory) == []
    values = build(settings).to_dict()
    others: dict[str, Any] = {
        "noise_schedule": "cosine", "timestep_sampling": "uniform", "objective": "ar", "reset_attention_mask": True,
        "rampup_batch_size": [4, 2, 16],
    }  # fmt: skip
    for name in FIXED:
        if name == "train_data_fingerprint":  # tests/unit/test_bad_data.py
            continue
        value = values[name]
        if name not in others:
            others[name] = not value if isinstance(value, bool) else value * 2 or 1
        (line,) = differences(build({**settings, name: others[name]}), directory)
        assert line.startswith(f"--{name.replace('_', '-')} ") and "--finetune" in line
    free = {"tensor_model_parallel_size": 2, "micro_batch_size": 2, "train_iters": 99, "train_data_path": "moved",
            "eval_interval": 3, "num_workers": 2, "keep_latest_k": 1, "use_distributed_optimizer": False}  # fmt: skip
    assert differences(build({**settings, **free}), directory) == []
    told: list[str] = []
    mended = {**settings, "lr": 5e-3, "lr_mult": {"mlp": 0.5}}
    assert find_start(build(mended), report=told.append).directory == directory
    assert told == [
        "--lr 0.005: was 0.01 until iteration 4, and applies from now on",
        "--lr-mult mlp=0.5: was mlp=0.5 embedding=0.25 until iteration 4, and applies from now on",
    ]


@pytest.fixture
def small_disk(trained: dict[str, Any]) -> Iterator[Path]:
    """A file system that takes one and a half checkpoints."""
    size = sum(path.stat().st_size for path in (Path(trained["settings"]["save"]) / "iter_0000002").rglob("*"))
    directory = tempfile.mkdtemp()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", directory]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        shutil.rmtree(directory)
        pytest.skip("mounting a tmpfs is not possible here")
    yield Path(directory)
    subprocess.run(["umount", "-l", directory], check=True)
    shutil.rmtree(directory)


@pytest.mark.parametrize("reaction", ["stop", "continue"])
def test_a_full_disk(
    reaction: str, trained: dict[str, Any], pool: Pool, small_disk: Path, exactness: Exactness
) -> None:
    """The second checkpoint does not fit: all ranks hear of it, the first stays whole, nothing is left of the other; when
    there is space, the same command resumes."""
    root = small_disk / "run"
    settings = {**trained["settings"], "save": str(root), "on_save_error": reaction}
    stopped = pool.run("run", 2, settings=settings)
    for rank in stopped:
        last = 2 if reaction == "stop" else 4
        assert len(rank["losses"]) == last
        assert rank["error"].startswith(f"--save {root}: the checkpoint of iteration {last} could not be written (")
        assert "the newest checkpoint is that of iteration 1." in rank["error"] and "\n" not in rank["error"]
    assert list_iterations(root) == [1] and check_manifest(root / "iter_0000001") == []
    assert not list(root.glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed = pool.run("run", 2, settings=settings)
    assert {rank["start"] for rank in resumed} == {1}
    assert [rank["weights"] for rank in resumed] == [rank["weights"] for rank in trained["results"]]
    lost = "the steps since the last intact checkpoint" if reaction == "stop" else "the checkpoints that did not fit"
    exactness.faults.append(
        Fault(f"a full disk, --on-save-error {reaction}", 1, lost, "reported; resumes once there is disk space")
    )


@pytest.mark.parametrize(
    "file", ["common.pt", "__1_0.distcp", ".metadata", "metadata.json", "manifest.json", "run.json"]
)
def test_a_disk_that_fails_at_any_file(
    file: str, trained: dict[str, Any], pool: Pool, tmp_path: Path, exactness: Exactness
) -> None:
    """Whichever file of the second checkpoint cannot be written, by whichever rank: all ranks end together."""
    settings = copy_of(trained, tmp_path, train_iters=5)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("iter_*/*")}
    failed = pool.run("run", 2, settings=settings, unwritable=file)
    for rank in failed:
        assert "the checkpoint of iteration 5 could not be written" in rank["error"]
        assert file in rank["error"] or "directory" in rank["error"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("iter_*/*")} == before
    assert not list((tmp_path / "run").glob(".*"))
    exactness.faults.append(
        Fault(f"{file} cannot be written", 1, "that checkpoint", "reported on all ranks, earlier ones intact")
    )
