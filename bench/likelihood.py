"""Benchmark of log-likelihoods: requests sorted and batched, against one request at a time.

    python -m bench.likelihood [--rounds 5] [--questions 24] [--out bench/results/likelihood_cpu.json]

Questions with contexts of 20 to 120 tokens and four choices each, at most 128 forward passes per choice. `letters`:
choices of one token, as in MMLU; `texts`: choices of 1 to 8 tokens, as in ARC (exact up to 7 tokens). Three methods
with equal results, run alternately: one masked sequence at a time; one request at a time, with its draws as one batch;
and all requests sorted, batched and deduplicated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.paired import Comparison, compare, in_process
from bench.result_file import add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.diffusion.model_interface import Reduce, Request
from megatron_a2d.evaluation.loglikelihood import Scored, ScoringOptions, score
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.hf_model import TransformersModel
from megatron_a2d.terminal.console import entry_point

VOCABULARY, HIDDEN, LAYERS, MASK = 4096, 64, 4, 4095
MC_NUM, BATCH_TOKENS = 128, 4096
BATCHED = "sorted and batched"


class Scorer:
    """The part of a LoadedModel that `score` uses."""

    objective, label_shift, mask_token_id, max_positions = "mdlm", True, MASK, 512
    device = torch.device("cpu")

    def __init__(self, model: A2DForMaskedLM):
        self._model, self.num_forwards = TransformersModel(model), 0

    def forward(self, request: Request, reduce: Reduce) -> tuple[torch.Tensor, ...]:
        self.num_forwards += 1
        return self._model(request, reduce)


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--questions", type=int, default=24, help="questions per run, each with four choices")
    add_arguments(parser, rounds=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    scorer = Scorer(random_model())
    compared = [measure(scorer, kind, options.questions, options.rounds) for kind in ("letters", "texts")]
    settings = {
        "vocabulary": VOCABULARY, "hidden": HIDDEN, "layers": LAYERS, "mc_num": MC_NUM, "batch_tokens": BATCH_TOKENS,
        "questions": options.questions,
    }  # fmt: skip
    write(options.out, "likelihood", compared, settings=settings)


def random_model() -> A2DForMaskedLM:
    config = A2DConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=512, mask_token_id=MASK,
    )  # fmt: skip
    return A2DForMaskedLM(config).eval()


def draw_requests(kind: str, num_questions: int) -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(0)
    requests = []
    for _ in range(num_questions):
        context = random.integers(0, MASK, random.integers(20, 121)).tolist()
        for choice in range(4):
            length = random.integers(1, 9) if kind == "texts" else 0
            answer = random.integers(0, MASK, length).tolist() if length else [choice]
            requests.append((context, answer))
    return requests


def measure(scorer: Scorer, kind: str, num_questions: int, rounds: int) -> Comparison:
    """The three methods in turns; their results are the same."""
    requests = draw_requests(kind, num_questions)
    whole = ScoringOptions(mc_num=MC_NUM, batch_tokens=BATCH_TOKENS)
    loaded: Any = scorer
    ways: dict[str, Callable[[], list[Scored]]] = {
        "one sequence at a time": lambda: [
            score(loaded, [request], ScoringOptions(mc_num=MC_NUM, batch_tokens=1))[0] for request in requests
        ],
        "one request at a time": lambda: [score(loaded, [request], whole)[0] for request in requests],
        BATCHED: lambda: score(loaded, requests, whole),
    }
    results, forwards = {}, {}

    def run(way: str) -> None:
        scorer.num_forwards = 0
        results[way] = ways[way]()
        forwards[way] = scorer.num_forwards

    sides = {way: in_process(partial(run, way)) for way in ways}
    compared = compare(kind, sides, [(way, BATCHED) for way in ways if way != BATCHED], rounds=rounds)
    for way, found in results.items():
        largest = max(abs(a[0] - b[0]) for a, b in zip(found, results[BATCHED], strict=True))
        assert largest < 1e-3, f"{way} gives different results: {largest}"
    compared.figures["forward passes of these"] = " / ".join(str(forwards[way]) for way in ways)
    return compared


if __name__ == "__main__":
    entry_point(main)
