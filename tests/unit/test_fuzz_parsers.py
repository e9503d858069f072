"""The parsers under drawn input (hypothesis, the same examples every time): a value, or one line of a UserError."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_a2d.checkpoint.directory import read_license
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.model_config import model_config_from_hf
from megatron_a2d.config.renamed import recorded_settings
from megatron_a2d.conversion.mask_token import read_tokens
from megatron_a2d.conversion.safetensors_files import open_safetensors
from megatron_a2d.data.blended_dataset import read_mixture
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.inference.prompts import read_jsonl
from megatron_a2d.planner.cluster import read_cluster
from megatron_a2d.report.plots import read_log
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.parsing import DEEPEST, LARGEST_INTEGER, ParseError, parse_json, parse_yaml
from megatron_a2d.utils.printable import lines_of, one_line
from tests.tiny import hub_config

fixed = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)

# Pieces that mean something in either language, so that more than the first byte is parsed.
PIECES = (
    *"[]{}:,-?*&!|>%@`'\"#~ \n\t\0\\", "a", "a: ", "- ", "? ", "&x ", "*x", "<<: ", "!!int ", "!!float ", "!!binary ", "!!set ",
    "!!timestamp ", "!!omap ", "!!python/name:os ", "---\n", "...\n", "%YAML 1.1\n", "1", "0x", "1e999", ".nan", "-.inf", "NaN",
    "1:1", "2020-01-01", "true", "null", '"\\ud800"', '"\\u0000"', '{"a":1,"a":2}', "9" * 5000, "\ufeff", "é", "\x85", "\u2028",
)  # fmt: skip
texts = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
contents = st.one_of(st.binary(max_size=80), texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.sampled_from([0, 1, 2, 10**7, 10**9]), st.floats(), texts,
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < DEEPEST and all(isinstance(k, str) and is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return depth < DEEPEST and all(is_plain(item, depth + 1) for item in value)
    if isinstance(value, float):
        return value - value == 0
    if isinstance(value, int):
        return abs(value) <= LARGEST_INTEGER
    return value is None or isinstance(value, str)


def one_line_or_value(call: Callable[[], Any]) -> Any:
    """The value, or None after a UserError of whole lines. Anything else that is raised fails the test."""
    try:
        return call()
    except UserError as error:
        assert error.problems and all(len(problem.splitlines()) == 1 for problem in error.problems)
        return None


@pytest.mark.parametrize("parse", [parse_json, parse_yaml])
def test_any_bytes(parse: Callable[[bytes], Any]) -> None:
    seen = []

    @fixed
    @given(st.one_of(contents, values.map(lambda value: json.dumps(value).encode())))
    def check(content: bytes) -> None:
        try:
            value = parse(content)
        except ParseError as error:
            seen.append(False)
            assert str(error) and "\n" not in str(error)
        else:
            seen.append(True)
            assert is_plain(value)

    check()
    assert {True, False} == set(seen), "only one of the two outcomes was tried"


@fixed
@given(values)
def test_any_value_is_read_as_it_was_or_refused(value: Any) -> None:
    try:
        text = json.dumps(value)
        assert parse_json(text) == value
    except ParseError:
        assert not is_plain(value) or "\\ud" in text.lower()


@fixed
@given(st.text())
def test_any_text_is_shown_as_lines(text: str) -> None:
    assert len(f"x{one_line(text)}".splitlines()) == 1 and one_line(text).isprintable() is not None
    assert len(lines_of(text).split("\n")) == len(text.split("\n"))
    one_line(text).encode("utf-8")


def in_a_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    def call(content: bytes) -> Any:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / name
            path.write_bytes(content)
            return one_line_or_value(lambda: read(path))

    return call


def recipe(path: Path) -> Any:
    return parse_run(Parser(), ["--config", str(path)])


def prompts(path: Path) -> Any:
    return list(read_jsonl(path.read_text(errors="replace").splitlines(), "file", 4, 4))


def tensors(path: Path) -> Any:
    with open_safetensors(path.parent) as opened:
        return opened.shapes


READERS = {
    "recipe": in_a_file("r.yaml", recipe),
    "mixture": in_a_file("m.yaml", read_mixture),
    "cluster": in_a_file("c.yaml", lambda path: read_cluster(str(path))),
    "log": in_a_file("log.jsonl", lambda path: read_log(path.parent)),
    "tokenizer": in_a_file("tokenizer.json", lambda path: read_tokens(path.parent)),
    "tokenizer_config": in_a_file("tokenizer_config.json", lambda path: read_tokens(path.parent)),
    "vocabulary": in_a_file("vocab.json", lambda path: read_tokens(path.parent)),
    "readme": in_a_file("README.md", lambda path: read_license(path.parent)),
    "prompts": in_a_file("p.jsonl", prompts),
    "safetensors": in_a_file("model.safetensors", tensors),
    "idx": in_a_file("t.idx", lambda path: (path.with_suffix(".bin").write_bytes(b"x" * 64), TokenFile(path.with_suffix("")))),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_any_file(name: str) -> None:
    heads = {
        "safetensors": lambda text: len(text).to_bytes(8, "little") + text + b"\0" * 16,
        "idx": lambda text: b"MMIDIDX\0\0" + text,
    }
    dress = heads.get(name, lambda text: text)

    @fixed
    @given(st.one_of(contents, values.map(lambda value: json.dumps(value).encode())).map(dress))
    def check(content: bytes) -> None:
        READERS[name](content)

    check()


SHAPES = {
    "recipe": {"lr": 1e-4, "lr_mult": {"mlp": 0.1}, "save": "x", "bf16": True, "objective": "mdlm", "recompute_modules": ["mlp"]},
    "mixture": {"sources": {"a": {"train_path": "x", "valid_path": "y", "weight": 1, "max_epochs": 2, "hub": {"dataset": "d"}}}},
    "cluster": {"gpu": "x", "gpus_per_node": 8, "memory_gib": 79.1, "bf16_tflops": 1.0, "fp8_tflops": 1.0, "compute_capability": 9.0,
                "memory_gb_per_s": 1.0, "nvlink_domain": 8, "nvlink_gb_per_s": 1.0, "network_gb_per_s": 1.0, "price_per_gpu_hour": 1.0},
    "log": {"kind": "train", "iteration": 1, "source": "a", "settings": {"grafting_iters": 1}},
    "tokenizer": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "b"}]},
    "tokenizer_config": {"added_tokens_decoder": {"1": {"content": "b"}}, "mask_token": "b"},
    "vocabulary": {"a": 0},
    "prompts": {"prefix": "a", "suffix": "b", "hole_length": 2},
    "safetensors": {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}},
}  # fmt: skip


def with_one_changed(shape: Any, place: int, value: Any, removed: bool) -> Any:
    """A copy of `shape` in which the member at `place`, counted over all levels, is `value` or missing."""
    copy = json.loads(json.dumps(shape))
    places: list[tuple[Any, Any]] = []

    def walk(item: Any) -> None:
        for key in list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ():
            places.append((item, key))
            walk(item[key])

    walk(copy)
    holder, key = places[place % len(places)]
    if removed:
        del holder[key]
    else:
        holder[key] = value
    return copy


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_with_one_odd_value(name: str) -> None:
    @fixed
    @given(st.integers(0, 40), values, st.booleans())
    def check(place: int, value: Any, removed: bool) -> None:
        text = json.dumps(with_one_changed(SHAPES[name], place, value, removed)).encode()
        READERS[name](len(text).to_bytes(8, "little") + text + b"\0" * 16 if name == "safetensors" else text)

    check()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_configuration_with_one_odd_value(kind: str) -> None:
    good = hub_config(kind)
    assert model_config_from_hf(good, "config.json").num_layers > 0

    @fixed
    @given(st.integers(0, 40), values, st.booleans())
    def check(place: int, value: Any, removed: bool) -> None:
        config = with_one_changed(good, place, value, removed)
        one_line_or_value(lambda: model_config_from_hf(config, "config.json"))

    check()


@fixed
@given(
    st.dictionaries(st.sampled_from(["lr", "lr_mult", "objective", "seed", "load", "recompute_modules", "x"]), values)
)
def test_any_record_of_settings(record: dict[str, Any]) -> None:
    found, wrong = recorded_settings(record)
    assert set(found) | set(wrong) == set(record) - {"x"} and not set(found) & set(wrong)
