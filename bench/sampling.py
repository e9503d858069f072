"""Benchmark of the samplers against a plain reimplementation of the published loop: tokens/s and output quality.

    python -m bench.sampling [--rounds 5] [--out bench/results/sampling_cpu.json]
    python -m bench.sampling --model demo_run/exported --data demo_run/corpus_valid --out ...

The plain loop does what the published one does: LM head, full-vocabulary log-softmax, entropies and argmax at all
positions, in every step. First, `rnd1` on a random model with Qwen3's vocabulary, whose texts equal the plain loop's in
float64. With --model, an export such as the demo's, all samplers continue the same held-out texts in each round, and
their quality is measured too: as the bound on the generated text's negative log-likelihood under the model (64 forward
passes per text, nats/token), and as the fraction of tokens that equal the held-out text. One text at a time, samplers
in turns.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.paired import Comparison, Side, compare, in_process
from bench.result_file import add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.hf_model import TransformersModel
from megatron_a2d.terminal.console import entry_point

VOCABULARY, HIDDEN, LAYERS, MASK = 151_936, 256, 4, 151_669
PROMPT, NEW_TOKENS, STEPS = 32, 64, 64
TEXTS = 6  # in each round
PLAIN = "plain loop"

SAMPLERS = {
    "rnd1": SamplingOptions(num_steps=STEPS),
    "rnd1, an eighth of the steps": SamplingOptions(num_steps=STEPS // 8),
    "confidence, an eighth of the steps": SamplingOptions("confidence", num_steps=STEPS // 8),
    "confidence, an eighth of the steps, remask 0.1": SamplingOptions("confidence", num_steps=STEPS // 8, remask=0.1),
    "confidence, an eighth of the steps, remask 0.3": SamplingOptions("confidence", num_steps=STEPS // 8, remask=0.3),
    "threshold 0.2": SamplingOptions("threshold", num_steps=STEPS, threshold=0.2),
    "threshold 0.1": SamplingOptions("threshold", num_steps=STEPS, threshold=0.1),
    "threshold 0.05": SamplingOptions("threshold", num_steps=STEPS, threshold=0.05),
    "eb 16": SamplingOptions("eb", num_steps=STEPS, gamma=16.0),
    "eb 32": SamplingOptions("eb", num_steps=STEPS, gamma=32.0),
    "rnd1, blocks of 16": SamplingOptions(num_steps=STEPS, block_length=16),
    "rnd1, blocks of 16, prefix cache": SamplingOptions(num_steps=STEPS, block_length=16, cache="prefix"),
    "rnd1, blocks of 16, dual cache": SamplingOptions(num_steps=STEPS, block_length=16, cache="dual"),
    "threshold 0.1, blocks of 16, dual cache": SamplingOptions(
        "threshold", num_steps=STEPS, threshold=0.1, block_length=16, cache="dual"
    ),
    "rnd1, a quarter of the steps, blocks of 16, dual cache": SamplingOptions(
        num_steps=STEPS // 4, block_length=16, cache="dual"
    ),
}


class Measured(NamedTuple):
    """What one sampler wrote, per text."""

    texts: list[list[int]]
    forwards: list[int]


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=None, help="exported model to compare all samplers on")
    parser.add_argument("--data", default=None, help="prefix of its held-out tokens")
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    compared = [untrained(options.rounds)]
    if options.model:
        compared += trained(options.model, options.data, options.rounds)
    write(options.out, "sampling", compared, settings={"prompt": PROMPT, "new_tokens": NEW_TOKENS, "steps": STEPS})


def untrained(rounds: int) -> Comparison:
    """`rnd1` and the plain loop with Qwen3's vocabulary; a quarter of the steps, as the time per step is constant."""
    torch.manual_seed(0)
    config = A2DConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, intermediate_size=512, mask_token_id=MASK, initializer_range=0.1,
    )  # fmt: skip
    model = A2DForMaskedLM(config).eval()
    steps = STEPS // 4
    prompts = torch.randint(0, MASK, (2, PROMPT)).tolist()
    loops: dict[str, Loop] = {
        PLAIN: lambda prompt: plain_loop(model, prompt, MASK, steps),
        "rnd1": lambda prompt: our_loop(model, prompt, MASK, SamplingOptions(num_steps=steps)),
    }
    sides = {name: side(Measured([], []), prompts, loop) for name, loop in loops.items()}
    compared = compare(f"random weights, vocabulary {VOCABULARY:,}", sides, [(PLAIN, "rnd1")], rounds=rounds)
    # In fp32, two positions of nearly equal entropy may change places, and all that follows with them.
    model.double()
    for prompt in prompts:
        assert loops[PLAIN](prompt) == loops["rnd1"](prompt)
    return compared


