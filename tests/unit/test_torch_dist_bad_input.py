"""Damaged and hostile torch_dist checkpoints: export ends with one clear error and leaves nothing behind."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_a2d.checkpoint.directory import TRACKER, iteration_of, resolve
from megatron_a2d.conversion.torch_dist_to_hf import export
from megatron_a2d.utils.errors import UserError
from tests.unit import model_damage
from tests.unit.model_damage import edit_config, truncate

models = model_damage.models


class Evil:
    """Pickles to a call of os.mkdir: harmless proof that code ran."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def spoil_places(release: Path, **changes: Callable) -> None:
    """Change where .metadata says that the chunks lie."""
    path = release / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        for name, change in changes.items():
            setattr(place, name, change(getattr(place, name)))
    path.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / ".metadata").write_bytes(pickle.dumps(Evil(r.parent / "owned"))), "posix.mkdir, which is not"),
        (lambda r: torch.save(Evil(r.parent / "owned"), r / "common.pt"), "common.pt: cannot be read"),
        (lambda r: truncate(r / ".metadata", 500), "is refused"),
        (lambda r: truncate(r / "__0_0.distcp", 50_000), "truncated"),
        (lambda r: (r / "__0_0.distcp").unlink(), "__0_0.distcp: is missing"),
        (lambda r: (r / "metadata.json").unlink(), "incomplete"),
        (lambda r: (r / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "format 'zarr'"),
        (lambda r: (r / "hf" / "config.json").unlink(), "configuration is missing"),
        (lambda r: edit_config(r / "hf", num_hidden_layers=5), "has shape"),
        (
            lambda r: spoil_places(r, relative_path=lambda name: f"../{name}"),
            "lies outside the checkpoint",
        ),
        (
            lambda r: spoil_places(r, offset=lambda offset: offset + 8),
            "is damaged",
        ),
    ],
    ids=[
        "hostile .metadata", "hostile common.pt", "cut .metadata", "cut data", "no data", "no metadata.json",
        "other format", "no config", "other architecture", "path outside", "wrong offsets",
    ],
)  # fmt: skip
def test_bad_checkpoints(damage: Callable[[Path], object], message: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "ckpt", tmp_path / "ckpt")
    damage(tmp_path / "ckpt" / "release")
    with pytest.raises(UserError, match=message):
        export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert not (tmp_path / "ckpt" / "owned").exists()


def test_the_hostile_pickle_would_have_run(tmp_path: Path) -> None:
    """Control for the above: the pickle does what it says when nothing restricts it."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "owned")))
    assert (tmp_path / "owned").exists()


def test_a_hostile_chunk_is_refused(models: Path, tmp_path: Path) -> None:
    """A chunk's own pickle may name nothing but tensors, even when its place and length are right."""
    shutil.copytree(models / "ckpt", tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "release" / "__0_0.distcp"
    data = path.read_bytes()
    hostile = data.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n")
    assert hostile != data
    path.write_bytes(hostile)
    with pytest.raises(UserError, match=r"_rebuild_tensor_v3, which is not allowed"):
        export(tmp_path / "ckpt", tmp_path / "out", "qwen3")
    assert not (tmp_path / "out").exists()


def test_a_failed_verification_leaves_no_export(models: Path, tmp_path: Path, monkeypatch) -> None:
    """The export is read back before it gets its name."""
    from megatron_a2d.conversion import torch_dist_to_hf as module

    write = module.write_safetensors

    def write_badly(work, *args):
        digests = write(work, *args)
        with (work.directory / "model.safetensors").open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return digests

    monkeypatch.setattr(module, "write_safetensors", write_badly)
    with pytest.raises(UserError, match="differs from"):
        export(models / "ckpt", tmp_path / "out", "qwen3")
    assert not list(tmp_path.iterdir())
    export(models / "ckpt", tmp_path / "out", "qwen3", verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("release\n", None),
        ("300", "iter_0000300, which does not exist"),
        ("latest", "not an iteration"),
        ("", "not an iteration"),
    ],
)
def test_trackers(content: str, message: str | None, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "ckpt", tmp_path / "ckpt")
    (tmp_path / "ckpt" / TRACKER).write_text(content)
    if message is None:
        assert resolve(tmp_path / "ckpt") == tmp_path / "ckpt" / "release"
        return
    with pytest.raises(UserError, match=message):
        resolve(tmp_path / "ckpt")


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        resolve(tmp_path / "nothing")
    with pytest.raises(UserError, match="written by convert_hf or by training"):
        resolve(tmp_path)
    (tmp_path / "iter_0000040").mkdir()
    with pytest.raises(UserError, match=r"give .*iter_0000040"):
        resolve(tmp_path)
    with pytest.raises(UserError, match=r"lacks \.metadata, common\.pt, metadata\.json"):
        resolve(tmp_path / "iter_0000040")
    assert iteration_of(tmp_path / "iter_0000040") == 40
    with pytest.raises(UserError, match="named neither"):
        iteration_of(tmp_path)
