"""Holes in held-out text, filled by a model before and after conversion: the last part of `make demo`.

    python -m launch.held_out_holes --data demo_run/corpus_valid --tokenizer demo_run/tokenizer --out demo_run/holes
    python -m megatron_a2d.generate --model MODEL --input demo_run/holes/holes.jsonl --jsonl --greedy > after.jsonl

OUT/holes.jsonl is the input of generate, OUT/truth.jsonl the original text of the holes.

A hole is the middle HOLE_LENGTH tokens of a held-out document, with context on both sides. Documents are taken in the
order of the file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from megatron_a2d.config.cli import Parser
from megatron_a2d.data.indexed_dataset import TokenFile
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.tokenizer import read_tokenizer

HOLE_LENGTH, CONTEXT, NUM_HOLES = 6, 48, 100


class Filled(NamedTuple):
    """A hole as two models fill it; `right_...` counts the positions, of HOLE_LENGTH, that equal the original text."""

    prefix: str
    truth: str
    suffix: str
    before: str
    after: str
    right_before: int
    right_after: int


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m launch.held_out_holes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="prefix of the held-out token file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="output directory of holes.jsonl and truth.jsonl")
    options = parser.parse_args(argv)
    tokenizer = read_tokenizer(options.tokenizer / "tokenizer.json", "--tokenizer")
    options.out.mkdir(parents=True)
    holes = list(make_holes(TokenFile(options.data), tokenizer))
    for name, keys in (("holes", ("prefix", "suffix", "hole_length")), ("truth", ("prefix", "truth", "suffix"))):
        with new_file(options.out / f"{name}.jsonl") as partial:
            partial.write_text("".join(json.dumps({key: hole[key] for key in keys}) + "\n" for hole in holes))


def make_holes(file: TokenFile, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """{"prefix", "truth", "suffix", "hole_length"} for the first NUM_HOLES documents that are long enough."""
    made = 0
    for number in range(file.num_documents):
        tokens = file.document(number)
        start = len(tokens) // 2
        if len(tokens) < 2 * CONTEXT + HOLE_LENGTH + 1:  # one for the end-of-document token
            continue
        borders = (start - CONTEXT, start, start + HOLE_LENGTH, start + HOLE_LENGTH + CONTEXT)
        parts = [tokenizer.decode(tokens[a:b].tolist()) for a, b in itertools.pairwise(borders)]
        if any("\ufffd" in part or not part for part in parts):
            continue  # the cut is inside a character
        yield dict(zip(("prefix", "truth", "suffix"), parts, strict=True), hole_length=HOLE_LENGTH)
        made += 1
        if made == NUM_HOLES:
            return


def compare(truth: Path, before: Path, after: Path, tokenizer: Tokenizer) -> list[Filled]:
    """All holes with both models' answers, in order."""
    lines = ([json.loads(line) for line in path.read_text().splitlines()] for path in (truth, before, after))
    filled = []
    for hole, *answers in zip(*lines, strict=True):
        prefix, text, suffix = hole["prefix"], hole["truth"], hole["suffix"]
        texts = [answer["text"][len(prefix) : len(answer["text"]) - len(suffix)] for answer in answers]
        wanted = tokenizer.encode(text, add_special_tokens=False).ids
        right = [
            sum(a == b for a, b in zip(tokenizer.encode(text, add_special_tokens=False).ids, wanted, strict=False))
            for text in texts
        ]
        filled.append(Filled(prefix, text, suffix, *texts, *right))
    return filled


def most_improved(filled: list[Filled]) -> Filled:
    """The hole with the largest gain in correct tokens through conversion; the first of several."""
    return max(filled, key=lambda hole: hole.right_after - hole.right_before)


if __name__ == "__main__":
    entry_point(main)
