"""Our training step against the plain one: Hugging Face's model, torch's AdamW, the same shape and batch.

    python -m bench.train_step [--rounds 9] [--out bench/results/train_step_cpu.json]

Both take whole steps in turns, so that a change of the machine's speed meets both; the figure is the median of the
ratios. The baseline is what a user would write first: bidirectional attention by a 4D mask, logits of all
positions, the same loss. One process, CPU, fp32.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.report import machine
from megatron_a2d.cli import Parser
from megatron_a2d.console import entry_point
from megatron_a2d.files import write_json

SHAPES: dict[str, dict[str, Any]] = {
    "dense": dict(intermediate_size=768),
    "moe": dict(intermediate_size=768, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=192),
}
COMMON: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
    max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, mask_token_id=4088,
)  # fmt: skip
SEQ_LENGTH, BATCH_SIZE, LEARNING_RATE = 256, 8, 1e-4


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="pairs of steps after one warm-up")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": COMMON | {"seq_length": SEQ_LENGTH, "batch": BATCH_SIZE},
    }
    for name, shape in SHAPES.items():
        ours, theirs = our_step(name, COMMON | shape), hugging_face_step(name, COMMON | shape)
        times = interleave(ours, theirs, options.rounds)
        ratio = statistics.median(b / a for a, b in times)
        rates = [BATCH_SIZE * SEQ_LENGTH / statistics.median(column) for column in zip(*times, strict=True)]
        result[name] = {"tokens_per_second": rates[0], "hugging_face": rates[1], "ratio": ratio, "seconds": times}
        print(f"{name:6} ours {rates[0]:7.0f} tokens/s   Hugging Face + AdamW {rates[1]:7.0f}   ratio {ratio:.2f}")
    if options.out:
        write_json(options.out, result)


def interleave(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """Seconds of each pair of steps, the first pair dropped."""

    def seconds(step: Callable[[], None]) -> float:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return [(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:]


def our_step(name: str, shape: dict[str, Any]) -> Callable[[], None]:
    """The training loop's own step, on random weights and tokens."""
    from megatron_a2d.architecture import architecture_from_config
    from megatron_a2d.config import build
    from megatron_a2d.training import loop, parallel, setup, step

    model_type = "qwen3_moe" if name == "moe" else "qwen3"
    architecture = architecture_from_config({**shape, "model_type": model_type, "norm_topk_prob": True}, name)
    config = build(
        dict(seq_length=SEQ_LENGTH, global_batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, lr=LEARNING_RATE)
    )
    parallel.initialize(config.parallel)
    state = setup.build_train_state(architecture, config)
    batches = loop.micro_batches(config, architecture, RandomTokens(), 1, 0)  # type: ignore[arg-type]

    def run() -> None:
        state.scheduler.step(1)
        step.train_step(state.chunks, state.optimizer, batches, 1, (BATCH_SIZE, SEQ_LENGTH))

    return run


def hugging_face_step(name: str, shape: dict[str, Any]) -> Callable[[], None]:
    """The same objective on the same batches, as a short script would do it."""
    import transformers

    from megatron_a2d.data.batches import MicroBatches
    from megatron_a2d.diffusion.corruption import corrupt
    from megatron_a2d.diffusion.noise import Noise

    kind = "Qwen3Moe" if name == "moe" else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(**shape, **({"norm_topk_prob": True} if name == "moe" else {}))
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    noise = Noise(1, shape["mask_token_id"])
    batches = MicroBatches(
        RandomTokens(), lambda tokens, index: corrupt(tokens, index, noise),
        micro_batch_size=BATCH_SIZE, global_batch_size=BATCH_SIZE,
    )  # fmt: skip
    mask = torch.ones(BATCH_SIZE, 1, SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool)

    def run() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        logits = model(batch.tokens, attention_mask=mask, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        ((losses * batch.weights.flatten()).sum() / batch.num_maskable.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


class RandomTokens:
    """Stands for a dataset."""

    def tokens(self, sample_index: int, /) -> np.ndarray:
        return np.random.default_rng(sample_index % 64).integers(0, COMMON["mask_token_id"], SEQ_LENGTH)


if __name__ == "__main__":
    entry_point(main)
