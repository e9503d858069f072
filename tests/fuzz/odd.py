"""Odd values and odd files, drawn by a seed: what a user, a damaged disk or a stranger may give to a command."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_WORDS = (
    "", " ", "-1", "0", "1e400", "-1e400", "nan", "inf", "9" * 30, "9" * 5000, "0x10", "1_000", "1.5", "true", "null",
    "a\0b", "x" * 300, "x/" * 3000, "../..", ".", "/proc/version", "/proc/nowhere/at/all", "[/x]", "[red]", "\x1b[2J", "a\nerror: b",
    "é", "\udcff", "$\\frac$", "%s %d {0}", "--help-me", "@file", "*", "~", "1000000000", "-0.0", "0.5", "2",
)  # fmt: skip

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.5, 10**7, 10**9, 10**18, 2**63, 10**30, 1e308, "", "x", "\x1b[2J\nerror: b", "é" * 50,
    [], [1], ["a", None], [[[]]], {}, {"a": 1}, {"a": {"b": []}}, "9" * 400, "/etc", "../../x", "mdlm", "1e-3",
)  # fmt: skip

ODD_TEXTS: tuple[bytes, ...] = (
    b"", b"\0" * 64, b"[]", b"{}", b"null", b'"x"', b"5", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe{\0}\0",
    b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b"a: &a [*a]\n", b"a: !!int x\n", b"? [a]\n: 1\n",
    b"lr_mult:\n", b"---\na\n---\nb\n", b"\t: x", b"\x80\x02}q\0.", b"PK\x03\x04", b"a" * 70_000, b"\n" * 1000,
)  # fmt: skip


def odd_json(value: Any, rng: random.Random) -> Any:
    """`value` with one member somewhere replaced, removed or added."""
    places: list[tuple[Any, Any]] = []

    def walk(item: Any) -> None:
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            places.append((item, key))
            walk(item[key])

    walk(value)
    if not places:
        return rng.choice(ODD_VALUES)
    # The upper levels are the more telling ones: a vocabulary would otherwise take all tries.
    holder, key = rng.choice(places[:40] if rng.random() < 0.7 else places)
    if rng.random() < 0.15:
        del holder[key]
    elif isinstance(holder, dict) and rng.random() < 0.1:
        holder[rng.choice(ODD_WORDS[:20])] = holder[key]
    else:
        holder[key] = rng.choice(ODD_VALUES)
    return value


def damage(path: Path, rng: random.Random) -> str:
    """Change the file `path`; returns what was done."""
    kinds: list[Callable[[Path, random.Random], None]] = [_text, _bytes, _cut, _no_file, _folder, _pipe, _link]
    if path.suffix in (".json", ".jsonl", ".yaml"):
        kinds += [_json] * 14
    kind = rng.choice(kinds)
    kind(path, rng)
    return f"{kind.__name__[1:]} {path.name}"


def _json(path: Path, rng: random.Random) -> None:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = rng.randrange(len(lines))
    try:
        lines[number] = json.dumps(odd_json(json.loads(lines[number]), rng))
    except ValueError:  # a recipe in YAML's own form: one more line
        lines[number] += f"\n{rng.choice(('lr', 'lr_mult', 'save', 'seed', 'bf16', 'zzz'))}: {rng.choice(ODD_WORDS)}\n"
    path.write_text("\n".join(lines), errors="replace")


def _text(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice(ODD_TEXTS))


def _bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"x")
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(min(len(content), rng.choice((64, 4096, 1 << 30))))] = rng.choice(
            (0, 255, rng.randrange(256))
        )
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def _no_file(path: Path, rng: random.Random) -> None:
    path.unlink()


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice((path, "/dev/zero", "/nowhere", "/etc/passwd", path.parent)))


def copy_of(source: Path, target: Path) -> Path:
    """A copy whose files may be changed."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
