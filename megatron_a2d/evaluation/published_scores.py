"""Published benchmark scores of diffusion language models, for comparison; harnesses and prompts differ.

RND1, Dream-7B and LLaDA-8B as compared by Radical Numerics (2025), "Training Diffusion Language Models at Scale using
Autoregressive Models" (radicalnumerics.ai/blog/rnd1). RACE was tested there, but no figure was given in text.
"""

from __future__ import annotations

SOURCE = "Radical Numerics (2025), radicalnumerics.ai/blog/rnd1"
MODELS = ("RND1-Base", "Dream-7B", "LLaDA-8B")

# Benchmark -> percent per model of MODELS.
SCORES: dict[str, tuple[float | None, float | None, float | None]] = {
    "MMLU": (69.6, 69.5, 65.9),
    "BBH": (67.5, 57.9, 47.4),
    "ARC-C": (63.2, 59.8, 47.5),
    "RACE": (None, None, None),
    "GSM8K": (80.0, 77.2, 70.9),
    "MBPP": (65.4, 56.2, 39.0),
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
