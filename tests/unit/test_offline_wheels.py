"""What `bench.offline_wheels` does to a library without asking anyone: machine code of other architectures is zeroed."""

from __future__ import annotations

import struct
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench import offline_wheels
from bench.offline_wheels import SMALL, prune
from megatron_a2d.utils.errors import UserError


def entry(kind: int, model_config: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)) + bytes(12) + struct.pack("<I", model_config)
    return header.ljust(64, b"\0") + code


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_only_the_wanted_architecture_keeps_its_code(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    hopper, blackwell, text = b"h" * 96, b"b" * 160, b"p" * 32
    parts = [
        fat_binary(entry(2, 90, hopper), entry(2, 100, blackwell), entry(1, 90, text)),
        fat_binary(entry(2, 80, b"a" * 40)),
    ]
    library.write_bytes(b"before" + parts[0] + b"between" + parts[1] + b"after")
    size = library.stat().st_size
    assert prune(library, 90) == 200 and library.stat().st_size == size
    content = library.read_bytes()
    assert (
        hopper in content
        and text in content
        and b"b" * 4 not in content
        and b"a" * 4 not in content.replace(b"after", b"")
    )
    assert content.startswith(b"before") and b"between" in content and content.endswith(b"after")
    assert prune(library, 90) == 200, "what is zero already counts as zeroed"


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels of another release that lie there would be installed too."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(offline_wheels, "download", lambda *_: pytest.fail("downloads"))
    for out in (tmp_path, tmp_path / "file"):
        monkeypatch.setattr(sys, "argv", ["offline_wheels", "--out", str(out)])
        with pytest.raises(UserError, match="is not an empty folder"):
            offline_wheels.main()


def test_what_tests_and_benchmarks_import_is_carried() -> None:
    """With all that it needs in turn, but for numpy, which comes with torch."""
    wanted, seen = ["transformers", "tokenizers", "safetensors", "pytest", "rich"], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen or name == "numpy":
            continue
        seen.add(name)
        needs = [Requirement(line) for line in requires(name) or []]
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    assert seen <= {canonicalize_name(name) for name in SMALL} and len(seen) > 10
