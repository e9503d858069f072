"""What killed saves leave in --save, and that it does not stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.config.settings import build
from megatron_a2d.training import checkpointing
from megatron_a2d.training.checkpointing import CheckpointManager, remove_old
from megatron_a2d.utils.partial_files import partial_path

NO_STATE: Any = None  # without --async-save it is not looked at

# As a killed save, a killed replacement and a killed removal leave them.
LEFT = (".iter_0000003.1a2b3c4d.partial", ".iter_0000003.replaced.partial", ".iter_0000001.partial")
KEPT = ("iter_0000002", ".lock", ".log.jsonl.partial-1", "iter_0000002.aside", "latest_checkpointed_iteration.txt")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*LEFT, *KEPT):
        (tmp_path / name / "hf").mkdir(parents=True)
        (tmp_path / name / "hf" / "config.json").write_text("{}")
    return tmp_path


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_start_removes_them(rank: int, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank alone, once; also that of a run which is complete and saves nothing more."""
    monkeypatch.setattr(checkpointing.dist, "get_rank", lambda: rank)
    log: Any = None
    CheckpointManager(NO_STATE, build({"save": str(root)}), root, log)
    assert names(root) == set(KEPT) | (set(LEFT) if rank else set())
    CheckpointManager(NO_STATE, build({}), root, log)
    CheckpointManager(NO_STATE, build({"save": str(root / "not there yet")}), root, log)
    assert not (root / "not there yet").exists()


def test_a_save_removes_them(root: Path) -> None:
    own = root / ".iter_0000004.00ff00ff.partial"
    checkpointing._make_room(root, own)
    assert names(root) == {*KEPT, own.name} and not list(own.iterdir())


def test_what_a_killed_removal_leaves_is_one_of_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the rename and the removal, an old checkpoint has a name that the next start finds."""
    for iteration in (5, 6):
        (root / f"iter_{iteration:07d}").mkdir()
    calls: list[Path] = []

    def killed(path: Path, ignore_errors: bool) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpointing.shutil, "rmtree", killed)
        remove_old(build({"save": str(root), "keep_latest_k": 2}).training, 6)
    assert partial_path(root / "iter_0000002").name in names(root) and "iter_0000002" not in names(root)
    checkpointing.remove_unfinished(root)
    assert names(root) == {*KEPT[1:], "iter_0000005", "iter_0000006"}
