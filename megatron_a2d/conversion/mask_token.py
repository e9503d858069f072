"""The mask token: its id, and its name in an export's tokenizer.

Qwen3's embedding has more entries than its tokenizer has tokens (151936 and 151669), so the mask uses an unused id and
nothing is resized. RND1 uses the first unused id, 151669; so do we, unless the tokenizer already has a mask token.
Llama's tokenizers use every id, but not every token is one of text: Llama 3 has reserved ones, and Llama 2, which
spells unknown characters by bytes, never needs its unknown token.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_a2d.families.registry import declared_mask_token, matching_kinds, read_config
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer

MASK_TOKEN = "<|mask|>"
_RESERVED = re.compile(r"<\|?(?:reserved(?:_special)?_token_?|unused_?|extra_)\d+\|?>")  # Llama 3: with "|"


def choose_mask_token(directory: Path, vocab_size: int, requested: int | None, configured: int | None) -> int:
    """The mask token id for the model in `directory`: `requested` (--mask-token-id), else `configured` (its
    config.json), else the tokenizer's mask token, else the first id that its tokenizer does not use, else the first of
    a token that no text has.

    Raises UserError when the choice is outside the embedding or is a token of ordinary text.
    """
    tokens = read_tokens(directory)
    beyond = [i for i in tokens if i >= vocab_size]
    if beyond:
        raise UserError(
            f"{directory}: its tokenizer goes up to id {max(beyond)}, but the embedding has {vocab_size} "
            "entries; use the tokenizer that belongs to the weights"
        )
    where = f"--mask-token-id {requested}"
    if requested is None:
        requested, where = configured, f"{directory / 'config.json'}: mask_token_id {configured}"
    if requested is None:
        own = _declared(directory, tokens)
        return _first_unused(directory, tokens, vocab_size) if own is None else own
    if not isinstance(requested, int) or isinstance(requested, bool) or not 0 <= requested < vocab_size:
        raise UserError(f"{where}: is outside the embedding; choose an id from 0 to {vocab_size - 1}")
    # That of a diffusion model may be declared nowhere but in config.json (LLaDA: <|mdm_mask|>).
    is_own = requested == configured and "mask" in tokens.get(requested, "").lower()
    if is_in_text(directory, requested, tokens) and not is_own:
        raise UserError(
            f"{where}: is the token {tokens[requested]!r}, which text uses; choose an unused id"
            + (f", such as {free}" if (free := _free(directory, tokens, vocab_size)) is not None else "")
        )
    return requested


def is_in_text(directory: Path, token_id: int, tokens: dict[int, str]) -> bool:
    """Whether a text may have this token; `tokens` are those of the tokenizer of `directory`."""
    token = tokens.get(token_id)
    if token is None or token in mask_token_names(directory):
        return False
    return token_id not in _not_in_text(directory, tokens)


def read_tokens(directory: Path) -> dict[int, str]:
    """id -> token of all tokens that the tokenizer of `directory` can produce; empty if there is none."""
    try:
        return {int(i): str(token) for i, token in _pairs(directory)}
    except (TypeError, ValueError, AttributeError, LookupError):
        raise UserError(f"{directory}: its tokenizer has an id that is not a number; fetch it again") from None


def _pairs(directory: Path) -> list[tuple[Any, Any]]:
    """(id, token) from the files of a tokenizer."""
    pairs: list[tuple[Any, Any]] = []
    if (directory / "tokenizer.json").exists():
        content = read_json(directory / "tokenizer.json", "the tokenizer")
        vocabulary = _member(content.get("model"), "vocab")
        if isinstance(vocabulary, dict):
            pairs += [(i, token) for token, i in vocabulary.items()]
        elif isinstance(vocabulary, list):  # unigram: [token, score], the id is the position
            pairs += [(i, item[0]) for i, item in enumerate(vocabulary)]
        else:
            raise UserError(f"{directory / 'tokenizer.json'}: has no vocabulary; fetch it again")
        added = [(_member(item, "id"), _member(item, "content")) for item in content.get("added_tokens") or []]
        if _is_counted(pairs, added):
            pairs += added
        else:
            found = read_tokenizer(directory / "tokenizer.json", f"{directory / 'tokenizer.json'}")
            pairs = [(i, token) for token, i in found.get_vocab(with_added_tokens=True).items()]
    elif (directory / "vocab.json").exists():
        for name in ("vocab.json", "added_tokens.json"):
            if (directory / name).exists():
                pairs += [(i, token) for token, i in read_json(directory / name, "the vocabulary").items()]
    declared = _member(read_tokenizer_config(directory), "added_tokens_decoder") or {}
    return pairs + [(i, _member(item, "content")) for i, item in declared.items()]


def _is_counted(vocabulary: list[tuple[Any, Any]], added: list[tuple[Any, Any]]) -> bool:
    """Whether the added tokens have the ids that the tokenizers library assigns: the vocabulary's, else the next free
    one. The library ignores any other id in the file."""
    ids = {str(token): i for i, token in vocabulary}
    largest = -1
    for i, token in added:
        if i != ids.get(str(token), max(len(ids), largest + 1)):
            return False
        largest = max(largest, i)
    return True


def _first_unused(directory: Path, tokens: dict[int, str], vocab_size: int) -> int:
    if not tokens:
        raise UserError(f"{directory}: has no tokenizer, so unused ids are unknown; give --mask-token-id")
    free = _free(directory, tokens, vocab_size)
    if free is not None:
        return free
    raise UserError(
        f"{directory}: its tokenizer uses all {vocab_size} ids of the embedding and has no mask token; "
        f"add a token {MASK_TOKEN} to it and extend the model's embedding"
    )


def _free(directory: Path, tokens: dict[int, str], vocab_size: int) -> int | None:
    """The first id that no text contains."""
    unused = next((i for i in range(vocab_size) if i not in tokens), None)
    return next(iter(_not_in_text(directory, tokens)), None) if unused is None else unused


def _not_in_text(directory: Path, tokens: dict[int, str]) -> list[int]:
    """Ids of tokens that exist and that no text is tokenized to: reserved ones, and one for unknown characters in a
    vocabulary that has every byte."""
    reserved = sorted(i for i, token in tokens.items() if _RESERVED.fullmatch(token))
    path = directory / "tokenizer.json"
    model = read_json(path, "the tokenizer").get("model") if path.exists() else None
    unknown = _member(model, "unk_token") if _member(model, "byte_fallback") is True else None
    return reserved + [i for i, token in tokens.items() if token == unknown]


def _declared(directory: Path, tokens: dict[int, str]) -> int | None:
    """The id of the tokenizer's mask token; None if it has none, or declares a name without an id."""
    id_of = {token: i for i, token in tokens.items()}
    return next((id_of[name] for name in mask_token_names(directory) if name in id_of), None)


def mask_token_names(directory: Path) -> list[str]:
    """The mask token's possible names: the one that the tokenizer's files declare, the family's, and ours."""
    names = [declared_mask_token(directory), MASK_TOKEN]
    if (directory / "config.json").exists():
        kinds = matching_kinds(read_config(directory))
        names[1:1] = [kind.family.diffusion.mask_token for kind in kinds if kind.family.diffusion]
    return [name for name in names if name is not None]


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    return read_json(path, "the tokenizer's configuration") if path.exists() else {}


def _member(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
