"""Hugging Face Qwen3-MoE directory with random weights, for a newly trained tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_a2d.terminal.console import console, human


def write_untrained_model(directory: Path, tokenizer: Path, **shape: Any) -> None:
    """Write a model with random weights; `shape`: keys of config.json."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    ids = json.loads((tokenizer / "tokenizer_config.json").read_text())
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())
    id_of = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    special = {"eos_token_id": id_of[ids["eos_token"]], "pad_token_id": id_of[ids["pad_token"]]}
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        **shape, norm_topk_prob=True, max_position_embeddings=2048, rope_theta=1e6, tie_word_embeddings=False, **special
    )
    torch.manual_seed(1234)
    model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)
    console.print(f"{directory}: Qwen3MoeForCausalLM, {human(model.num_parameters())} parameters, untrained")
