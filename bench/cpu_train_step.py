"""Benchmark of our training step on a CPU, against a plain script's and against an older build's.

    python -m bench.cpu_train_step [--rounds 11] [--out bench/results/train_step_cpu.json]
    git worktree add ../older c26157c && python -m bench.cpu_train_step --against ../older --out FILE

Two small shapes, dense and MoE, and both in bf16 as well. The plain script: Hugging Face's model, made bidirectional,
and torch's AdamW, on the same batches (bench/train_step_variants.py). A third side repeats only the matrix products and
the attention of our step: about their share of it, below 1. --against: a checkout of another commit, with its own
settings and code (its bench/ says how its step is made). Every side is a process of its own that takes one step at a
time, all others idle meanwhile, with as many threads as there are cores (or OMP_NUM_THREADS). The other ratios are
above 1 where ours is faster.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.paired import Comparison, Side, compare
from bench.process_tree import Worker
from bench.result_file import ROOT, add_arguments, build_name, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.errors import UserError

COMMON: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
    max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, mask_token_id=4088,
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "dense": COMMON | dict(model_type="qwen3", intermediate_size=768),
    "moe": COMMON
    | dict(
        model_type="qwen3_moe", intermediate_size=768, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192,
        norm_topk_prob=True,
    ),
}  # fmt: skip
BATCH, SEQ_LENGTH = 8, 256
OURS, THEIRS, PRODUCTS = "ours", "Hugging Face + AdamW", "its products and attention alone"


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=Path, metavar="DIRECTORY", help="a checkout of another commit")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which models")
    parser.add_argument("--micro-batch-size", type=int, default=BATCH, help=f"of a batch of {BATCH} samples")
    parser.add_argument("--no-bf16", action="store_true", help="fp32 alone")
    add_arguments(parser, rounds=11)
    options = parser.parse_args()
    if options.micro_batch_size < 1 or BATCH % options.micro_batch_size:
        raise UserError(f"--micro-batch-size {options.micro_batch_size}: must divide {BATCH}")
    if options.against:
        build_name(options.against)  # before anything is measured
    compared = [
        measure(shape, bf16, options.micro_batch_size, options.against, options.rounds)
        for bf16 in ((False,) if options.no_bf16 else (False, True))
        for shape in options.shapes
    ]
    settings = COMMON | {"seq_length": SEQ_LENGTH, "batch": BATCH, "micro_batch_size": options.micro_batch_size}
    write(options.out, "train_step", compared, settings=settings)


def measure(shape: str, bf16: bool, micro_batch_size: int, against: Path | None, rounds: int) -> Comparison:
    """All sides of one shape in turns."""
    job = {"model": SHAPES[shape], "micro_batch_size": micro_batch_size, "batch": BATCH, "seq_length": SEQ_LENGTH}
    places = {OURS: (ROOT, "ours"), THEIRS: (ROOT, "hugging_face"), PRODUCTS: (ROOT, "products")}
    if against:
        places[build_name(against)] = (against.resolve(), "ours")
    with ExitStack() as stack:
        sides: dict[str, Side] = {
            side: stack.enter_context(Worker(words(job | {"kind": kind, "bf16": bf16}), directory))
            for side, (directory, kind) in places.items()
        }
        name = f"{shape}, {'bf16' if bf16 else 'fp32'}"
        return compare(name, sides, [(side, OURS) for side in sides if side != OURS], rounds=rounds, warm_up=3)


def words(job: dict[str, Any]) -> list[str]:
    """The command of a worker; -P: not to import from bench/, whose tokenize.py is a standard module's name."""
    return [sys.executable, "-P", "-W", "ignore", str(ROOT / "bench" / "step_worker.py"), json.dumps(job)]


if __name__ == "__main__":
    entry_point(main)
