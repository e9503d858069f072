"""Tiny random models, of Qwen3 and of the other families, as objects and as ordinary Hugging Face directories.

    hf_model("moe")                      a transformers model in fp32
    write_hf(path, "dense_tied")         config.json, weights, tokenizer: what a download from the hub holds

Norm weights are random too: with all ones, swapped norms would go unnoticed. No two axes of a matrix have
the same size: hidden 64, 4 query heads of 24 = 96 rows, 2 KV heads = 48 rows, MLP 160, experts 40.
"""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch

KINDS = ("dense", "dense_tied", "moe")
# Of the other families that transformers has classes for: what they change in the config.json of `dense`.
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": None, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": QWEN2,
    "llama": LLAMA,
    "llama3": {
        **LLAMA,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2_tied": {**QWEN2, "head_dim": None, "tie_word_embeddings": True},  # as published: heads fill the hidden size
}
VOCAB_SIZE = 256
NUM_TOKENS = 250  # used by the tokenizer; the mask token is the next id
MASK_TOKEN_ID = NUM_TOKENS
END_OF_TEXT, TURN_START, TURN_END = 0, 1, 2
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def hub_config(kind: str, **overrides: Any) -> dict[str, Any]:
    """config.json as on the hub, with the names of transformers 4."""
    assert kind in KINDS or kind in FAMILIES, kind
    moe = kind == "moe"
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 160,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 4,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": kind == "dense_tied",
        "use_cache": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": TURN_END,
        "torch_dtype": "float32",
    }
    if moe:
        config |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    config |= {**FAMILIES.get(kind, {}), **overrides}
    own = FAMILIES.get(kind, {})
    # transformers writes into what it is given
    return copy.deepcopy({key: value for key, value in config.items() if value is not None or key not in own})


def hf_model(kind: str, seed: int = 0, gate_scale: float = 0.5, **overrides: Any) -> Any:
    """A model of transformers in fp32, eval mode; `overrides` are keys of config.json.

    `gate_scale`: of the router's weights; at 0.5 a token all but decides for one expert, which rounding can change.
    """
    import transformers

    config = hub_config(kind, **overrides)
    model_class = getattr(transformers, config["architectures"][0])
    # The class knows its own name and type; the type of the weights is fp32 here.
    ours = ("architectures", "model_type", "torch_dtype")
    hf_config = model_class.config_class(**{key: value for key, value in config.items() if key not in ours})
    hf_config._attn_implementation = "sdpa"
    model = model_class(hf_config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter_name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            else:
                scale = gate_scale if parameter_name.endswith("mlp.gate.weight") else 0.08
                parameter.copy_(scale * noise)
    return model.eval()


def write_hf(
    directory: str | Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    gate_scale: float = 0.5,
    **overrides: Any,
) -> Path:
    """Write a model with its tokenizer into `directory`, which is made; returns its path."""
    directory = Path(directory)
    model = hf_model(kind, seed, gate_scale, **overrides).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    config = hub_config(kind, **overrides) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    generation = {
        "bos_token_id": END_OF_TEXT,
        "do_sample": True,
        "eos_token_id": [TURN_END, END_OF_TEXT],
        "pad_token_id": END_OF_TEXT,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer for ASCII text: 3 special tokens, 97 characters, 150 pairs of letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Byte-level BPE spells space, newline and tab as visible letters.
    characters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    pairs = list(itertools.islice(itertools.product("etaoinshrdluĠ", "etaoinshrdlu"), NUM_TOKENS - 3 - len(characters)))
    tokens = [*SPECIAL_TOKENS, *characters, *(first + second for first, second in pairs)]
    assert len(set(tokens)) == NUM_TOKENS
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS[TURN_END],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def declare_mask(directory: Path) -> None:
    """Make a Llama of 900 tokens a DiffuLLaMA: its tokenizer has a token of text that is the mask."""
    from megatron_a2d.families.diffullama import MASK_TOKEN, MASK_TOKEN_ID

    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][MASK_TOKEN] = MASK_TOKEN_ID
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "special_tokens_map.json").write_text(json.dumps({"mask_token": MASK_TOKEN}))


def write_tokens(prefix: Path, num_documents: int, vocabulary: int, seed: int) -> None:
    """Random documents of 20 to 200 tokens."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(num_documents):
        tokens = random.integers(0, vocabulary, random.integers(20, 200))
        builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
