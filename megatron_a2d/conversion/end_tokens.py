"""End-of-text tokens of an HF model or checkpoint, for sampling, evaluation and exports.

They come from three sources, none of which is complete. A Qwen3 chat model has `<|im_end|>` in config.json, and both it
and `<|endoftext|>` in generation_config.json; data_prep ends each document with `<|endoftext|>` (or the tokenizer's
eos_token), which is what a model sees in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.conversion.mask_token import read_tokenizer_config, read_tokens
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class EndTokens(NamedTuple):
    """Token ids. A text ends at the first token that is in `ids` (empty if no file lists one; config.json's first)."""

    ids: tuple[int, ...]
    document: int | None  # the document separator of training data, also the empty context


def read_end_tokens(directory: Path, vocab_size: int, config: Mapping[str, Any] | None = None) -> EndTokens:
    """The end tokens of the HF directory `directory`, of which `config` is the config.json if that is not there.

    UserError for an id outside the model's vocabulary.
    """
    config = config or read_json(directory / "config.json", "the model's configuration")
    found = listed(config, directory / "config.json", vocab_size)
    generation = directory / "generation_config.json"
    if generation.exists():
        found += listed(read_json(generation, "the generation configuration"), generation, vocab_size)
    ids = {token: i for i, token in read_tokens(directory).items() if i < vocab_size}
    document = end_of_document(ids.get, read_tokenizer_config(directory))
    ids_of_texts = tuple(dict.fromkeys(found if document is None else [*found, document]))
    return EndTokens(ids_of_texts, document if document is not None else next(iter(ids_of_texts), None))


def listed(config: Mapping[str, Any], path: Path, vocab_size: int) -> list[int]:
    """eos_token_id of a configuration (an id, a list of ids or absent) as a list. UserError for anything else."""
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < vocab_size:
            raise UserError(
                f"{path}: eos_token_id is {value!r}, and {item!r} is not a token of the model (0 to {vocab_size - 1}); "
                "write the ids of the tokens that end a text"
            )
    return list(values)


def end_of_document(id_of: Callable[[str], int | None], tokenizer_config: Mapping[str, Any]) -> int | None:
    """The token that data_prep appends to each document; None if the tokenizer has none.

    The eos token of Qwen3's chat models is <|im_end|>, yet documents end with <|endoftext|> for these too.
    """
    found = id_of(END_OF_TEXT)
    if found is not None:
        return found
    eos = tokenizer_config.get("eos_token")
    name = eos.get("content") if isinstance(eos, dict) else eos
    return id_of(name) if isinstance(name, str) else None
