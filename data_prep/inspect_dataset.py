"""Inspection of token files: size, document lengths, and samples as training masks them.

    python -m data_prep.inspect_dataset --data-path data/corpus_train [--tokenizer tokenizer] [--show 2]

Samples are shown as a masked diffusion model is trained on them: shuffled, packed, masked (▒, in colour). `--times 0.2
0.8` shows each at these diffusion times; without it each sample has its own time, as in training. Every token is
read: a checksum mismatch, or a document without its end-of-document token, ends with exit code 2. `--plot out.png`
draws document lengths and token frequencies (needs the extra `plot`).
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_prep.encoders import Encoder, open_encoder
from megatron_a2d.config.cli import Parser
from megatron_a2d.data.checksums import REWRITE
from megatron_a2d.data.indexed_dataset import TokenFile, read_metadata
from megatron_a2d.data.packed_dataset import PackedDataset
from megatron_a2d.diffusion.rng import Noise
from megatron_a2d.terminal.console import PlainConsole, entry_point, human, progress
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import one_line

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
BAR_WIDTH = 40
MAX_VOCABULARY = 1 << 26  # bounds the memory of the counts


class Contents(NamedTuple):
    lengths: np.ndarray  # [num_documents] int64, tokens of each document
    counts: np.ndarray  # [max token id + 1] int64, how often each token occurs
    num_unclosed: int  # documents that do not end with the end-of-document token
    first_unclosed: int | None


def read_contents(file: TokenFile) -> Contents:
    """One pass over all tokens, which also verifies their checksums if the file has any."""
    counts = np.zeros(1, dtype=np.int64)
    lengths = file.document_lengths()
    ends = np.cumsum(lengths)
    unclosed: list[np.ndarray] = []
    start = 0
    with progress(Path(file.prefix).name, file.num_tokens * file.dtype.itemsize, "B") as advance:
        for tokens in file.chunks():
            if tokens.min() < 0:
                raise UserError(f"{file.prefix}: holds the negative token id {tokens.min()}; write the file again")
            if tokens.max() >= MAX_VOCABULARY:
                document = file.document_of(start + int(tokens.argmax()))
                raise UserError(
                    f"{file.prefix}: document {document} holds token id {tokens.max()}, larger than any vocabulary; "
                    "the file is damaged, write it again"
                )
            more = np.bincount(tokens, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
            if file.eod_token_id is not None:
                first, last = np.searchsorted(ends, [start, start + len(tokens)], side="right")
                here = np.arange(first, last)[lengths[first:last] > 0]
                unclosed.append(here[tokens[ends[here] - 1 - start] != file.eod_token_id])
            start += len(tokens)
            advance(len(tokens) * file.dtype.itemsize)
    wrong = np.concatenate([*unclosed, np.zeros(0, dtype=np.int64)])
    return Contents(lengths, counts, len(wrong), int(wrong[0]) if len(wrong) else None)


def integrity(file: TokenFile, contents: Contents) -> str:
    """One line on checksums, end-of-document tokens and empty documents."""
    sums = "all checksums match" if file.has_checksums else "no checksums (no .json, .sums)"
    empty = int((contents.lengths == 0).sum())
    closed = f"; all end with token {file.eod_token_id}" if file.eod_token_id is not None else ""
    return sums + (closed if not contents.num_unclosed else "") + (f"; {empty:,} empty" if empty else "")


def summary(file: TokenFile, contents: Contents) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    probabilities = contents.counts[contents.counts > 0] / file.num_tokens
    percentiles = np.percentile(contents.lengths, PERCENTILES)
    rows = {
        "documents": f"{file.num_documents:,}",
        "tokens": f"{file.num_tokens:,}",
        "size": f"{human(file.num_tokens * file.dtype.itemsize, 'B')} ({file.dtype.name})",
        "largest token id": f"{len(contents.counts) - 1:,}",
        "distinct tokens": f"{len(probabilities):,}",
        "unigram entropy": f"{-(probabilities * np.log(probabilities)).sum():.3f} nats/token",
        "mean tokens per document": f"{contents.lengths.mean():,.1f}",
        "percentiles " + " ".join(map(str, PERCENTILES)): "  ".join(f"{value:,.0f}" for value in percentiles),
    }
    rows["integrity"] = integrity(file, contents)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def histogram(lengths: np.ndarray) -> Table:
    """Histogram of document lengths; each bucket's bounds are twice the previous one's."""
    table = Table(title="tokens per document", box=None, show_header=False)
    buckets = np.frexp(lengths.astype(np.float64))[1]  # length in [2^(k-1), 2^k), 0 for an empty document
    counts = np.bincount(buckets)
    for bucket in range(int(buckets.min()), len(counts)):
        low, high = (2 ** (bucket - 1), 2**bucket - 1) if bucket else (0, 0)
        bar = "█" * int(np.ceil(BAR_WIDTH * counts[bucket] / counts.max()))
        table.add_row(f"{low:,} .. {high:,}", Text(bar, style="cyan"), f"{counts[bucket]:,}")
    table.columns[0].justify = table.columns[2].justify = "right"
    return table


def masked_text(tokens: np.ndarray, masked: np.ndarray, encoder: Encoder) -> Text:
    """The sample's text, with a coloured block for every masked character."""
    text = Text()
    for hidden, run in groupby(range(len(tokens)), key=lambda position: bool(masked[position])):
        part = encoder.decode([int(tokens[position]) for position in run])
        text.append("▒" * max(1, len(part)) if hidden else part, style="magenta" if hidden else "")
    return text


