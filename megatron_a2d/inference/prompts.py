"""Prompts: texts with holes to fill, and their token sequences with masks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from megatron_a2d.utils.errors import UserError, nearest
from megatron_a2d.utils.parsing import ParseError, parse_json

if TYPE_CHECKING:
    from megatron_a2d.inference.loaded_model import LoadedModel

# <|hole:16|> in a text stands for 16 masked tokens.
_HOLE = re.compile(r"<\|hole:(-?\d{1,9})\|>")
_HOLE_BEGIN = "<|hole:"
_JSON_KEYS = ("prompt", "max_new_tokens", "prefix", "suffix", "hole_length", "infill")
# Further keys allowed with each kind of record.
_JSON_KINDS = {"prompt": ("max_new_tokens",), "prefix": ("suffix", "hole_length"), "infill": ()}


class Prompt(NamedTuple):
    """A sequence of texts (str) and hole lengths (int); `where` names the source in error messages."""

    parts: tuple[str | int, ...]
    where: str


def completion(text: str, max_new_tokens: int, where: str) -> Prompt:
    return Prompt((text, max_new_tokens), where)


def infill(text: str, where: str) -> Prompt:
    """A text with holes written <|hole:N|>, any number of them."""
    split = _HOLE.split(text)
    parts = [int(part) if index % 2 else part for index, part in enumerate(split)]
    prompt = Prompt(tuple(part for part in parts if part != ""), where)
    for length in (part for part in prompt.parts if isinstance(part, int)):
        if length < 1:
            raise UserError(f"{where}: has a hole of length {length}; a hole needs at least 1 token")
    if any(_HOLE_BEGIN in part for part in prompt.parts if isinstance(part, str)):
        raise UserError(f"{where}: has a hole that is not of the form <|hole:16|>; write its length like this")
    if not any(isinstance(part, int) for part in prompt.parts):
        raise UserError(f"{where}: has no hole; write <|hole:16|> where 16 tokens are to be filled in")
    return prompt


def read_jsonl(lines: Iterable[str], name: str, max_new_tokens: int, hole_length: int) -> Iterator[Prompt]:
    """One prompt per line: {"prompt": ...}, {"prefix": ..., "suffix": ...} or {"infill": "... <|hole:8|> ..."}.

    "max_new_tokens" and "hole_length" override the flags. Raises UserError at the first bad line.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _from_json(line, f"{name} line {number}", max_new_tokens, hole_length)


def _from_json(line: str, where: str, max_new_tokens: int, hole_length: int) -> Prompt:
    try:
        record = parse_json(line)
    except ParseError as error:
        raise UserError(f"{where}: is not JSON ({error}); give one object per line") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: is not an object; write {{"prompt": "..."}}')
    for key in record:
        if key not in _JSON_KEYS:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, _JSON_KEYS)}; keys are {', '.join(_JSON_KEYS)}")
    kinds = [key for key in _JSON_KINDS if key in record]
    if len(kinds) != 1:
        raise UserError(f"{where}: give exactly one of prompt, prefix (with suffix) and infill")
    for key in record:
        if key not in (kinds[0], *_JSON_KINDS[kinds[0]]):
            raise UserError(f"{where}: {key} has no effect with {kinds[0]}; remove it")
    for key in ("prompt", "prefix", "suffix", "infill"):
        if key in record and (not isinstance(record[key], str) or not record[key]):
            raise UserError(f"{where}: {key} must be a non-empty string")
    for key in ("max_new_tokens", "hole_length"):
        if key in record and (isinstance(record[key], bool) or not isinstance(record[key], int) or record[key] < 1):
            raise UserError(f"{where}: {key} is {record[key]!r}; it must be an integer, at least 1")
    if kinds == ["prompt"]:
        return completion(record["prompt"], record.get("max_new_tokens", max_new_tokens), where)
    if kinds == ["infill"]:
        return infill(record["infill"], where)
    if "suffix" not in record:
        raise UserError(f"{where}: a prefix needs a suffix; give prompt to continue a text")
    return Prompt((record["prefix"], record.get("hole_length", hole_length), record["suffix"]), where)


def to_row(prompt: Prompt, loaded: LoadedModel, reserve: int | None = None) -> list[int]:
    """The token sequence to denoise: the tokens of the texts, and a mask token per position of a hole.

    `reserve`: a token that replaces the last mask of a final hole, as in the public RND1 package.
    """
    row: list[int] = []
    holes = sum(part for part in prompt.parts if isinstance(part, int))
    if holes > loaded.max_positions:  # before allocating them
        raise _too_long(prompt, holes, loaded)
    for part in prompt.parts:
        if isinstance(part, int):
            row += [loaded.mask_token_id] * part
            continue
        if any("\ud800" <= character <= "\udfff" for character in part):
            raise UserError(f"{prompt.where}: holds bytes or surrogates that are not valid UTF-8; give another text")
        tokens = loaded.encode(part)
        if not tokens:
            raise UserError(f"{prompt.where}: {part!r} has no tokens under this tokenizer; give another text")
        if loaded.mask_token_id in tokens:
            raise UserError(f"{prompt.where}: contains the mask token; write the text without it")
        row += tokens
    if loaded.label_shift and row[0] == loaded.mask_token_id:
        raise UserError(
            f"{prompt.where}: begins with a hole, and this model predicts each token from the one before; "
            "begin with text"
        )
    if reserve is not None:
        if row[-2:] != [loaded.mask_token_id] * 2:
            raise UserError(
                f"{prompt.where}: --reserve-last needs a text that ends with a hole of 2 tokens or more; lengthen it"
            )
        row[-1] = reserve
    if len(row) > loaded.max_positions:
        raise _too_long(prompt, len(row), loaded)
    return row


def _too_long(prompt: Prompt, length: int, loaded: LoadedModel) -> UserError:
    return UserError(
        f"{prompt.where}: {length} tokens in all, and the model has {loaded.max_positions} positions; shorten it"
    )
