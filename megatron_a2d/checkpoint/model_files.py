"""Whether the files of a model's or a checkpoint's directory are its own.

They come from other people, are copied into checkpoints and exports, and those are published: a link to a file
elsewhere would take a private file along, and a pipe would be waited for without end.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_a2d.utils.errors import UserError

# What is read of such a directory, or copied; whatever else lies there is nobody's concern.
_READ = (
    "*.json", "*.jinja", "*.safetensors", "*.distcp", "*.pt", "*.model", "*.txt", "*.md", "LICENSE*", ".metadata",
    "chat_template*", "additional_chat_templates", "hf",
)  # fmt: skip


def check_model_files(directory: Path) -> None:
    """UserError when a file of `directory`, or of a directory in it that is read, is a link that leaves it, or is no
    regular file. The hub's cache, whose files are links to the blobs beside it, is as it must be."""
    root = Path(os.path.realpath(directory))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    problems = []
    for path in _files(directory):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(root) and target.parent != blobs:
            problems.append(f"{path}: is a link to {target}, outside the directory; put the file itself there")
        elif target.exists() and not stat.S_ISREG(target.stat().st_mode):
            problems.append(f"{path}: is no regular file; remove it, or put the file itself there")
    if problems:
        raise UserError(problems)


def check_plain_files(directory: Path) -> None:
    """UserError unless all that lies below `directory` are files and directories, with no link among them."""
    problems = [
        f"{path}: is {'a link' if path.is_symlink() else 'no regular file'}; put the file itself there"
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
