"""Parsers for untrusted JSON and YAML.

Both libraries accept more than a settings file may hold, and fail in more ways than their documentation lists:
RecursionError for deep nesting, ValueError for numbers of thousands of digits, KeyError or AttributeError for a tag
that does not fit its value. Here all of these are `ParseError`. The result consists of dict (with str keys), list, str,
int up to 2**64, finite float, bool and None, at most `DEEPEST` levels deep.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

import yaml

DEEPEST = 64  # levels of nesting
LARGEST_INTEGER = 2**64 - 1
LONGEST_NUMBER = 100  # characters, in YAML
MOST_VALUES = 100_000  # of a YAML file with aliases, each counted as often as it is referred to

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class ParseError(ValueError):
    """The text is not what it should be; the message says why, in a few words."""


def parse_json(content: str | bytes, allow_nonfinite: bool = False) -> Any:
    """Parse JSON. `allow_nonfinite` accepts NaN and infinities, which logs of crashed runs may contain."""
    try:
        text = content if isinstance(content, str) else decode(content)
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ParseError(f"nested more than {DEEPEST} levels deep") from None
    except ValueError as error:
        raise ParseError(_in_a_line(error)) from None
    _check(value, allow_nonfinite)
    return value


def parse_yaml(content: str | bytes, aliases: bool = False) -> Any:
    """Parse YAML. Aliases are rejected, because a few of them can expand a small file to a huge value; `aliases` allows
    them, as programs write them for an object that they refer to twice, up to MOST_VALUES."""
    loader = _AliasLoader if aliases else _Loader
    try:
        value = yaml.load(content if isinstance(content, str) else decode(content), loader)
    except RecursionError:
        raise ParseError(f"nested more than {DEEPEST} levels deep") from None
    # A tag that does not fit its value (`!!int x`) makes the constructor raise all kinds of errors.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ParseError(_in_a_line(error)) from None
    _check(value, allow_nonfinite=False, most=MOST_VALUES if aliases else None)
    return value


def decode(content: bytes) -> str:
    """Decode UTF-8; ParseError names the first invalid byte."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParseError(f"not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


class _Loader(yaml.SafeLoader):
    """YAML without aliases, duplicate keys or deep nesting; dates stay strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the library's own attribute)
        first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth, _has_aliases = 0, False

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent) and not self._has_aliases:
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"alias *{event.anchor}: write it out", event.start_mark)
        self._depth += 1
        if self._depth > DEEPEST + 1:
            raise RecursionError
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} comes twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _AliasLoader(_Loader):
    """The same with aliases, but without merges (`<<`), which copy what they refer to."""

    _has_aliases = True

    def flatten_mapping(self, node: Any) -> None:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "a merge (<<): write it out", key.start_mark)


def _number(loader: _Loader, node: Any) -> Any:
    if ":" in node.value:  # 1:30, a schedule here, is 90 in YAML 1.1 (base 60) and text in 1.2
        return node.value
    if len(node.value) > LONGEST_NUMBER:
        raise yaml.constructor.ConstructorError(None, None, "a number is too long", node.start_mark)
    is_int = node.tag == "tag:yaml.org,2002:int"
    return loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _number)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ParseError(f"{twice!r} comes twice")
    return values


def _check(value: Any, allow_nonfinite: bool, most: int | None = None) -> None:
    """ParseError if `value` holds anything but the types above, or more than `most` values. Not recursive."""
    level, count = [value], 0
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for item in level:
            count += len(item) if isinstance(item, dict | list) else 0
            if most is not None and count > most:
                raise ParseError(f"it holds more than {most:,} values")
            if isinstance(item, dict):
                for key in item:
                    if not isinstance(key, str):
                        raise ParseError(f"the key {key!r} is not text; write it in quotes")
                    _check_text(key)
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                _check_text(item)
            elif isinstance(item, float):
                if not (allow_nonfinite or math.isfinite(item)):
                    raise ParseError(f"{item} is not a finite number")
            elif isinstance(item, int):
                if abs(item) > LARGEST_INTEGER:
                    raise ParseError("a number is larger than 2**64")
            elif item is not None:
                raise ParseError(f"a value is a {type(item).__name__}; write text, numbers, lists and mappings")
        if not below:
            return
        level = below
    raise ParseError(f"nested more than {DEEPEST} levels deep")


def _check_text(text: str) -> None:
    if not text.isascii() and _HALF_CHARACTER.search(text):
        raise ParseError("a text holds half of a surrogate pair")


def _in_a_line(error: Exception) -> str:
    """The library's error message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
