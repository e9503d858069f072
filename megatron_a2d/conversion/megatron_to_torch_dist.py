"""Conversion of a checkpoint of Megatron-LM, Megatron-Bridge or NeMo 2 to ours, streamed as hf_to_torch_dist.py does.

Optimizer state, learning-rate schedule and random states are not converted: they depend on the writer's settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_a2d.checkpoint.directory import read_license
from megatron_a2d.conversion.hf_to_torch_dist import Converted, Options, check_mask_token, write_release
from megatron_a2d.conversion.mask_token import choose_mask_token, read_tokenizer_config, read_tokens
from megatron_a2d.conversion.megatron_checkpoint import MegatronModel, open_megatron
from megatron_a2d.utils.atomic_write import check_new_directory
from megatron_a2d.utils.errors import UserError


def convert_megatron(
    checkpoint: Path,
    out: Path,
    hf_model: Path | None = None,
    mask_token_id: int | None = None,
    vocab_size: int | None = None,
    origin: str | None = None,
    options: Options = Options(),  # noqa: B008  (immutable)
) -> Converted:
    """Write the model of `checkpoint` as the release checkpoint `out`.

    `hf_model`: a directory with its config.json, its tokenizer, or both, where the checkpoint has none; `origin`: its
    hub id, for model cards. `vocab_size`: rows of the embedding that are not padding. Raises UserError, and leaves
    nothing behind, if tensors and settings are not exactly those of a model of a supported family.
    """
    check_new_directory(out, "--out")
    with open_megatron(checkpoint, hf_model, vocab_size) as model:
        config, weights, tokenizer = dict(model.config), model.weights, model.tokenizer
        if hf_model and (hf_model / "config.json").is_file():
            check_mask_token(hf_model, mask_token_id, weights.model_config.mask_token_id)
        config["mask_token_id"] = _mask_token(model, mask_token_id)
        if "eos_token_id" not in config and tokenizer and (end := _end_token(tokenizer)) is not None:
            config["eos_token_id"] = end
        if origin:
            config["_name_or_path"] = origin
        if hf_model and (license_name := read_license(hf_model)):
            config["_license"] = license_name
        return write_release(weights, config, tokenizer, out, options)


def _mask_token(model: MegatronModel, requested: int | None) -> int:
    """The mask token, chosen as for other models; if all ids are in use, the error suggests a row of the padding."""
    size, configured = model.weights.model_config.vocab_size, model.weights.model_config.mask_token_id
    where = model.tokenizer or model.weights.directory
    try:
        return choose_mask_token(where, size, requested, configured)
    except UserError as error:
        if size == model.padded_vocab_size or not set(range(size)) <= set(read_tokens(where)):
            raise
        padding = f"; or keep a row of the padding for it: --vocab-size {size + 1}"
        raise UserError([problem + padding for problem in error.problems]) from None


def _end_token(tokenizer: Path) -> int | None:
    """The id of the tokenizer's eos_token; None if it declares none."""
    declared: Any = read_tokenizer_config(tokenizer).get("eos_token")
    name = declared.get("content") if isinstance(declared, dict) else declared
    return next((number for number, token in read_tokens(tokenizer).items() if token == name), None)
