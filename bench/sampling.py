"""Samplers against a plain reimplementation of the published loop: tokens a second, at equal output or a stated cost.

    python -m bench.sampling [--rounds 2] [--train-steps 400] [--out bench/results/sampling_cpu.json]

A small model with Qwen3's vocabulary is trained first (minutes) on texts whose right answer can be checked: a prompt of
random words, and an answer of groups. Each group repeats a part of the prompt in one of two alphabets, and which one
is left to chance: tokens of a group must agree with one another, so what is decided in parallel can be wrong
together. Accuracy is the share of groups that are right. The plain loop does what the published one does: the head, a
full-vocabulary log-softmax, entropies and argmax on all positions at every step. All run one text at a time, in turns.
"""

from __future__ import annotations

import statistics
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.report import machine
from megatron_a2d.cli import Parser
from megatron_a2d.console import console, entry_point, progress
from megatron_a2d.diffusion.sampling import SamplingOptions, denoise, make_canvas
from megatron_a2d.files import write_json
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.export import TransformersModel

VOCABULARY, HIDDEN, LAYERS = 151_936, 256, 2
MASK = 151_669
WORDS = 64  # of each of the two alphabets; ids 0..63 and 64..127
GROUPS, GROUP_LENGTH, BATCH = 3, 16, 16
NEW_TOKENS = GROUPS * GROUP_LENGTH
STEPS = NEW_TOKENS

SAMPLERS = {
    "rnd1": SamplingOptions(num_steps=STEPS),
    "rnd1, a quarter of the steps": SamplingOptions(num_steps=STEPS // 4),
    "threshold 0.9": SamplingOptions("threshold", num_steps=STEPS),
    "threshold 0.9, blocks of 16": SamplingOptions("threshold", num_steps=STEPS, block_length=16),
    "threshold 0.9, blocks of 16, prefix cache": SamplingOptions(
        "threshold", num_steps=STEPS, block_length=16, cache="prefix"
    ),
    "threshold 0.9, blocks of 16, dual cache": SamplingOptions(
        "threshold", num_steps=STEPS, block_length=16, cache="dual"
    ),
    "rnd1, blocks of 16, prefix cache": SamplingOptions(num_steps=STEPS, block_length=16, cache="prefix"),
    "rnd1, blocks of 16, dual cache": SamplingOptions(num_steps=STEPS, block_length=16, cache="dual"),
}


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="texts that are timed, after one warm-up")
    parser.add_argument("--texts", type=int, default=8, help="texts that accuracies are measured on")
    parser.add_argument("--train-steps", type=int, default=400, help="steps of the small model's training")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = trained_model(options.train_steps)
    prompts = draw_texts(options.texts, torch.Generator().manual_seed(2))[:, :GROUP_LENGTH]
    plain = "plain loop"
    found: dict[str, Measured] = {plain: Measured([], [], [])}
    found |= {name: Measured([], [], []) for name in SAMPLERS}
    for number in range(len(prompts)):
        prompt = prompts[number].tolist()
        reference = None
        for name, measured in found.items():
            # All texts are written for the accuracies; the plain loop's are those of rnd1, and it is slow.
            if name == plain and number > options.rounds:
                continue
            begin = time.perf_counter()
            tokens, forwards = plain_loop(model, prompt) if name == plain else our_loop(model, prompt, SAMPLERS[name])
            measured.seconds.append(time.perf_counter() - begin)
            measured.texts.append(tokens)
            measured.forwards.append(forwards)
            reference = tokens if name == plain else reference
            assert name != "rnd1" or reference is None or tokens == reference, "rnd1 is not the plain loop"
    table = report(found, prompts, options.rounds)
    for name, row in table.items():
        print(
            f"{name:44} {row['tokens_per_second']:8.1f} tokens/s  {row['speed_ratio']:6.2f}x  "
            f"{row['forwards']:5.1f} forwards  accuracy {row['accuracy']:.1%}"
        )
    if options.out:
        sizes = {
            "vocabulary": VOCABULARY, "hidden": HIDDEN, "layers": LAYERS, "prompt": GROUP_LENGTH,
            "new_tokens": NEW_TOKENS, "steps": STEPS, "texts": options.texts, "train_steps": options.train_steps,
        }  # fmt: skip
        seconds = {name: measured.seconds[1 : options.rounds + 1] for name, measured in found.items()}
        write_json(options.out, {"machine": machine(), **sizes, "samplers": table, "seconds": seconds})


class Measured(NamedTuple):
    """Of one sampler, by text."""

    seconds: list[float]
    texts: list[list[int]]
    forwards: list[int]


