"""manifest.json: the size and checksum of every file of a checkpoint's directory, to find damage before a load.

The checksum is CRC-32. It finds every flip of up to 32 neighbouring bits, other damage but for one case in 2^32, and
costs little compared with reading the file. It does not protect against an attacker, who could rewrite the manifest;
torch_dist_reader.py does, by unpickling nothing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import NamedTuple

from megatron_a2d.utils.atomic_write import read_json, regular, write_json
from megatron_a2d.utils.errors import UserError

MANIFEST = "manifest.json"
PLACEMENT = "expert_placement.json"  # placement_file.py: not in the manifest, it may be written later
_BLOCK = 16 << 20
_THREADS = 8  # zlib releases the interpreter's lock


class Entry(NamedTuple):
    """Size and checksum of a file."""

    size: int  # bytes
    crc32: str  # 8 hexadecimal digits


def measure(directory: Path, names: Iterable[str], num_threads: int = _THREADS) -> dict[str, Entry]:
    """Read the files `names` (relative to `directory`) once, several at a time."""
    names = list(names)
    with ThreadPoolExecutor(num_threads) as pool:
        return dict(zip(names, pool.map(lambda name: _measure(directory / name), names), strict=True))


def write_manifest(directory: Path, known: dict[str, Entry] | None = None) -> None:
    """Write `directory`/manifest.json, the last of its files; files in `known` are not read again."""
    entries = dict(known or {})
    entries |= measure(directory, [name for name in list_files(directory) if name not in entries])
    write_json(directory / MANIFEST, {"files": {name: entries[name]._asdict() for name in sorted(entries)}})


def check_manifest(directory: Path, checksums: bool = True) -> list[str]:
    """A line for each file of `directory` that differs from the manifest, without `checksums` in its size."""
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return [f"{directory / MANIFEST}: is missing; the files cannot be checked"]
    try:
        expected = read_manifest(directory)
    except UserError as error:
        return [str(error)]
    problems, same_size = [], []
    for name, entry in expected.items():
        path = directory / name
        if ".." in PurePath(name).parts or PurePath(name).is_absolute():
            problems.append(f"{directory / MANIFEST}: names {name!r}, which lies outside the directory")
        elif not path.is_file():
            problems.append(f"{path}: is missing")
        elif (size := path.stat().st_size) != entry.size:
            problems.append(f"{path}: has {size} bytes, not {entry.size}")
        else:
            same_size.append(name)
    for name, found in measure(directory, same_size).items() if checksums else ():
        if found.crc32 != expected[name].crc32:
            problems.append(f"{directory / name}: is damaged (CRC-32 {found.crc32}, not {expected[name].crc32})")
    return problems


def read_manifest(directory: Path) -> dict[str, Entry]:
    """The entries of `directory`/manifest.json by name. UserError if it is missing or damaged."""
    content = read_json(directory / MANIFEST, "the manifest")
    try:
        return {str(name): Entry(int(entry["size"]), str(entry["crc32"])) for name, entry in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory / MANIFEST}: is damaged ({error!r})") from None


def list_files(directory: Path) -> list[str]:
    """Every file below `directory` that the manifest lists, relative to it, sorted."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (MANIFEST, PLACEMENT))


def _measure(path: Path) -> Entry:
    crc = 0
    with open(path, "rb", buffering=0, opener=regular) as file:
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
        return Entry(os.fstat(file.fileno()).st_size, f"{crc:08x}")
