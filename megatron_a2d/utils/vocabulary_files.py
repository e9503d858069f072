"""A tokenizer from vocab.json and merges.txt, for models that were published without tokenizer.json (Dream-v0).

Of the supported families only Qwen's and those made from it have these files, so the rule by which text is split into
words before merging is Qwen2's (transformers' Qwen2Tokenizer).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILES = ("vocab.json", "merges.txt")
# Contractions, words, single digits, punctuation, line ends, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def has_vocabulary_files(directory: Path) -> bool:
    """Whether a directory has these files and no tokenizer.json."""
    return not (directory / "tokenizer.json").exists() and all((directory / name).is_file() for name in FILES)


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer that the files describe, with the added tokens of tokenizer_config.json under their ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        tokenizer = Tokenizer(models.BPE.from_file(*(str(directory / name) for name in FILES)))
    except Exception as error:  # the library raises plain exceptions for whatever is wrong with the files
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{directory}: {' and '.join(FILES)} cannot be read ({reason}); fetch them again") from None
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated", invert=False)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    for token_id, settings in _added(directory):
        _add(tokenizer, token_id, settings, directory)
    return tokenizer


def _added(directory: Path) -> list[tuple[int, dict[str, Any]]]:
    """(id, settings) of the added tokens, by rising id."""
    path = directory / "tokenizer_config.json"
    declared = read_json(path, "the tokenizer's configuration").get("added_tokens_decoder") if path.exists() else None
    try:
        return sorted((int(i), dict(settings)) for i, settings in (declared or {}).items())
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: added_tokens_decoder does not list tokens by id; fetch it again") from None


def _add(tokenizer: Tokenizer, token_id: int, settings: dict[str, Any], directory: Path) -> None:
    """Add a token; UserError unless it gets its id, the next free one."""
    from tokenizers import AddedToken

    flags = {name: bool(settings.get(name)) for name in ("lstrip", "normalized", "rstrip", "single_word", "special")}
    content = str(settings.get("content"))
    tokenizer.add_tokens([AddedToken(content, **flags)])
    if tokenizer.token_to_id(content) != token_id:
        raise UserError(
            f"{directory}: tokenizer_config.json gives {content!r} the id {token_id}, and after vocab.json it has "
            f"{tokenizer.token_to_id(content)}; use the files of one model"
        )
