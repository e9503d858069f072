"""Benchmark of self-speculative decoding: tokens per forward pass of models trained with an autoregressive co-loss.

    python -m bench.speculative_decoding --demo demo_run --runs speculation_runs [--out bench/results/FILE]

After `make demo`. Its autoregressive model is trained as block diffusion with the co-loss, once per block length, by
one process; finished runs in --runs are kept. Each continues held-out texts, at temperature 0 and 1. Autoregressive
decoding with a cache gives one token per forward pass. Counts do not depend on the machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench import demo_runs
from bench.result_file import write
from megatron_a2d.config.cli import Parser
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas, row_seed
from megatron_a2d.inference.hf_model import load_hf_model
from megatron_a2d.inference.loaded_model import LoadedModel
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.terminal.console import entry_point, progress

BLOCK_LENGTHS, TEMPERATURES, ITERATIONS = (4, 16), (0.0, 1.0), 300
TEXTS, PROMPT, NEW_TOKENS = 50, 32, 64


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    demo_runs.add_arguments(parser)
    options = parser.parse_args(argv)
    demo_runs.check(options.demo)
    rows = []
    for block_length in BLOCK_LENGTHS:
        loaded = load_hf_model(trained(options.demo, options.runs / f"block_{block_length}", block_length))
        for temperature in TEMPERATURES:
            tokens_per_pass = continue_texts(loaded, options.demo / "corpus_valid", temperature)
            rows.append(
                {"block_length": block_length, "temperature": temperature, "tokens_per_forward_pass": tokens_per_pass}
            )
    settings = {"iterations": ITERATIONS, "texts": TEXTS, "prompt": PROMPT, "new_tokens": NEW_TOKENS}
    write(options.out, "speculative_decoding", [], settings=settings, rows=rows)
    print(table(rows))


def trained(demo: Path, run: Path, block_length: int) -> Path:
    """An export of the demo's model after training with blocks and the co-loss."""
    export = run / "export"
    if not export.is_dir():
        flags = (
            "--train-iters", ITERATIONS, "--objective", "block", "--block-length", block_length, "--ar-loss-weight", 1,
        )  # fmt: skip
        demo_runs.train(demo, run, flags)
        demo_runs.python("checkpoints_tools.export_hf", "--checkpoint", run, "--out", export, "--format", "a2d")
    return export


def continue_texts(loaded: LoadedModel, data: Path, temperature: float) -> list[float]:
    """New tokens / forward passes of each text."""
    from megatron_a2d.data.packed_dataset import PackedDataset

    dataset = PackedDataset(str(data), PROMPT, seed=0, vocab_size=loaded.vocab_size)
    options = SamplingOptions(
        "self_speculative", num_steps=NEW_TOKENS, block_length=loaded.block_length, aligned_blocks=True, cache="prefix",
        temperature=temperature,
    )  # fmt: skip
    found = []
    with progress("continuing texts", TEXTS, "texts") as advance:
        for number in range(TEXTS):
            row = dataset.tokens(number).tolist() + [loaded.mask_token_id] * NEW_TOKENS
            sampled = denoise(
                loaded.forward, make_canvas([row], loaded.mask_token_id), loaded.mask_token_id, options,
                label_shift=loaded.label_shift, seed=[row_seed(0, number)],
            )  # fmt: skip
            found.append(NEW_TOKENS / sampled.num_forwards[0])
            advance(1)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    head = ["block length", "temperature", "tokens per forward pass", "least to most of a text"]
    cells = []
    for row in rows:
        values = np.array(row["tokens_per_forward_pass"])
        interval = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        cells.append(
            [row["block_length"], f"{row['temperature']:g}", f"{values.mean():.2f} ± {interval:.2f}",
             f"{values.min():.2f} to {values.max():.2f}"]
        )  # fmt: skip
    return markdown_table(head, cells)


def block(stored: dict[str, Any]) -> str:
    """The documents' table, from a result file."""
    return f"{table(stored['rows'])}\n`{stored['command']}` at {stored['commit']}.\n"


if __name__ == "__main__":
    entry_point(main)
