"""The manifest of a checkpoint, and which checkpoint a run starts from."""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.checkpoint import manifest
from megatron_a2d.checkpoint.directory import TRACKER
from megatron_a2d.checkpoint.manifest import MANIFEST, Entry, check_manifest, list_files, write_manifest
from megatron_a2d.config.settings import build
from megatron_a2d.conversion.hf_to_torch_dist import convert
from megatron_a2d.training.checkpointing import remove_old
from megatron_a2d.training.resume import Start, differences, find_start
from megatron_a2d.utils.atomic_write import write_json
from megatron_a2d.utils.errors import UserError
from tests import tiny


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make(tmp_path / "some" / "iter_0000001")


def make(directory: Path) -> Path:
    """What looks like a complete iteration."""
    (directory / "hf").mkdir(parents=True)
    for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp", "hf/config.json"):
        (directory / name).write_bytes(name.encode() * 1000)
    (directory / "hf" / "config.json").write_text(json.dumps({"model_type": "qwen3"}) + "\n" * 1000)
    write_json(directory / "run.json", build({}).to_dict())
    write_manifest(directory)
    return directory


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_directory_has_no_problems(directory: Path) -> None:
    assert check_manifest(directory) == []
    assert list_files(directory) == [
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "hf/config.json",
        "metadata.json",
        "run.json",
    ]


