"""Published benchmark scores of diffusion language models and of RND1's base, under other harnesses and prompts.

All are of base models, not of instruct ones. RACE and ARC-C were not published for all.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Scores of one model, in percent, and where they were published."""

    source: str
    scores: dict[str, float]


_RND1 = "Radical Numerics (2025), radicalnumerics.ai/blog/rnd1"
_LLADA_MOE = "Zhu et al. (2025), arXiv 2509.24389, as others quote it"

# RND1 was also tested on RACE, but no figure is given in text.
PUBLISHED = {
    "RND1-Base": Published(_RND1, {"MMLU": 69.6, "BBH": 67.5, "ARC-C": 63.2, "GSM8K": 80.0, "MBPP": 65.4}),
    "Dream-7B": Published(_RND1, {"MMLU": 69.5, "BBH": 57.9, "ARC-C": 59.8, "GSM8K": 77.2, "MBPP": 56.2}),
    "LLaDA-8B": Published(_RND1, {"MMLU": 65.9, "BBH": 47.4, "ARC-C": 47.5, "GSM8K": 70.9, "MBPP": 39.0}),
    "LLaDA-MoE-7B-A1B": Published(_LLADA_MOE, {"MMLU": 64.59, "GSM8K": 66.41, "MBPP": 52.4}),
    # RND1's base, autoregressive.
    "Qwen3-30B-A3B": Published(
        "Qwen Team (2025), arXiv 2505.09388, table 5", {"MMLU": 81.38, "BBH": 81.54, "GSM8K": 91.81, "MBPP": 74.4}
    ),
}

# The harness's task or group -> benchmark.
BENCHMARKS = {
    "mmlu": "MMLU",
    "bbh_cot_fewshot": "BBH",
    "arc_challenge": "ARC-C",
    "race": "RACE",
    "gsm8k": "GSM8K",
    "mbpp_in_subprocess": "MBPP",
}


def sources() -> str:
    """Each source with the models that it is about."""
    models: dict[str, list[str]] = {}
    for name, published in PUBLISHED.items():
        models.setdefault(published.source, []).append(name)
    return "; ".join(f"{', '.join(names)}: {source}" for source, names in models.items())


def published_table() -> str:
    """All of it as Markdown; docs/evaluation.md has a copy."""
    names = list(dict.fromkeys(BENCHMARKS.values()))
    lines = [f"| model | {' | '.join(names)} | source |", f"|{' --- |' * (len(names) + 2)}"]
    for model, published in PUBLISHED.items():
        cells = [f"{published.scores[name]:.1f}" if name in published.scores else "" for name in names]
        lines.append(f"| {' | '.join([model, *cells, published.source])} |")
    return "\n".join(lines) + "\n"
