"""HF models in one process: our exports, SDAR's, Dream's and LLaDA's models, autoregressive ones for --objective ar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_a2d.checkpoint.model_files import check_model_files
from megatron_a2d.checkpoint.tensor_rows import RowRange, slabs
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import read_model_config
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.conversion.hf_config import Exported, config_json, num_diffusion_steps
from megatron_a2d.conversion.mask_token import is_in_text, read_tokens
from megatron_a2d.conversion.sources import EMBEDDING, HEAD, Weights, open_hf
from megatron_a2d.diffusion.attention_masks import block_causal_mask
from megatron_a2d.diffusion.block_diffusion import BlockModel
from megatron_a2d.diffusion.model_interface import Model, Reduce, Request
from megatron_a2d.families.registry import (
    autoregressive_types,
    diffusion_types,
    is_diffusion_family,
    read_config,
    twin_remedy,
)
from megatron_a2d.hf.configuration_a2d import A2DConfig
from megatron_a2d.hf.load_hf_model import diffusion_classes, load
from megatron_a2d.hf.modeling_a2d import A2DForMaskedLM
from megatron_a2d.inference.loaded_model import LoadedModel, load_tokenizer, pad_token
from megatron_a2d.inference.packed_windows import PackedWindows
from megatron_a2d.megatron_compat.device import device, has_cuda
from megatron_a2d.utils.errors import UserError

DIFFUSION_TYPES = diffusion_classes()
AUTOREGRESSIVE_TYPES = autoregressive_types()
# Diffusion models whose own code is not ours: our classes run their tensors, as they do DiffuLLaMA's, a Llama by name.
DESCRIBED_TYPES = tuple(name for name in diffusion_types() if name not in DIFFUSION_TYPES)


def load_hf_model(directory: str | Path, objective: str = "mdlm") -> LoadedModel:
    """Load model and tokenizer of an HF directory, onto the GPU if there is one. UserError if it is unusable."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"--model {directory}: there is no such directory; give one that export_hf wrote")
    check_model_files(directory)
    config = read_config(directory)
    _check_type(directory, config, objective)
    described = is_diffusion_family(config) and config["model_type"] not in DIFFUSION_TYPES
    model_config, trained = read_model_config(directory), read_trained(directory)
    is_diffusion = objective != "ar"
    if is_diffusion and trained.objective == "block":
        objective = "block"
    mask = model_config.mask_token_id if is_diffusion else -1
    tokenizer = load_tokenizer(directory, model_config.vocab_size)
    if is_diffusion:
        check_mask_token(directory, mask, model_config.vocab_size)
    ends = read_end_tokens(directory, model_config.vocab_size)
    with open_hf(directory) as weights:  # UserError unless it holds exactly the model's tensors, in their shapes
        if described:
            model = _of_described(weights, Exported(model_config, config, {}, "float32", trained, ends))
    if not described:
        model = _load(directory, DIFFUSION_TYPES.get(config["model_type"], transformers.AutoModelForCausalLM))
    forward: Model = TransformersModel(model)
    block_length, causal_context = 0, False
    if objective == "block":
        block_length, causal_context = trained.block_length, trained.ar_loss_weight > 0
        forward = BlockModel(forward, int(mask or 0), block_length, causal_context)
    return LoadedModel(
        forward=forward,
        tokenizer=tokenizer,
        name=str(directory),
        objective=objective,
        model_config=model_config,
        vocab_size=model_config.vocab_size,
        mask_token_id=int(mask if mask is not None else -1),
        end_token_ids=ends.ids,
        document_token_id=ends.document,
        label_shift=trained.label_shift,
        noise_schedule=trained.noise_schedule,
        reset_attention_mask=trained.reset_attention_mask,
        max_positions=model_config.context_length,
        num_diffusion_steps=num_diffusion_steps(config),
        has_caches=is_diffusion,
        device=model.device,
        pad_token_id=pad_token(directory, config, ends),
        block_length=block_length,
        causal_context=causal_context,
    )


