"""A loaded model, from an HF model or a sharded checkpoint, with the facts that sampling and evaluation need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.conversion.end_tokens import EndTokens
from megatron_a2d.diffusion.model_interface import Model
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.tokenizer import read_tokenizer
from megatron_a2d.utils.vocabulary_files import has_vocabulary_files, tokenizer_of


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and what sampling and evaluation need to know about it."""

    forward: Model
    tokenizer: Tokenizer
    name: str  # as the user gave it
    objective: str  # mdlm, block or ar
    model_config: ModelConfig
    vocab_size: int
    mask_token_id: int  # -1 for an autoregressive model
    end_token_ids: tuple[int, ...]  # a text ends at the first of these tokens (conversion/end_tokens.py)
    label_shift: bool
    max_positions: int
    num_diffusion_steps: int
    has_caches: bool
    device: torch.device
    # The document separator of the training data, also the empty context; None: no file of the model names one.
    document_token_id: int | None = None
    # The training settings, the defaults of held-out evaluation.
    noise_schedule: str = "linear"
    reset_attention_mask: bool = False
    # The public package's reserved slot holds it.
    pad_token_id: int = 0
    # Block diffusion only.
    block_length: int = 0
    causal_context: bool = False
    # One of the processes of a parallel model prints and writes files.
    is_output_rank: bool = True

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def load_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, checked against the model's vocabulary."""
    path = directory / "tokenizer.json"
    if has_vocabulary_files(directory):
        tokenizer = tokenizer_of(directory)
    elif path.exists():
        tokenizer = read_tokenizer(path, str(path))
    else:
        raise UserError(f"{path}: the tokenizer is missing; copy it from the model that this one was made from")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"{path}: has token id {largest}, and the model has {vocab_size} tokens; use the model's own tokenizer"
        )
    return tokenizer


def pad_token(directory: Path, config: Mapping[str, Any], ends: EndTokens) -> int:
    """The padding token: config.json's, else generation_config.json's, else the first end-of-text token, else 0."""
    path = directory / "generation_config.json"
    generation = read_json(path, "the generation settings") if path.exists() else {}
    for value in (config.get("pad_token_id"), generation.get("pad_token_id"), *ends.ids):
        if isinstance(value, int):
            return value
    return 0
