"""Tiny exports with random weights and a tokenizer of bytes, one of each format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.configuration_rnd import RND1Config
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.hf.modeling_rnd import RND1LM

VOCAB = 300


def byte_tokenizer() -> Tokenizer:
    """All bytes, a few merges, and the two special tokens at the end of a vocabulary of VOCAB."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|mask|>"])
    return tokenizer


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    """One export of each format, and of block diffusion without and with an autoregressive co-loss; random weights."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 200, "rope_theta": 1e6,
        "mask_token_id": tokenizer.token_to_id("<|mask|>"), "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "num_diffusion_steps": 8, "initializer_range": 0.3,
    }  # fmt: skip
    blocks = {"objective": "block", "block_length": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    directories = {}
    for kind, model in (
        ("a2d", A2DForMaskedLM(A2DConfig(**sizes))),
        ("rnd1", RND1LM(RND1Config(**sizes | experts))),
        ("block", A2DForMaskedLM(A2DConfig(**sizes | blocks))),
        ("co_loss", A2DForMaskedLM(A2DConfig(**sizes | blocks, ar_loss_weight=0.5))),
    ):
        directories[kind] = tmp_path_factory.mktemp(kind)
        model.save_pretrained(directories[kind])
        tokenizer.save(str(directories[kind] / "tokenizer.json"))
    return directories
