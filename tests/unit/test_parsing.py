"""The one reader of JSON and the one of YAML: whatever a file holds, a plain value or one line why not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.utils.atomic_write import new_file, read_json, read_yaml
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import DEEPEST, ParseError, parse_json, parse_yaml

# Nine levels of ten references each: a thousand million values in 300 bytes.
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)

BAD_JSON = {
    "nothing": (b"", "Expecting value"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "levels deep"),
    "deep object": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "levels deep"),
    "a little too deep": (b"[" * (DEEPEST + 2) + b"]" * (DEEPEST + 2), "levels deep"),
    "many digits": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    "a large number": (b'{"a": ' + b"9" * 400 + b"}", "larger than"),
    "beyond float": (b'{"a": 1e999}', "inf is not a finite number"),
    "not a number": (b'{"a": NaN}', "nan is not a finite number"),
    "infinite": (b'{"a": -Infinity}', "-inf is not a finite number"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 3}', "'a' comes twice"),
    "a key twice, below": (b'[{"a": {"b": 1, "b": 1}}]', "'b' comes twice"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8: byte 0 is 0xff"),
    "latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8: byte 7 is 0xe9"),
    "half a character": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "half a character in a key": (b'{"\\udfff": 1}', "half of a surrogate pair"),
    "NUL": (b'{"a": "\0"}', "control character"),
    "more after it": (b'{"a": 1} {"b": 2}', "Extra data"),
}
BAD_YAML = {
    "aliases": (ALIASES, "alias *a0"),
    "an alias of itself": ("a: &a [*a]", "alias *a"),
    "a merge of an alias": ("a: &a {b: 1}\nc: {<<: *a}", "alias *a"),
    "deep": ("[" * 5000 + "]" * 5000, "levels deep"),
    "deep blocks": ("".join(f"{' ' * n}a:\n" for n in range(500)), "levels deep"),
    "a key twice": ("lr: 1\nlr: 2", "'lr' comes twice"),
    "a key twice, one in quotes": ("lr: 1\n'lr': 2", "'lr' comes twice"),
    "a list as key": ("? [a, b]\n: 1", "not plain text"),
    "a number as key": ("1: a", "the key 1 is not text"),
    "nothing as key": ("~: a", "the key None is not text"),
    "many digits": ("a: " + "9" * 5000, "too long"),
    "beyond float": ("a: 1.0e+999", "inf is not a finite number"),
    "not a number": ("a: .nan", "nan is not a finite number"),
    "a large number": ("a: 0x" + "f" * 90, "larger than"),
    "a tag that does not fit: int": ("a: !!int x", "invalid literal"),
    "a tag that does not fit: float": ("a: !!float x", "could not convert"),
    "a tag that does not fit: bool": ("a: !!bool x", "'x'"),
    "a tag that does not fit: date": ("a: !!timestamp x", "NoneType"),
    "a tag that does not fit: empty": ("a: !!int", "index"),
    "a date out of range": ("a: !!timestamp 2020-99-99", "month"),
    "a tag for Python": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "a set": ("a: !!set {b}", "is a set"),
    "bytes": ("a: !!binary aGk=", "is a bytes"),
    "NUL": ("a: \0", "special characters"),
    "two documents": ("a: 1\n---\nb: 2", "single document"),
    "no end": ("a: [1, 2", "expected"),
    "a tab": ("a:\n\t- b", "cannot start any token"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(content: bytes, reason: str) -> None:
    with pytest.raises(ParseError) as end:
        parse_json(content)
    assert reason in str(end.value) and "\n" not in str(end.value) and len(str(end.value)) < 400


@pytest.mark.parametrize(("content", "reason"), BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml(content: str, reason: str) -> None:
    begin = time.process_time()
    with pytest.raises(ParseError) as end:
        parse_yaml(content)
    assert reason in str(end.value) and "\n" not in str(end.value) and len(str(end.value)) < 400
    assert time.process_time() - begin < 5, "the reason was found only after the whole value was built"


@pytest.mark.parametrize(
    "value",
    [{"a": [1, -2.5, "é", None, True, {"b": {}}]}, [], "x", 2**64 - 1, -1.5, {"a": "\u2028\x1b"}],
)
def test_what_is_good_comes_back(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_yaml(json.dumps(value)) == value  # JSON is YAML


def test_yaml_keeps_what_recipes_use() -> None:
    text = "lr: 3e-4\nmin_lr: 1.5e-5\nsave: runs/2026-11-28\nday: 2026-11-28\nbf16: true\nlr_mult: {mlp: 0.1}\nload:\n"
    assert parse_yaml(text) == {
        "lr": "3e-4", "min_lr": 1.5e-5, "save": "runs/2026-11-28", "day": "2026-11-28", "bf16": True,
        "lr_mult": {"mlp": 0.1}, "load": None,
    }  # fmt: skip
    assert parse_yaml("\ufeffa: 1") == {"a": 1}
    for schedule in ("1:30", "1:30,4:60", "8:00:00", "-1:30", "1:30.5", "1" + ":1" * 100_000):  # no numbers of base 60
        assert parse_yaml(f"a: {schedule}") == {"a": schedule}
    assert parse_yaml("a: {<<: {b: 1}, c: 2}") == {"a": {"b": 1, "c": 2}}
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert parse_yaml(deep) == parse_json(deep)


def test_logs_may_hold_what_is_no_number() -> None:
    assert parse_json('{"loss": Infinity}', allow_nonfinite=True) == {"loss": float("inf")}


def directory(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless_link(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [directory, pipe, device, endless_link])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json: the shape (is not a regular file|cannot be read)"):
        read_json(tmp_path / "config.json", "the shape")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "none", "file/below"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for read in (lambda path: read_json(path, "the shape"), lambda path: read_yaml(path, "--config x")):
        with pytest.raises(UserError, match=r"is missing|cannot be read") as end:
            read(tmp_path / name)
        assert len(end.value.problems) == 1


def test_a_recipe_may_come_through_a_pipe_but_not_without_end(tmp_path: Path) -> None:
    ends = os.pipe()
    os.write(ends[1], b"lr: 1.0\n")
    os.close(ends[1])
    assert read_yaml(f"/dev/fd/{ends[0]}", "--config x") == {"lr": 1.0}
    os.close(ends[0])
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(UserError, match="not a regular file"):
            read_yaml(path, f"--config {path}")
    (tmp_path / "large").write_text("# " + "x" * 2**18)
    with pytest.raises(UserError, match="larger than 256 KiB"):
        read_yaml(tmp_path / "large", "--config large")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "below"])
def test_a_directory_is_no_file_to_write(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    with pytest.raises(UserError, match="is a directory"), new_file(name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["below"]


def test_aliases_where_programs_write_them() -> None:
    assert parse_yaml("a: &x {b: [1]}\nc: *x", aliases=True) == {"a": {"b": [1]}, "c": {"b": [1]}}
    for text, message in (
        (ALIASES, "more than 100,000 values"),
        ("a: &a [*a]", "levels deep|more than"),
        ("a: &a {b: 1}\nc: {<<: *a}", "merge"),
    ):
        with pytest.raises(ParseError, match=message):
            parse_yaml(text, aliases=True)
