"""Registration of the mask token in an export's tokenizer, so that `tokenizer.mask_token_id` matches config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_a2d.conversion.mask_token import MASK_TOKEN, read_tokens
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer

_KIND = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def register_mask_token(directory: Path, mask_token_id: int, new_name: str = MASK_TOKEN) -> None:
    """Make `mask_token_id` the mask token of the tokenizer in `directory`, in place.

    It is named `new_name` if it has no name. No other token's id changes. Does nothing without a tokenizer; UserError
    if this kind of tokenizer cannot assign that id.
    """
    tokens = read_tokens(directory)
    if not tokens:
        return
    is_new = mask_token_id not in tokens
    free = (name for name in (new_name, f"<|mask:{mask_token_id}|>") if name not in tokens.values())
    name = next(free) if is_new else tokens[mask_token_id]
    if (path := directory / "tokenizer.json").exists():
        _add(path, name, mask_token_id)
    _declare(directory, name, mask_token_id, is_new)


def _declare(directory: Path, name: str, mask_token_id: int, is_new: bool) -> None:
    """Declare it in the files next to tokenizer.json, where present; tokenizer_config.json is created if missing."""
    path = directory / "tokenizer_config.json"
    settings = read_json(path, "the tokenizer's configuration") if path.exists() else {}
    settings["mask_token"] = name
    if is_new and (settings.get("added_tokens_decoder") or not (directory / "tokenizer.json").exists()):
        known = settings.get("added_tokens_decoder") or {}
        settings["added_tokens_decoder"] = known | {str(mask_token_id): {"content": name, **_KIND}}
    _write(path, settings)
    for path, entry in (
        (directory / "special_tokens_map.json", {"mask_token": name}),
        (directory / "added_tokens.json", {name: mask_token_id} if is_new else {}),
    ):
        if path.exists() and entry:
            _write(path, read_json(path, "the tokenizer's tokens") | entry)


def _add(path: Path, name: str, mask_token_id: int) -> None:
    """Add it to tokenizer.json as a special token with that id, unless it is already there."""
    before = read_tokenizer(path, str(path)).get_vocab(with_added_tokens=True)
    if before.get(name) == mask_token_id:
        return
    content = read_json(path, "the tokenizer")
    others = (item for item in content.get("added_tokens") or [] if item["content"] != name)
    added = content["added_tokens"] = [item | {"id": before[item["content"]]} for item in others]
    vocabulary = content["model"].get("vocab")
    # The library assigns the next free id. Where that is another one, the id must be in the model's vocabulary, and
    # then so must those of all added tokens, because free ids are counted from the vocabulary's size.
    largest = max([-1, *(item["id"] for item in added)])
    if isinstance(vocabulary, dict) and mask_token_id != max(len(vocabulary), largest + 1):
        vocabulary |= {item["content"]: item["id"] for item in added} | {name: mask_token_id}
    added.append({"id": mask_token_id, "content": name, **_KIND})
    added.sort(key=lambda item: item["id"])
    _write(path, content)
    if read_tokenizer(path, str(path)).get_vocab(with_added_tokens=True) != before | {name: mask_token_id}:
        raise UserError(
            f"{path.name}: a mask token of id {mask_token_id} cannot be added to this tokenizer; convert the model "
            f"again with --mask-token-id {max(before.values()) + 1}, or add a token {MASK_TOKEN} to its tokenizer"
        )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