def report(found: dict[str, Measured], prompts: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    plain = found["plain loop"].seconds[1 : rounds + 1]
    table = {}
    for name, measured in found.items():
        seconds = measured.seconds[1 : rounds + 1]
        table[name] = {
            "tokens_per_second": NEW_TOKENS / statistics.median(seconds),
            "speed_ratio": statistics.median(a / b for a, b in zip(plain, seconds, strict=True)),
            "forwards": statistics.fmean(measured.forwards),
            "accuracy": accuracy(prompts[: len(measured.texts)], torch.tensor(measured.texts)),
            "accuracy_texts": len(measured.texts),
            "equals_plain": all(a == b for a, b in zip(found["plain loop"].texts, measured.texts, strict=False)),
        }
    return table


def draw_texts(count: int, generator: torch.Generator) -> Tensor:
    """[count, prompt + answer]: group g repeats the prompt turned by g places, in the alphabet that a coin decides."""
    prompts = torch.randint(0, WORDS, (count, GROUP_LENGTH), generator=generator)
    coins = torch.randint(0, 2, (count, GROUPS), generator=generator)
    groups = [prompts.roll(-g, 1) + WORDS * coins[:, g, None] for g in range(GROUPS)]
    return torch.cat([prompts, *groups], 1)


def accuracy(prompts: Tensor, texts: Tensor) -> float:
    """Share of groups that repeat their part of the prompt in one alphabet."""
    answers = texts[:, GROUP_LENGTH:].unflatten(1, (GROUPS, GROUP_LENGTH))
    expected = torch.stack([prompts.roll(-g, 1) for g in range(GROUPS)], 1)
    right = ((answers == expected).all(-1)) | ((answers == expected + WORDS).all(-1))
    return float(right.double().mean())


def trained_model(num_steps: int) -> A2DForMaskedLM:
    """All rows of the head beyond the two alphabets are one vector: so a softmax over 129 classes, the last one counted
    with its multiplicity, is that over the whole vocabulary, and training it is cheap."""
    torch.manual_seed(0)
    config = A2DConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, intermediate_size=512, max_position_embeddings=256, mask_token_id=MASK,
    )  # fmt: skip
    model = A2DForMaskedLM(config)
    words = 2 * WORDS
    head = nn.Linear(HIDDEN, words + 1, bias=False)
    multiplicity = torch.zeros(words + 1)
    multiplicity[words] = torch.tensor(float(VOCABULARY - words)).log()
    # The embedding's rows beyond those that occur are of no use; a table of their own keeps the optimizer small.
    full = model.model.embed_tokens
    model.model.embed_tokens = nn.Embedding(words + 1, HIDDEN)
    parameters = [*model.model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
    generator = torch.Generator().manual_seed(1)
    with progress("training the small model", num_steps, "steps") as advance:
        for _ in range(num_steps):
            texts = draw_texts(BATCH, generator)
            ratio = torch.rand(BATCH, 1, generator=generator)
            masked = torch.rand(texts.shape, generator=generator) < ratio
            masked[:, :GROUP_LENGTH] = False
            hidden = model.model(texts.masked_fill(masked, words))[0][:, :-1]
            logits = head(hidden[masked[:, 1:]]) + multiplicity
            loss = F.cross_entropy(logits, texts[masked])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance(1)
    console.print(f"cross-entropy of masked tokens at the end: {float(loss):.3f} nats")
    with torch.no_grad():
        full.weight[:words] = model.model.embed_tokens.weight[:words]
        full.weight[MASK] = model.model.embed_tokens.weight[words]
        model.lm_head.weight[:] = head.weight[words]
        model.lm_head.weight[:words] = head.weight[:words]
    model.model.embed_tokens = full
    return model.eval()


def our_loop(model: A2DForMaskedLM, prompt: list[int], options: SamplingOptions) -> tuple[list[int], int]:
    canvas = make_canvas([prompt + [MASK] * NEW_TOKENS], MASK)
    sampled = denoise(TransformersModel(model), canvas, MASK, options)
    return sampled.tokens[0].tolist(), sampled.num_forwards[0]


@torch.no_grad()
def plain_loop(model: A2DForMaskedLM, prompt: list[int]) -> tuple[list[int], int]:
    """The published schedule, greedy, as it is written: everything on all positions, at every step."""
    tokens = torch.tensor([prompt + [MASK] * NEW_TOKENS])
    maskable = tokens == MASK
    total = int(maskable.sum())

    def predict() -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(model(tokens).logits, dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return F.pad(logprobs.argmax(-1)[:, :-1], (1, 0)), F.pad(entropy[:, :-1], (1, 0))

    predicted, entropy = predict()
    forwards = 1
    for step in range(STEPS - 1, 0, -1):
        keep = int(total * (step / STEPS))
        masked_entropy = entropy.masked_fill(~maskable, -torch.inf)
        kept = torch.zeros_like(maskable)
        if keep:
            kept[0, masked_entropy[0].topk(keep).indices] = True
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