def check_mask_token(directory: Path, mask: Any, vocab_size: int) -> None:
    """UserError unless `mask` is a token id that no text uses."""
    path = directory / "config.json"
    if not isinstance(mask, int) or not 0 <= mask < vocab_size:
        raise UserError(
            f"{path}: mask_token_id is {mask!r}, not a token of the model (0 to {vocab_size - 1}); "
            "write the id that the model was trained with into the file"
        )
    tokens = read_tokens(directory)
    token = tokens.get(mask, "")
    if is_in_text(directory, mask, tokens) and "mask" not in token.lower():
        raise UserError(
            f"{path}: mask_token_id is {mask}, which the tokenizer uses for {token!r}; write the id that the model "
            "was trained with into the file, or use the model's own tokenizer"
        )


def _check_type(directory: Path, config: dict[str, Any], objective: str) -> None:
    model_type = config.get("model_type")
    if objective == "ar":
        if model_type not in AUTOREGRESSIVE_TYPES or is_diffusion_family(config):
            raise UserError(
                f"--model {directory}: model_type {model_type!r} is not an autoregressive model of "
                f"a supported family ({' or '.join(AUTOREGRESSIVE_TYPES)}); remove --objective ar for a diffusion model"
            )
    elif not is_diffusion_family(config) and model_type not in DESCRIBED_TYPES:
        remedy = "convert it, train it and export it first"
        if config.get("objective") == "block":  # the causal half of a model with a co-loss
            remedy = "export its checkpoint with --format a2d"
        elif model_type in AUTOREGRESSIVE_TYPES:
            remedy = f"give --objective ar to evaluate it as it is, or {remedy}"
        raise UserError(
            f"--model {directory}: model_type {model_type!r} is not one of the diffusion models that are known "
            f"({', '.join([*DIFFUSION_TYPES, *DESCRIBED_TYPES])}); {remedy}" + twin_remedy(config)
        )


def _load(directory: Path, model_class: Any) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, report = load(
        model_class, directory, dtype="auto" if has_cuda() else torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = ", ".join(sorted(map(str, report[kind]))[:3])
            raise UserError(
                f"--model {directory}: {len(report[kind])} {kind.replace('_', ' ')} ({names}, ...); "
                "its weights and config.json do not belong together, export the model again"
            )
    return model.eval().to(device())


def _of_described(weights: Weights, described: Exported) -> A2DForMaskedLM:
    """A model of a supported family, in our classes, whose tensors have the standard names."""
    named = config_json("a2d", described)
    config = A2DConfig(**{key: value for key, value in named.items() if key not in ("model_type", "auto_map")})
    with torch.device("meta"):
        model = A2DForMaskedLM(config)
    dtype = None if has_cuda() else torch.float32
    state = {}
    for name, shape in weights.tensors.shapes.items():
        rows = [weights.tensors.read(RowRange(name, (), *span)) for span in slabs(shape, 0, shape[0], 4)]
        state[name] = torch.cat(rows).to(dtype=dtype)
    if described.model_config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False).to(device())


class TransformersModel:
    """A transformers model with `.model` and `.lm_head` as a `Model` (diffusion/model_interface.py)."""

    def __init__(self, model: Any):
        self.model = model
        self._windows = PackedWindows()

    @torch.no_grad()
    def __call__(self, request: Request, reduce: Reduce) -> tuple[Tensor, ...]:
        inputs: dict[str, Any] = {}
        if request.window is not None:
            request, inputs["cache"] = self._windows.pack(request, request.window)
        elif request.levels is not None:
            see_BLL = block_causal_mask(request.levels, request.levels) & request.visible[:, None, :]
            inputs["visible"] = see_BLL[:, None]
        elif not bool(request.visible.all()):
            inputs["attention_mask"] = request.visible.long()
        if request.positions is not None:
            inputs["position_ids"] = request.positions
        hidden_BLD = self.model.model(input_ids=request.tokens, **inputs)[0]
        return reduce(hidden_BLD[request.needed], self.model.lm_head)
