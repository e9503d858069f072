"""Benchmark of multiple choice: forward passes until the best choice is certain, and whether it is the right one.

    python -m bench.choice_decisions [--model demo_run/exported] [--questions 100] [--out FILE]

For a small random model and, with --model, an export. Questions are made of this repository's Python sources: 24 tokens
of context and four choices of 3 to 12 tokens. `other lines`: the next line and three lines from elsewhere. `one token`:
the next line and three copies with one token changed, far harder to tell apart. A decision is the best choice by
log-likelihood and, if lengths differ, another one the best per character. It is made by

- few passes: what `evaluate` does (evaluation/multiple_choice.py);
- all passes: the same with --decision-error 0, at most 128 a choice, exact up to 7 tokens;
- LLaDA's draws (Nie et al. 2025, appendix B.5): 128 a choice, numbers of masked tokens spread evenly over batches of
  32, masks drawn anew for each; twice, to see how often two such runs agree.

Counts are of sequences that the model runs, equal ones once; they do not depend on the machine. LLaDA's own code runs
all 128 of a choice; how many of them differ is counted as well.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator

from bench.likelihood import MASK, Scorer, random_model
from bench.result_file import ROOT, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.evaluation.loglikelihood import Pair, ScoringOptions, masked_request, token_losses
from megatron_a2d.evaluation.multiple_choice import Question, score_questions
from megatron_a2d.inference.hf_model import load_hf_model
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.terminal.console import console, entry_point, progress

KINDS = ("other lines", "one token")
CONTEXT, SHORTEST, LONGEST, ERROR = 24, 3, 12, 0.005
LLADA_DRAWS, LLADA_BATCH = 128, 32
Encode = Callable[[str], list[int]]


class Counted:
    """A model that counts the sequences it runs."""

    def __init__(self, forward: Any):
        self._forward, self.num_sequences = forward, 0

    def __call__(self, request: Any, reduce: Any) -> tuple[torch.Tensor, ...]:
        self.num_sequences += len(request.tokens)
        return self._forward(request, reduce)


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=None, help="an export to measure, besides a random model")
    parser.add_argument("--questions", type=int, default=100, help="questions of each kind")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    models: dict[str, tuple[Any, Encode]] = {"random": (Scorer(random_model()), words)}
    if options.model:
        loaded = load_hf_model(options.model)
        models["exported"] = (loaded, loaded.encode)
    rows = [
        {"model": name, "choices": kind}
        | measure(f"{name}, {kind}", loaded, draw_questions(kind, options.questions, encode))
        for name, (loaded, encode) in models.items()
        for kind in KINDS
    ]
    settings = {
        "questions": options.questions, "decision_error": ERROR, "mc_num": ScoringOptions().mc_num, "context": CONTEXT,
        "choice_tokens": [SHORTEST, LONGEST],
    }  # fmt: skip
    write(options.out, "choice_decisions", [], settings=settings, rows=rows)


def block(stored: dict[str, Any]) -> str:
    """The documents' table, from a result file."""
    shares = ("few and all", "few and LLaDA's", "LLaDA's twice")
    head = [
        "model",
        "choices",
        "decisions",
        "passes a choice: few",
        "all",
        "LLaDA's, equal ones once",
        "LLaDA's 128 / few",
        *(f"equal: {s}" for s in shares),
    ]
    rows = [
        [row["model"], row["choices"], str(row["decisions"]), f"{row['few']:.1f}", f"{row['all']:.1f}",
         f"{row['llada_distinct']:.1f}", f"{LLADA_DRAWS / row['few']:.1f}x",
         *(f"{row['equal'][share]:.1%}" for share in shares)]
        for row in stored["rows"]
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n`{stored['command']}` at {stored['commit']}.\n"


def words(text: str) -> list[int]:
    """Token ids for a model without a tokenizer: one for each word, space or sign."""
    return [zlib.crc32(word.encode()) % MASK for word in re.findall(r"\w+|\s+|.", text)]


def draw_questions(kind: str, number: int, encode: Encode) -> list[Question]:
    random = np.random.default_rng(0)
    texts = [path.read_text().split("\n") for path in sorted((ROOT / "megatron_a2d").rglob("*.py"))]
    texts = [lines for lines in texts if len(lines) > 40]
    questions: list[Question] = []
    while len(questions) < number:
        lines = texts[random.integers(len(texts))]
        position = int(random.integers(8, len(lines)))
        context = encode("\n".join(lines[position - 8 : position]) + "\n")[-CONTEXT:]
        line = lines[position].strip()
        if len(context) == CONTEXT and SHORTEST <= len(encode(line)) <= LONGEST:
            others = [_line(texts, random, encode) for _ in range(3)]
            questions.append(_lines(context, [line, *others], encode) if kind == KINDS[0] else
                             _changed(context, [encode(text) for text in (line, *others)], random))  # fmt: skip
    return questions


def _line(texts: list[list[str]], random: Generator, encode: Encode) -> str:
    while True:
        lines = texts[random.integers(len(texts))]
        text = lines[random.integers(len(lines))].strip()
        if SHORTEST <= len(encode(text)) <= LONGEST:
            return text


def _lines(context: list[int], texts: list[str], encode: Encode) -> Question:
    per_character = tuple(1 / len(text) for text in texts)
    return Question(tuple((context, encode(text)) for text in texts), ((1.0,) * len(texts), per_character))


def _changed(context: list[int], choices: list[list[int]], random: Generator) -> Question:
    """The first choice, and copies of it with one token each of the other choices."""
    copies = [list(choices[0]) for _ in choices]
    for copy, other in zip(copies[1:], choices[1:], strict=True):
        copy[random.integers(len(copy))] = other[random.integers(len(other))]
    return Question(tuple((context, copy) for copy in copies), ((1.0,) * len(copies),))


class Decided(NamedTuple):
    """The best choices of all questions, in turn by each of their scores."""

    best: np.ndarray

    def agreement(self, other: Decided) -> float:
        """The share of equal decisions."""
        return float((self.best == other.best).mean())


def measure(name: str, loaded: Any, questions: list[Question]) -> dict[str, Any]:
    """Passes and agreements of the methods on these questions."""
    counted = Counted(loaded.forward)
    model: Any = SimpleNamespace(
        forward=counted, objective=loaded.objective, label_shift=loaded.label_shift, device=loaded.device,
        mask_token_id=loaded.mask_token_id,
    )  # fmt: skip
    num_choices = sum(len(question.choices) for question in questions)
    options = ScoringOptions()

    def ours(error: float) -> tuple[Decided, float]:
        counted.num_sequences = 0
        with progress(f"{name}, error {error}", num_choices, "choices") as advance:
            scored = score_questions(model, questions, options, error, on_progress=advance)
        values = [[choice.log_likelihood for choice in choices] for choices in scored]
        return decide(questions, values), counted.num_sequences / num_choices

    few, passes = ours(ERROR)
    every, all_passes = ours(0)
    counted.num_sequences = 0
    with progress(f"{name}, LLaDA's draws", len(questions), "questions") as advance:
        pairs = []
        for number, question in enumerate(questions):
            pairs.append([llada(model, question.choices, options.batch_tokens, number, run) for run in range(2)])
            advance(1)
    first, second = (decide(questions, [found[run] for found in pairs]) for run in range(2))
    row = {
        "decisions": len(few.best), "few": passes, "all": all_passes,
        "llada_distinct": counted.num_sequences / (2 * num_choices),
        "equal": {
            "few and all": few.agreement(every), "few and LLaDA's": few.agreement(first),
            "LLaDA's twice": first.agreement(second),
        },
    }  # fmt: skip
    console.print(f"{name}: {LLADA_DRAWS / passes:.1f} times fewer passes than LLaDA's", row)
    return row


def decide(questions: Sequence[Question], values: Sequence[Sequence[float]]) -> Decided:
    """The best choice of each question by each of its scores, from log-likelihoods."""
    return Decided(
        np.array(
            [
                np.argmax(np.array(scale) * of_choices)
                for question, of_choices in zip(questions, values, strict=True)
                for scale in question.scales
            ]
        )
    )


def llada(model: Any, choices: Sequence[Pair], batch_tokens: int, number: int, run: int) -> list[float]:
    """Log-likelihoods of the choices by LLaDA's draws, separate for each choice; equal masks are run once."""
    random = np.random.default_rng([number, run])
    masks = [llada_masks(len(tokens), random) for _, tokens in choices]
    requests = (
        masked_request(model, pair, mask, choice, index)
        for choice, pair in enumerate(choices)
        for index, mask in enumerate(masks[choice])
    )
    totals = np.zeros(len(choices))
    for masked, losses_n, _ in token_losses(model, requests, batch_tokens):
        num_tokens = len(choices[masked.request][1])
        totals[masked.request] -= num_tokens / len(losses_n) * losses_n.sum() / LLADA_DRAWS
    return totals.tolist()


def llada_masks(num_tokens: int, random: Generator) -> np.ndarray:
    """Masks [draws, n]: in each batch the numbers of masked tokens are spread evenly from a random one on."""
    masks = []
    for _ in range(LLADA_DRAWS // LLADA_BATCH):
        steps = np.round(random.integers(1, num_tokens + 1) + np.arange(LLADA_BATCH) * num_tokens / LLADA_BATCH)
        for size in (steps.astype(int) - 1) % num_tokens + 1:
            masks.append(random.permutation(num_tokens) < size)
    return np.array(masks)


if __name__ == "__main__":
    entry_point(main)