def samples(arguments: argparse.Namespace, encoder: Encoder, num_tokens: int) -> list[Panel]:
    """The first samples, each masked at every given time, or at the time that its index has in training."""
    dataset = PackedDataset(arguments.data_path, min(arguments.seq_length, num_tokens), vocab_size=encoder.vocab_size)
    noise = Noise(seed=0, mask_token_id=encoder.vocab_size)
    panels = []
    for index in range(min(arguments.show, dataset.num_samples)):
        tokens = dataset.tokens(index)
        for time in arguments.times or [noise.time(index)]:
            # The same uniforms for every time: a token masked at some t stays masked at larger t, as in the process.
            masked = noise.uniforms(index, len(tokens)) < noise.functions.mask_probability(time)
            masked[0] = False
            title = f"sample {index}: t = {time:.3f}, {int(masked.sum())} of {len(tokens)} tokens masked"
            panels.append(Panel(masked_text(tokens, masked, encoder), title=title, title_align="left"))
    return panels


def plot(path: Path, contents: Contents, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            f"--plot {path}: matplotlib is not installed; in the clone, pip install --editable '.[plot]'"
        ) from None
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: unknown image format; use .png, .pdf or .svg")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    lengths = np.maximum(contents.lengths, 1)
    axes[0].hist(lengths, bins=np.geomspace(lengths.min(), lengths.max() + 1, 40))
    axes[0].set(xscale="log", xlabel="tokens per document", ylabel="documents")
    axes[1].loglog(np.arange(1, len(contents.counts) + 1), np.sort(contents.counts)[::-1])
    axes[1].set(xlabel="token rank", ylabel="occurrences")
    figure.suptitle(one_line(title).replace("$", r"\$"))
    with new_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], dpi=150)


def find_tokenizer(arguments: argparse.Namespace) -> Path | None:
    """The tokenizer to show text with: --tokenizer, else the one in the token file's description."""
    if arguments.tokenizer is not None or not arguments.show:
        return arguments.tokenizer
    path = Path((read_metadata(arguments.data_path) or {}).get("tokenizer") or "")
    return path if path.name and path.exists() else None


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m data_prep.inspect_dataset", description="Inspect .bin/.idx token files.")
    parser.add_argument("--data-path", required=True, help="path without .bin and .idx")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer to decode with; default: the one that the data was made with"
    )
    parser.add_argument("--show", type=int, default=2, help="number of samples to show")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens per sample")
    parser.add_argument(
        "--times", type=float, nargs="+", metavar="T",
        help="show each sample at these diffusion times, from 0 (clean) to 1 (all masked); default: as in training",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="draw lengths and frequencies into this .png, .pdf or .svg")
    arguments = parser.parse_args(argv)
    for time in arguments.times or ():
        if not 0 <= time <= 1:
            raise UserError(f"--times {time}: is not a diffusion time; give 0 to 1")
    if arguments.show < 0:
        raise UserError(f"--show {arguments.show}: must not be negative; give 0 or more")
    if arguments.seq_length < 1:
        raise UserError(f"--seq-length {arguments.seq_length}: a sample needs tokens; give 1 or more")
    file = TokenFile(arguments.data_path)
    tokenizer = find_tokenizer(arguments)
    encoder = open_encoder(tokenizer, append_eod=False, workers=1) if tokenizer else None
    contents = read_contents(file)

    console = PlainConsole()
    console.print(summary(file, contents))
    console.print(histogram(contents.lengths))
    if encoder is not None:
        for panel in samples(arguments, encoder, file.num_tokens):
            console.print(panel)
    elif arguments.show:
        console.print("no tokenizer to show samples with; set it with --tokenizer")
    if arguments.plot is not None:
        plot(arguments.plot, contents, arguments.data_path)
    if contents.num_unclosed:
        raise UserError(
            f"{arguments.data_path}: document {contents.first_unclosed} does not end with the end-of-document token "
            f"{file.eod_token_id}, nor are {contents.num_unclosed - 1:,} others; {REWRITE}"
        )


if __name__ == "__main__":
    entry_point(main)