def trained(directory: str, data: str, rounds: int) -> list[Comparison]:
    from megatron_a2d.data.packed_dataset import PackedDataset
    from megatron_a2d.evaluation.loglikelihood import ScoringOptions, score
    from megatron_a2d.inference.hf_model import load_hf_model

    loaded = load_hf_model(directory)
    model, mask = loaded.forward.model, loaded.mask_token_id  # type: ignore[attr-defined]
    dataset = PackedDataset(data, PROMPT + NEW_TOKENS, seed=0, vocab_size=loaded.vocab_size)
    texts = [dataset.tokens(number).tolist() for number in range(TEXTS)]
    prompts = [text[:PROMPT] for text in texts]
    found = {name: Measured([], []) for name in (PLAIN, *SAMPLERS)}
    loops = {PLAIN: lambda prompt: plain_loop(model, prompt, mask, STEPS)} | {
        name: partial(our_loop, model, mask=mask, options=sampling) for name, sampling in SAMPLERS.items()
    }
    sides = {name: side(found[name], prompts, loop) for name, loop in loops.items()}
    whole = compare("demo", sides, [(PLAIN, name) for name in SAMPLERS], rounds=rounds)
    rows = []
    for name, measured in found.items():
        scored = score(loaded, [(text[:PROMPT], text[PROMPT:]) for text in measured.texts], ScoringOptions(mc_num=64))
        right = [
            a == b
            for text, own in zip(texts, measured.texts, strict=True)
            for a, b in zip(text[PROMPT:], own[PROMPT:], strict=True)
        ]
        figures = {
            "forward passes": f"{statistics.fmean(measured.forwards):.1f}",
            "nats/token": f"{-statistics.fmean(item.log_likelihood for item in scored) / NEW_TOKENS:.3f}",
            "accuracy": f"{statistics.fmean(right):.1%}",
        }
        runs = {side: whole.runs[side] for side in dict.fromkeys((PLAIN, name))}
        rows.append(Comparison("demo's model", runs, [(PLAIN, name)], figures=figures))
    return rows


Loop = Callable[[list[int]], tuple[list[int], int]]  # prompt -> tokens, forward passes


def side(measured: Measured, prompts: list[list[int]], write_text: Loop) -> Side:
    """Each run continues all prompts, and `measured` holds the last run's texts."""

    def run() -> None:
        written = [write_text(prompt) for prompt in prompts]
        measured.texts[:] = [tokens for tokens, _ in written]
        measured.forwards[:] = [forwards for _, forwards in written]

    return in_process(run)


def our_loop(model: A2DForMaskedLM, prompt: list[int], mask: int, options: SamplingOptions) -> tuple[list[int], int]:
    sampled = denoise(TransformersModel(model), make_canvas([prompt + [mask] * NEW_TOKENS], mask), mask, options)
    return sampled.tokens[0].tolist(), sampled.num_forwards[0]


@torch.no_grad()
def plain_loop(model: A2DForMaskedLM, prompt: list[int], mask: int, num_steps: int) -> tuple[list[int], int]:
    """The published schedule, greedy; unlike the published loop it never predicts the mask token."""
    tokens = torch.tensor([prompt + [mask] * NEW_TOKENS])
    maskable = tokens == mask
    total = maskable.sum(1, keepdim=True)

    def predict() -> tuple[Tensor, Tensor]:
        logits = model(tokens).logits
        logits[..., mask] = -1e30
        logprobs = torch.log_softmax(logits, dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return F.pad(logprobs.argmax(-1)[:, :-1], (1, 0)), F.pad(entropy[:, :-1], (1, 0))

    predicted, entropy = predict()
    forwards = 1
    for step in range(num_steps - 1, 0, -1):
        keep = int((total * (step / num_steps)).long())
        kept = torch.zeros_like(maskable)
        if keep:
            kept[0, entropy.masked_fill(~maskable, -torch.inf)[0].topk(keep).indices] = True
        decided = maskable & ~kept
        tokens[decided] = predicted[decided]
        maskable &= ~decided
        if maskable.any():
            predicted, entropy = predict()
            forwards += 1
    tokens[maskable] = predicted[maskable]
    return tokens[0].tolist(), forwards


if __name__ == "__main__":
    entry_point(main)
