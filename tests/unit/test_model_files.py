"""Links in a model's or a checkpoint's directory: what lies elsewhere is neither read, copied nor published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import convert_hf, export_hf, publish
from megatron_a2d import generate
from megatron_a2d.checkpoint.directory import copy_hf_files, resolve
from megatron_a2d.utils.errors import UserError
from tests.tiny import write_hf


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_hf(root / "hf", "dense")
    convert_hf.main(["--hf-model", str(root / "hf"), "--out", str(root / "ckpt")])
    export_hf.main(["--checkpoint", str(root / "ckpt"), "--out", str(root / "export"), "--format", "a2d"])
    return root


def replace(path: Path, how: str) -> None:
    """`path` becomes a link to a copy of it elsewhere, or a pipe."""
    if how == "pipe":
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return
    elsewhere = path.parents[2] / f"private_{path.name}"
    if path.exists():
        shutil.move(path, elsewhere)
    else:
        elsewhere.write_text("secret")
    path.symlink_to(elsewhere)


COMMANDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "convert": ("hf", lambda root: convert_hf.main(["--hf-model", str(root / "hf"), "--out", str(root / "out")])),
    "resolve": ("ckpt/release", lambda root: resolve(root / "ckpt")),
    "checkpoint's model files": ("ckpt/release/hf", lambda root: resolve(root / "ckpt")),
    "generate": ("export", lambda root: generate.main(["--model", str(root / "export"), "--prompt", "a"])),
    "copy": ("hf", lambda root: copy_hf_files(root / "hf", root)),
}
FILES = {
    "convert": ("config.json", "tokenizer.json", "LICENSE", "chat_template.jinja", "model.safetensors", "README.md"),
    "resolve": (".metadata", "common.pt", "__0_0.distcp", "run.json", "manifest.json"),
    "checkpoint's model files": ("config.json", "tokenizer.json"),
    "generate": ("config.json", "tokenizer.json", "model.safetensors"),
    "copy": ("LICENSE", "tokenizer.json"),
}


@pytest.mark.parametrize("how", ["link", "pipe"])
@pytest.mark.parametrize(("command", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_file_is_the_directorys_own(command: str, file: str, how: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "root")
    place, run = COMMANDS[command]
    replace(tmp_path / "root" / place / file, how)
    reason = "is a link to .*outside the directory" if how == "link" else "is not a regular file"
    with pytest.raises(UserError, match=rf"{file}: {reason}"):
        run(tmp_path / "root")
    assert not (tmp_path / "root" / "out").exists()


@pytest.mark.parametrize("kind", ["directory", "file in a directory"])
def test_directories_that_are_copied(kind: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "hf", tmp_path / "hf")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.jinja").write_text("secret")
    if kind == "directory":
        (tmp_path / "hf" / "chat_template").symlink_to(tmp_path / "private")
    else:
        (tmp_path / "hf" / "chat_template").mkdir()
        (tmp_path / "hf" / "chat_template" / "key.jinja").symlink_to(tmp_path / "private" / "key.jinja")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="outside the directory"):
        copy_hf_files(tmp_path / "hf", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_links_that_are_as_they_must_be(models: Path, tmp_path: Path) -> None:
    """The hub's cache, a link within the directory, a link to the whole directory, and links that are never read."""
    cache = tmp_path / "models--Qwen--Tiny"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted((models / "hf").iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    (snapshot / "chat_template.jinja").symlink_to("tokenizer.json")
    (snapshot / "trace.log").symlink_to("/etc/hostname")
    (tmp_path / "link").symlink_to(snapshot)
    convert_hf.main(["--hf-model", str(tmp_path / "link"), "--out", str(tmp_path / "out")])
    # Blobs of another model are not its own.
    (snapshot / "LICENSE").symlink_to(models / "hf" / "config.json")
    with pytest.raises(UserError, match="LICENSE: is a link"):
        convert_hf.main(["--hf-model", str(snapshot), "--out", str(tmp_path / "again")])


@pytest.mark.parametrize("name", ["README.md", "extra.bin", "deep/extra"])
def test_no_link_is_published(name: str, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "export", tmp_path / "export")
    path = tmp_path / "export" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(models / "hf" / "config.json")
    with pytest.raises(UserError, match=f"{name}: is a link"):
        publish.check_export(tmp_path / "export")