@pytest.mark.parametrize(
    "name", [".metadata", "common.pt", "metadata.json", "__0_0.distcp", "hf/config.json", "run.json"]
)
def test_damage_to_any_file_is_named(name: str, directory: Path) -> None:
    path = directory / name
    whole = path.read_bytes()
    flip_a_bit(path)
    (line,) = check_manifest(directory)
    assert line.startswith(f"{path}: is damaged (XXH3 ")
    assert check_manifest(directory, checksums=False) == []
    path.write_bytes(whole[:-1])
    (line,) = check_manifest(directory, checksums=False)
    assert line == f"{path}: has {len(whole) - 1} bytes, not {len(whole)}"
    path.unlink()
    assert check_manifest(directory, checksums=False) == [f"{path}: is missing"]


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 1}}']
)
def test_a_damaged_manifest_is_named(content: str | None, directory: Path) -> None:
    (directory / MANIFEST).unlink()
    if content is not None:
        (directory / MANIFEST).write_text(content)
    (line,) = check_manifest(directory)
    assert line.startswith(f"{directory / MANIFEST}: ")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file"), "is missing"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read (Input/output error)"),
    ],
)
def test_files_that_vanish_or_cannot_be_read_are_named(
    error: OSError, words: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run deletes old checkpoints while another process looks at them; disks fail."""

    def fails(path: Path, *_: Any) -> None:
        raise error

    monkeypatch.setattr(manifest, "_measure", fails)
    names = manifest.read_manifest(directory)
    assert check_manifest(directory) == [f"{directory / name}: {words}" for name in names]
    assert check_manifest(directory, checksums=False) == []


def test_all_problems_are_listed(directory: Path) -> None:
    flip_a_bit(directory / ".metadata")
    (directory / "common.pt").unlink()
    assert {line.partition(":")[0] for line in check_manifest(directory)} == {
        str(directory / ".metadata"),
        str(directory / "common.pt"),
    }


def test_files_that_are_known_are_not_read_again(directory: Path) -> None:
    """The checksum that a rank found for its own file is taken as it is."""
    write_manifest(directory, {"common.pt": Entry(9000, "0" * 16)})
    assert [line for line in check_manifest(directory) if f"not {'0' * 16}" in line]


def test_manifests_of_earlier_versions_are_verified(directory: Path) -> None:
    """Their checksums are CRC-32."""
    files = {
        name: {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        for name in list_files(directory)
        for data in [(directory / name).read_bytes()]
    }
    write_json(directory / MANIFEST, {"files": files})
    assert check_manifest(directory) == []
    flip_a_bit(directory / "common.pt")
    (line,) = check_manifest(directory)
    assert line.startswith(f"{directory / 'common.pt'}: is damaged (CRC-32 ")


def test_a_conversion_has_a_manifest(tmp_path: Path) -> None:
    tiny.write_hf(tmp_path / "hf", "dense")
    convert(tmp_path / "hf", tmp_path / "out")
    assert check_manifest(tmp_path / "out" / "release") == []
    assert "hf/tokenizer.json" in list_files(tmp_path / "out" / "release")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A --save directory with iterations 10, 20 and 30."""
    for iteration in (10, 20, 30):
        make(tmp_path / "run" / f"iter_00000{iteration}")
    (tmp_path / "run" / TRACKER).write_text("30\n")
    return tmp_path / "run"


def started(**settings: Any) -> str:
    return find_start(
        build({key: str(value) if isinstance(value, Path) else value for key, value in settings.items()})
    ).directory.name


def test_the_newest_whole_checkpoint_is_taken(run: Path) -> None:
    assert started(save=run) == "iter_0000030"
    flip_a_bit(run / "iter_0000030" / "common.pt")
    assert started(save=run) == "iter_0000020"
    assert started(save=run, verify_checkpoint=False) == "iter_0000030"
    (run / "iter_0000020" / "__0_0.distcp").unlink()
    assert started(save=run) == "iter_0000010"
    shutil.rmtree(run / "iter_0000010")
    with pytest.raises(UserError, match="contains no intact checkpoint") as error:
        started(save=run, load=run)
    assert len(error.value.problems) == 3


def test_the_tracker_is_heeded(run: Path) -> None:
    """An edited tracker hides newer iterations; a missing or dangling one does not hide the others."""
    (run / TRACKER).write_text("20\n")
    assert started(save=run) == "iter_0000020"
    (run / TRACKER).write_text("40\n")
    assert started(save=run) == "iter_0000030"
    (run / TRACKER).unlink()
    assert started(save=run) == "iter_0000030"


def test_a_checkpoint_that_was_asked_for_must_be_whole(run: Path, tmp_path: Path) -> None:
    assert started(save=run, ckpt_step=20) == started(load=run, ckpt_step=20) == "iter_0000020"
    flip_a_bit(run / "iter_0000020" / "common.pt")
    flip_a_bit(run / "iter_0000030" / "common.pt")
    for settings in (
        {"save": run, "ckpt_step": 20},
        {"load": run, "ckpt_step": 20},
        {"load": run / "iter_0000020"},
        {"load": run},
        {"load": run, "save": tmp_path / "new"},
    ):
        with pytest.raises(UserError, match=r"common.pt: is damaged"):
            started(**settings)
    with pytest.raises(UserError, match=r"--ckpt-step 7: --save .* contains 10, 20, 30"):
        started(save=run, ckpt_step=7)
    with pytest.raises(UserError, match=r"--ckpt-step 7: --load .* contains 10, 20, 30"):
        started(load=run, ckpt_step=7)


def test_differing_settings_are_refused_unless_only_weights_are_taken(run: Path) -> None:
    with pytest.raises(UserError) as error:
        started(load=run, seed=7, seq_length=64, adam_beta1=0.8, lr_mult={"mlp": 0.1})
    assert [line.partition(":")[0] for line in error.value.problems] == ["--seq-length 64", "--seed 7"]
    assert "was trained with 1234" in error.value.problems[1]
    assert started(load=run, seed=7, finetune=True) == "iter_0000030"


@pytest.mark.parametrize(
    ("keep_latest_k", "save_retain_interval", "kept"),
    [
        (0, 0, [10, 20, 30]),
        (1, 0, [30]),
        (2, 0, [20, 30]),
        (9, 0, [10, 20, 30]),
        (1, 20, [20, 30]),
        (1, 10, [10, 20, 30]),
    ],
)
def test_what_is_kept(keep_latest_k: int, save_retain_interval: int, kept: list[int], run: Path) -> None:
    remove_old(
        build(
            {"save": str(run), "keep_latest_k": keep_latest_k, "save_retain_interval": save_retain_interval}
        ).training,
        30,
    )
    assert sorted(int(path.name[5:]) for path in run.glob("iter_*")) == kept
    assert not list(run.glob(".*"))


def test_a_newer_checkpoint_that_was_given_up_is_neither_counted_nor_removed(run: Path) -> None:
    remove_old(build({"save": str(run), "keep_latest_k": 1}).training, 20)
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000020", "iter_0000030"]


def test_a_removal_cut_short_leaves_nothing_that_looks_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the rename and the removal of the files."""
    calls: list[Any] = []

    def removed(path: Any, **_: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", removed)
    remove: Callable[[], None] = lambda: remove_old(build({"save": str(run), "keep_latest_k": 1}).training, 30)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        remove()
    assert sorted(path.name for path in run.glob("iter_*")) == ["iter_0000020", "iter_0000030"]


def told(**settings: Any) -> tuple[Start, list[str]]:
    """Where a run starts, and what it reports."""
    lines: list[str] = []
    config = build({key: str(value) if isinstance(value, Path) else value for key, value in settings.items()})
    return find_start(config, lines.append), lines


def test_what_is_taken_beside_the_weights(run: Path, tmp_path: Path) -> None:
    """Everything, but from a converted model, for --finetune, and where the weights are initialised randomly."""
    make(tmp_path / "first" / "iter_0000000")
    assert told(save=run) == (Start(run / "iter_0000030", False), [])
    assert told(load=run) == (Start(run / "iter_0000030", False), [])
    assert told(load=run, save=tmp_path / "none")[0] == Start(run / "iter_0000030", False)
    assert told(load=run, finetune=True)[0] == Start(run / "iter_0000030", True)
    assert told(load=run, conversion="random", seed=3)[0] == Start(run / "iter_0000030", True)
    assert told(load=tmp_path / "first" / "iter_0000000", seed=3) == (
        Start(tmp_path / "first" / "iter_0000000", True),
        [],
    )
    assert told(save=run, load=tmp_path / "first", finetune=True)[0] == Start(run / "iter_0000030", False), (
        "--save comes first"
    )
    with pytest.raises(UserError, match="--load: is missing"):
        told()


def test_what_is_passed_over_is_told(run: Path) -> None:
    flip_a_bit(run / "iter_0000030" / "common.pt")
    (run / TRACKER).write_text("40\n")
    start, lines = told(save=run)
    assert start.directory.name == "iter_0000020" and len(lines) == 2
    assert lines[0] == f"{run / 'iter_0000040'}: is missing"
    assert "common.pt: is damaged" in lines[1] and lines[1].endswith("; iter_0000030 is skipped")
    with pytest.raises(UserError, match="leave out --ckpt-step 30"):
        told(save=run, ckpt_step=30)
    with pytest.raises(UserError, match="restore the file, or use another iteration"):
        told(load=run, ckpt_step=30)


def test_changes_that_hold_from_now_on_are_told(run: Path) -> None:
    _, lines = told(load=run, lr=1e-5, train_iters=77, lr_mult={"mlp": 0.5, "norm": 2.0}, num_workers=9)
    before = build({})
    assert lines == [
        f"--train-iters 77: was {before.training.train_iters} until iteration 30, and applies from now on",
        f"--lr 1e-05: was {before.optimization.lr} until iteration 30, and applies from now on",
        "--lr-mult mlp=0.5 norm=2.0: was "
        + (" ".join(f"{role}={factor}" for role, factor in before.optimization.lr_mult.items()) or "no factors")
        + " until iteration 30, and applies from now on",
    ]


def test_bound_settings_that_differ(run: Path) -> None:
    (line,) = differences(build({"label_shift": False}), run / "iter_0000030")
    assert line == (
        f"--label-shift false: {run / 'iter_0000030'} was trained with true; resume with that, or start a new run from its "
        f"weights: --load {run / 'iter_0000030'} --finetune and another --save"
    )
    (run / "iter_0000030" / "run.json").write_text("{}")  # before any of the settings was there
    assert differences(build({}), run / "iter_0000030") == []
    assert len(differences(build({"seed": 5, "bf16": not build({}).training.bf16}), run / "iter_0000030")) == 2


def test_checkpoints_of_other_programs_need_no_manifest_where_nobody_looks(run: Path) -> None:
    (run / "iter_0000030" / MANIFEST).unlink()
    assert told(load=run, verify_checkpoint=False)[0].directory.name == "iter_0000030"
    with pytest.raises(UserError):
        told(load=run)
    (run / "iter_0000020" / "common.pt").unlink()
    # Without common.pt it may be one of megatron-core 0.19's, which metadata.json tells.
    with pytest.raises(UserError, match=r"metadata.json: the format is not valid JSON"):
        told(load=run / "iter_0000020", verify_checkpoint=False)
