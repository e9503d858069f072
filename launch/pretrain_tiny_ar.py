"""Starting point of small studies, on any machine and offline: data, and a tiny Qwen3-MoE pretrained autoregressively.

    python -m launch.pretrain_tiny_ar --out study_base # about ten minutes on one core; resumes if interrupted

OUT/corpus_train, OUT/corpus_valid    Python's own standard library as tokens, split by a hash of the document text
OUT/ar                                the pretraining run; its last checkpoint is the model that the study converts
OUT/ar_balanced                       with --balanced: another one from the same weights, with balanced routers

A study of a real model uses that model's converted checkpoint and its data instead.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.random_model import write_untrained_model
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.errors import UserError

VOCAB_SIZE = 2048
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, intermediate_size=256, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96,
)  # fmt: skip
BALANCED = ("--moe-router-load-balancing-type", "global_aux_loss", "--moe-aux-loss-coeff", "0.01")
RUNS: tuple[tuple[str, tuple[str, ...]], ...] = (("ar", ()), ("ar_balanced", BALANCED))
RECIPE = "launch/recipes/study_ar.yaml"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m launch.pretrain_tiny_ar", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output directory")
    parser.add_argument("--train-iters", type=int, help="pretraining iterations; default: the recipe's")
    parser.add_argument("--balanced", action="store_true", help="also pretrain a model with balanced routers")
    options = parser.parse_args(argv)
    out: Path = options.out
    corpus, tokenizer = out / "corpus.jsonl", out / "tokenizer"
    if not corpus.exists():
        _run("data_prep.stdlib_corpus", "--out", corpus)
    if not (tokenizer / "tokenizer.json").exists():
        _run("data_prep.train_tokenizer", "--input", corpus, "--vocab-size", VOCAB_SIZE, "--out", tokenizer)
    if not (out / "corpus_valid.json").exists():
        _run(
            "data_prep.tokenize_corpus", "--input", corpus, "--tokenizer", tokenizer, "--output-prefix", out / "corpus",
            "--valid-fraction", "0.03",
        )  # fmt: skip
    if not (out / "untrained" / "config.json").exists():
        shutil.rmtree(out / "untrained", ignore_errors=True)
        write_untrained_model(out / "untrained", tokenizer, **SHAPE)
    if not (out / "untrained_checkpoint").exists():
        _run("checkpoints_tools.convert_hf", "--hf-model", out / "untrained", "--out", out / "untrained_checkpoint")
    length = ("--train-iters", options.train_iters) if options.train_iters else ()
    for name, settings in RUNS if options.balanced else RUNS[:1]:
        _run(
            "megatron_a2d.train", "--config", RECIPE, "--load", out / "untrained_checkpoint", "--save", out / name,
            "--train-data-path", out / "corpus_train", "--valid-data-path", out / "corpus_valid", *length, *settings,
        )  # fmt: skip
    console.print(f"{out}: start a study with --load {out / 'ar'}")


def _run(module: str, *arguments: Any) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if code := subprocess.run(command).returncode:
        raise UserError(f"`python -m {' '.join(command[2:])}` failed with exit code {code}; its message is above")


if __name__ == "__main__":
    entry_point(main)
