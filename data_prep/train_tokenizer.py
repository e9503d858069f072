"""Training of a byte-level BPE tokenizer with Qwen3's splitting pattern and special tokens.

    python -m data_prep.train_tokenizer --input corpus.jsonl --vocab-size 4096 --out tokenizer

`--vocab-size` is the number of rows of the model's embedding. As in Qwen3, the trained tokens come first, then the
special tokens, and the last `--reserved-tokens` rows belong to no token: conversion makes the
first of them the mask token. The output is a Hugging Face tokenizer directory. The same input gives the
same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data_prep.corpus_files import find_inputs
from data_prep.corpus_shards import Counts, read_documents
from data_prep.encoders import END_OF_TEXT
from data_prep.memory_limits import add_limits, read_limits
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point, human, progress
from megatron_a2d.utils.atomic_write import new_directory, write_json
from megatron_a2d.utils.errors import UserError

# Qwen's pattern: contractions, words with one leading mark or space, single digits, punctuation, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3's added tokens in the order of their ids. Control tokens are dropped when text is decoded without
# special tokens; markup tokens are kept, because they are part of the model's output.
LARGEST_VOCABULARY = 4_194_304  # ten times that of the largest models
CONTROL_TOKENS = (
    END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MARKUP_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
NUM_BYTES = 256  # every byte is a token, so any text can be encoded


def train(texts: Iterator[str], num_tokens: int) -> Tokenizer:
    """A tokenizer of `num_tokens` tokens, the special ones included. Raises UserError on too little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    num_trained = num_tokens - len(CONTROL_TOKENS) - len(MARKUP_TOKENS)
    trainer = trainers.BpeTrainer(
        vocab_size=num_trained,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < num_trained:
        raise UserError(
            f"--input: this text yields only {tokenizer.get_vocab_size()} of {num_trained} trained tokens; "
            "give more text or a smaller --vocab-size"
        )
    # Added one at a time, so that the ids follow the order.
    for token in CONTROL_TOKENS:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    for token in MARKUP_TOKENS:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return tokenizer


def hf_configuration(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`, with Qwen3-Base's choices."""
    added = {
        str(token_id): {
            "content": token.content, "special": token.special,
            "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }  # fmt: skip
    return {
        "tokenizer_class": "Qwen2TokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "unk_token": None,
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m data_prep.train_tokenizer", description="Train a byte-level BPE tokenizer of Qwen3's kind."
    )
    parser.add_argument(
        "--input", required=True, nargs="+", action="extend", type=Path, help="files, directories or globs"
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys or columns of the text")
    parser.add_argument("--vocab-size", type=int, default=4096, help="rows of the model's embedding")
    parser.add_argument("--reserved-tokens", type=int, default=8, help="unused rows at the end")
    parser.add_argument("--out", required=True, type=Path, help="output directory")
    add_limits(parser)
    arguments = parser.parse_args(argv)
    limits = read_limits(arguments)
    if arguments.reserved_tokens < 1:
        raise UserError(f"--reserved-tokens {arguments.reserved_tokens}: the mask token needs a row; give 1 or more")
    num_tokens = arguments.vocab_size - arguments.reserved_tokens
    smallest = NUM_BYTES + len(CONTROL_TOKENS) + len(MARKUP_TOKENS)
    if num_tokens < smallest:
        raise UserError(
            f"--vocab-size {arguments.vocab_size}: too small for {smallest} bytes and special tokens and "
            f"{arguments.reserved_tokens} reserved rows; give {smallest + arguments.reserved_tokens} or more"
        )
    if arguments.vocab_size > LARGEST_VOCABULARY:  # the trainer allocates memory for all of it, or aborts the process
        raise UserError(f"--vocab-size {arguments.vocab_size}: must be at most {LARGEST_VOCABULARY:,}")
    with new_directory(arguments.out, "--out") as partial:
        counts = Counts()
        inputs = find_inputs(arguments.input)
        inputs.show_passed_over()
        size = len(arguments.json_keys) * sum(path.stat().st_size for path in inputs.paths)
        with progress("train tokenizer", size, "B") as advance:

            def texts() -> Iterator[str]:
                for json_key in arguments.json_keys:
                    for document in read_documents(arguments.input, json_key, counts, limits):
                        advance(document.num_bytes)
                        yield document.text

            tokenizer = train(texts(), num_tokens)
        tokenizer.save(str(partial / "tokenizer.json"))
        write_json(partial / "tokenizer_config.json", hf_configuration(tokenizer))
    console.print(
        f"{arguments.out}: {num_tokens} tokens, {arguments.reserved_tokens} reserved rows "
        f"({num_tokens}..{arguments.vocab_size - 1}), from {human(counts.documents)} documents"
    )


if __name__ == "__main__":
    entry_point(main)
