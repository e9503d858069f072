"""manifest.json: the size and checksum of every file of a checkpoint's directory, to find damage before a load.

The checksum is XXH3 of 64 bits, which misses damage in one case of 2^64 and costs little compared with reading the
file. Earlier versions wrote CRC-32, at a tenth of the speed; such manifests are verified as they are. Neither protects
against an attacker, who could rewrite the manifest; torch_dist_reader.py does, by unpickling nothing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import xxhash

from megatron_a2d.utils.atomic_write import read_json, regular, write_json
from megatron_a2d.utils.errors import UserError

MANIFEST = "manifest.json"
PLACEMENT = "expert_placement.json"  # placement_file.py: not in the manifest, it may be written later
_BLOCK = 16 << 20
_THREADS = 8  # hashing releases the interpreter's lock


class Hasher(Protocol):
    """An incremental checksum."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


# By the key in the manifest: the name in messages, and what computes the checksum.
ALGORITHMS: dict[str, tuple[str, Callable[[], Hasher]]] = {
    "xxh3": ("XXH3", xxhash.xxh3_64),
    "crc32": ("CRC-32", _Crc32),
}


class Entry(NamedTuple):
    """Size and checksum of a file."""

    size: int  # bytes
    checksum: str  # hexadecimal digits
    algorithm: str = "xxh3"  # a key of ALGORITHMS

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Entry:
        """Parse an entry of the manifest. KeyError, TypeError or ValueError if it is damaged."""
        algorithm = next((name for name in ALGORITHMS if name in stored), "xxh3")
        return cls(int(stored["size"]), str(stored[algorithm]), algorithm)

    def stored(self) -> dict[str, Any]:
        """The entry as written in the manifest."""
        return {"size": self.size, self.algorithm: self.checksum}


def measure(
    directory: Path, names: Iterable[str], num_threads: int = _THREADS, algorithm: str = "xxh3"
) -> dict[str, Entry]:
    """Read the files `names` (relative to `directory`) once, several at a time; with num_threads=1 in this thread."""
    names = list(names)
    if num_threads == 1:
        return {name: _measure(directory / name, algorithm) for name in names}
    with ThreadPoolExecutor(num_threads) as pool:
        return dict(zip(names, pool.map(lambda name: _measure(directory / name, algorithm), names), strict=True))


def write_manifest(directory: Path, known: dict[str, Entry] | None = None, num_threads: int = _THREADS) -> None:
    """Write `directory`/manifest.json, the last of its files; files in `known` are not read again."""
    entries = dict(known or {})
    entries |= measure(directory, [name for name in list_files(directory) if name not in entries], num_threads)
    write_json(directory / MANIFEST, {"files": {name: entries[name].stored() for name in sorted(entries)}})


def check_manifest(directory: Path, checksums: bool = True) -> list[str]:
    """A line for each file of `directory` that differs from the manifest, without `checksums` only in size."""
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return [f"{directory / MANIFEST}: is missing; the files cannot be checked"]
    try:
        expected = read_manifest(directory)
    except UserError as error:
        return [str(error)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda item: _problem(directory, item[0], item[1], checksums), expected.items())
        return [problem for problem in found if problem]


def _problem(directory: Path, name: str, entry: Entry, checksum: bool) -> str:
    """How a file differs from its entry, '' if it does not. A run may delete the checkpoint meanwhile."""
    path = directory / name
    if ".." in PurePath(name).parts or PurePath(name).is_absolute():
        return f"{directory / MANIFEST}: names {name!r}, which lies outside the directory"
    try:
        if not path.is_file():
            return f"{path}: is missing"
        if (size := path.stat().st_size) != entry.size:
            return f"{path}: has {size} bytes, not {entry.size}"
        found = _measure(path, entry.algorithm) if checksum else entry
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if found.checksum == entry.checksum:
        return ""
    return f"{path}: is damaged ({ALGORITHMS[found.algorithm][0]} {found.checksum}, not {entry.checksum})"


def read_manifest(directory: Path) -> dict[str, Entry]:
    """The entries of `directory`/manifest.json by name. UserError if it is missing or damaged."""
    content = read_json(directory / MANIFEST, "the manifest")
    try:
        return {str(name): Entry.of(entry) for name, entry in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory / MANIFEST}: is damaged ({error!r})") from None


def list_files(directory: Path) -> list[str]:
    """Every file below `directory` that the manifest lists, relative to it, sorted."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (MANIFEST, PLACEMENT))


def _measure(path: Path, algorithm: str) -> Entry:
    hasher = ALGORITHMS[algorithm][1]()
    with open(path, "rb", buffering=0, opener=regular) as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
        return Entry(os.fstat(file.fileno()).st_size, hasher.hexdigest(), algorithm)
