"""Checks of untrusted model and checkpoint directories: no links that leave them, no pipes, no devices.

Their files are copied into checkpoints and exports, which are published: a link that leaves the directory would publish
a private file, and reading a pipe would block forever.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_a2d.utils.errors import UserError

# The files that are read or copied; others are ignored.
_READ = (
    "*.json", "*.jinja", "*.safetensors", "*.distcp", "*.pt", "*.model", "*.txt", "*.md", "LICENSE*", ".metadata",
    "chat_template*", "additional_chat_templates", "hf", "run_config.yaml",
    "tokenizer", "nemo_tokenizer", "model.yaml",  # of Megatron-LM, Megatron-Bridge and NeMo 2
)  # fmt: skip


def check_model_files(directory: Path) -> None:
    """UserError if a file in `directory` is a link that leaves it, or not a regular file.

    The files of the hub's cache are links to the blobs next to it, and allowed.
    """
    root = Path(os.path.realpath(directory))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    problems = []
    for path in _files(directory):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(root) and target.parent != blobs:
            problems.append(f"{path}: is a link to {target}, outside the directory; put the file itself there")
        elif target.exists() and not stat.S_ISREG(target.stat().st_mode):
            problems.append(f"{path}: is not a regular file; remove it, or put the file itself there")
    if problems:
        raise UserError(problems)


def check_plain_files(directory: Path) -> None:
    """UserError unless `directory` contains only files and directories, at any depth, and no links."""
    problems = [
        f"{path}: is {'a link' if path.is_symlink() else 'not a regular file'}; put the file itself there"
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or not (path.is_file() or path.is_dir())
    ]
    if problems:
        raise UserError(problems)


def _files(directory: Path) -> Iterator[Path]:
    for name in sorted(os.listdir(directory)) if directory.is_dir() else ():
        path = directory / name
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in _READ):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path) if name == "hf" else (file for file in path.rglob("*") if not _is_dir(file))
        else:
            yield path


def _is_dir(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
