"""Benchmark of start-up times: help, errors in settings, and a run's first step.

    python -m bench.start [--rounds 5] [--out bench/results/start_cpu.json]
    python -m bench.start --against ../older --out FILE     # next to the build in another checkout

Complete commands, everything in the page cache:

NAME --help        of train, generate, evaluate and plan
NAME, an error     a wrong value that settings alone can show; `train.sh`: through launch/train.sh
first step         train of one process on a CPU, from a converted checkpoint (a MoE of 9M parameters) and a token file,
                   --train-iters 1 without --save: to the end of the command
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench.mixing import write_sources
from bench.paired import CLOCKS, Comparison, compare
from bench.process_tree import command, module, run
from bench.result_file import ROOT, Figure, add_arguments, build_name, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.conversion.random_weights import write_synthetic
from megatron_a2d.families.qwen3 import hub_config
from megatron_a2d.terminal.console import entry_point

BIN = {"BIN": str(Path(sys.executable).parent), "NPROC": "1"}  # for launch/train.sh
RECIPE = "launch/recipes/qwen3_8b.yaml"
WRONG = {
    "train": ["--config", RECIPE, "--micro-batch-size", "0"],
    "generate": ["--model", "nowhere", "--prompt", "x", "--temperature", "-1"],
    "evaluate": ["--model", "nowhere", "--out", "nowhere", "--mc-num", "0"],
    "plan": ["--config", RECIPE, "--cluster", "h100", "--gpus", "0"],
}
SMALL = dict(
    vocab_size=50_432, mask_token_id=50_001, bos_token_id=50_002, eos_token_id=50_002, hidden_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=64, intermediate_size=128,
)  # fmt: skip


class Command(NamedTuple):
    """Words of a command, and the exit code that it ends with."""

    words: list[str]
    code: int = 0


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="a checkout of another commit")
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    builds = {"ours": ROOT}
    if options.against:
        builds[build_name(options.against)] = options.against.resolve()
    with tempfile.TemporaryDirectory(prefix="bench_start") as name:
        folder = Path(name)
        write_synthetic(folder / "hf", hub_config("30B-A3B", **SMALL))
        write_sources(folder, 1_000_000)
        commands = {build: commands_of(directory, folder) for build, directory in builds.items()}
        compared = [
            compare(
                what,
                {
                    build: command(commands[build][what].words, BIN, commands[build][what].code, directory)
                    for build, directory in builds.items()
                },
                [(build, "ours") for build in builds if build != "ours"],
                rounds=options.rounds,
            )
            for what in commands["ours"]
        ]
    write(options.out, "start", compared, [figure for item in compared for figure in seconds(item)])


def commands_of(directory: Path, folder: Path) -> dict[str, Command]:
    """What is timed, in a build; its own checkpoint is made from the model in `folder`."""
    checkpoint = folder / f"checkpoint_{directory.name}"
    words = [folder / "hf", "--out", checkpoint, "--no-verify"]
    try:
        run(module("checkpoints_tools.convert_hf", "--hf-model", *words), directory=directory)
    except RuntimeError:  # the flag's name in older builds
        run(module("checkpoints_tools.convert_hf", "--hf", *words), directory=directory)
    first = module(
        "megatron_a2d.train", "--load", checkpoint, "--train-data-path", folder / "a", "--seq-length", 128,
        "--micro-batch-size", 8, "--global-batch-size", 8, "--train-iters", 1, "--lr-warmup-iters", 0,
    )  # fmt: skip
    found = {f"{name} --help": Command(module(f"megatron_a2d.{name}", "--help")) for name in WRONG}
    found |= {f"{name}, an error": Command(module(f"megatron_a2d.{name}", *words), 2) for name, words in WRONG.items()}
    found["train.sh, an error"] = Command(["launch/train.sh", *WRONG["train"]], 2)
    return found | {"first step": Command(first)}


def seconds(compared: Comparison) -> list[Figure]:
    """Our own times, which have separate targets."""
    return [
        Figure(f"{compared.name}, {clock} time", "s", [getattr(usage, clock) for usage in compared.runs["ours"]])
        for clock in CLOCKS
    ]


if __name__ == "__main__":
    entry_point(main)
