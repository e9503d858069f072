"""Tiny Qwen3 and Qwen3-MoE models of transformers, and exports of them with our modelling code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_a2d.hf import CODE_FILES
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
KINDS = {
    "dense": {},
    "dense_tied": {"tie_word_embeddings": True},
    "moe": MOE,
    "moe_raw_probabilities": {**MOE, "norm_topk_prob": False},
}
AUTO_MAP = {
    "a2d": ("configuration_a2d.A2DConfig", "modeling_a2d.A2DModel", "modeling_a2d.A2DForMaskedLM"),
    "rnd1": ("configuration_rnd.RND1Config", "modeling_rnd.RND1Model", "modeling_rnd.RND1LM"),
}


def qwen3(kind: str) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """A tiny model in fp32; norm weights are random, because ones would hide a swap."""
    torch.manual_seed(0)
    if "num_experts" in KINDS[kind]:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | KINDS[kind]))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES | KINDS[kind]))
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape) + (1 if "norm" in name else 0))
    return model.eval()


def write_export(model: torch.nn.Module, directory: Path, kind: str = "a2d", **changes: object) -> Path:
    """What an export is: Hugging Face's tensors, a config.json of ours, our code."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    auto_map = dict(zip(("AutoConfig", "AutoModel", "AutoModelForMaskedLM"), AUTO_MAP[kind], strict=True))
    config = json.loads(path.read_text()) | {"model_type": kind, "mask_token_id": 96, "auto_map": auto_map}
    path.write_text(json.dumps(config | changes))
    for file in CODE_FILES[kind]:
        shutil.copy(file, directory)
    return directory


def export_and_load(kind: str, tmp_path: Path, **changes: object) -> tuple[torch.nn.Module, A2DForMaskedLM]:
    model = qwen3(kind)
    directory = write_export(model, tmp_path / "export", **changes)
    ours, report = A2DForMaskedLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model, ours.eval()


def tokens(batch: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(3))
