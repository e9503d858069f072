"""Benchmark of convert_hf and export_hf against `cp` of the same bytes on the same disk: time and peak memory.

    python -m bench.convert [--work DIR] [--rounds 3] [--out bench/results/convert_cpu.json]

A synthetic checkpoint (5.0 GB; Qwen3-30B-A3B's shape with 3 of 48 layers) is converted and copied in turns, then the
converted one is exported and copied, with the source in the page cache (warm) and dropped from it (cold, checked).
Times are of complete commands, including interpreter start and imports; both sides flush what they wrote to the disk
(`cp` by `sync -f`). Ours runs without and with the verification and the report that are its default.
Peak memory is that of default runs with all tensors of the full 30B and 235B models, in narrow matrices.
Needs about 15 GB of disk space, and as much memory for a warm cache as the checkpoint has bytes.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.page_cache import CACHES, before
from bench.paired import CLOCKS, Comparison, compare
from bench.process_tree import command, module, peak_memory, run
from bench.result_file import Figure, add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.conversion.random_weights import write_synthetic
from megatron_a2d.conversion.workers import DEFAULT_WORKERS
from megatron_a2d.families.qwen3 import hub_config
from megatron_a2d.terminal.console import console, entry_point

NARROW: dict[str, Any] = dict(
    hidden_size=64, head_dim=16, moe_intermediate_size=32, vocab_size=1024, mask_token_id=1023, bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip
COPY = "cp + sync"


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("."), metavar="DIR", help="a folder on the disk to measure")
    parser.add_argument("--num-hidden-layers", type=int, default=3, help="layers of the 30B-A3B shape; 3 are 5.0 GB")
    parser.add_argument("--workers", type=int, default=DEFAULT_WORKERS, help="threads of the converters")
    add_arguments(parser, rounds=3)
    options = parser.parse_args()
    threads = ["--workers", options.workers]
    with TemporaryDirectory(dir=options.work, prefix="bench_convert_") as name:
        work = Path(name).resolve()
        # First: from then on the bytecode of all modules is cached.
        figures = [figure for size in ("30B-A3B", "235B-A22B") for figure in peaks(size, work, threads)]
        hf, checkpoint, out = work / "hf", work / "checkpoint", work / "out"
        num_bytes = write_synthetic(hf, hub_config("30B-A3B", num_hidden_layers=options.num_hidden_layers))
        convert = module("checkpoints_tools.convert_hf", "--hf-model", hf, *threads)
        compared = against_cp("convert", convert, hf, out, options.rounds)
        run([*convert, "--out", str(checkpoint), "--no-verify"])
        shutil.rmtree(hf)
        export = module("checkpoints_tools.export_hf", "--checkpoint", checkpoint, "--format", "rnd1", *threads)
        compared += against_cp("export", export, checkpoint, out, options.rounds)
        shutil.rmtree(checkpoint)
        shutil.rmtree(out, ignore_errors=True)
    figures += [figure for comparison in compared for figure in seconds(comparison)]
    settings = {"bytes": num_bytes, "num_hidden_layers": options.num_hidden_layers, "workers": options.workers}
    write(options.out, "convert", compared, figures, settings)


def against_cp(name: str, words: list[str], source: Path, out: Path, rounds: int) -> list[Comparison]:
    """Both caches: the command without verification, with it, and the copy."""
    folders = [shlex.quote(str(path)) for path in (source, out)]
    copy = ["sh", "-c", "cp -r {0} {1} && sync -f {1}".format(*folders)]
    sides = {
        COPY: command(copy),
        name: command([*words, "--out", str(out), "--no-verify"]),
        f"{name}, verified": command([*words, "--out", str(out)]),
    }
    pairs = [(side, COPY) for side in sides if side != COPY]
    return [
        compare(name, sides, pairs, rounds=rounds, cache=cache, prepare=before(cache, [source], [out]), warm_up=0)
        for cache in CACHES
    ]


def seconds(compared: Comparison) -> list[Figure]:
    """Our own times: those of `cp` depend on how fast the kernel finds pages for the page cache, which ours bypass."""
    return [
        Figure(f"{side}, {compared.cache}, {clock} time", "s", [getattr(usage, clock) for usage in runs])
        for side, runs in compared.runs.items()
        if side != COPY
        for clock in CLOCKS
    ]


def peaks(size: str, work: Path, threads: list[Any]) -> list[Figure]:
    """Peak memory of both directions for a model with the number of tensors of `size`."""
    narrow, checkpoint, out = work / "narrow", work / "narrow_checkpoint", work / "narrow_out"
    write_synthetic(narrow, hub_config(size, **NARROW))
    commands = {
        "convert": module("checkpoints_tools.convert_hf", "--hf-model", narrow, "--out", checkpoint, *threads),
        "export": module("checkpoints_tools.export_hf", "--checkpoint", checkpoint, "--out", out, *threads),
    }
    found = [
        Figure(f"peak memory, {name}, all tensors of {size}", "bytes", [float(peak_memory(words))])
        for name, words in commands.items()
    ]
    for path in (narrow, checkpoint, out):
        shutil.rmtree(path)
    for figure in found:
        console.print(f"{figure.name}: {figure.text()}")
    return found


if __name__ == "__main__":
    entry_point(main)
