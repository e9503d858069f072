"""Models loaded from a training checkpoint in parallel, in any layout of tensor, expert and pipeline parallelism.

Every rank runs the same sampler on the same batch with the results of one rank, the first of the last pipeline stage.
So stages without logits can follow, and rounding cannot make ranks diverge and deadlock. Data-parallel ranks duplicate
the work; experts are distributed over them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_a2d.checkpoint.directory import HF_FILES, resolve
from megatron_a2d.checkpoint.load import load_state
from megatron_a2d.checkpoint.state_dict import fill_models, models_to_load
from megatron_a2d.checkpoint.torch_dist_reader import has_expert_bias
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.config.model_config import ModelConfig, read_model_config
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.config.validate import find_problems
from megatron_a2d.conversion.end_tokens import read_end_tokens
from megatron_a2d.conversion.hf_config import num_diffusion_steps
from megatron_a2d.conversion.sources import open_checkpoint
from megatron_a2d.diffusion.block_diffusion import BlockModel
from megatron_a2d.diffusion.model_interface import Model, Reduce, Request
from megatron_a2d.distributed import process_groups
from megatron_a2d.hf.kv_cache_a2d import KeyValueCache
from megatron_a2d.inference.hf_model import check_mask_token
from megatron_a2d.inference.loaded_model import LoadedModel, load_tokenizer, pad_token
from megatron_a2d.inference.packed_windows import PackedWindows
from megatron_a2d.megatron_compat.device import device
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.training.initialization import build_model
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError


def load_parallel_model(path: str | Path, values: dict[str, Any], objective: str = "mdlm") -> LoadedModel:
    """Load the model of a checkpoint in the parallel layout `values` (names of LAYOUT). Collective under torchrun.

    Objective and label shift come from the checkpoint; `objective` is that of a converted, untrained model.
    """
    directory = resolve(path)
    hf_files = directory / HF_FILES
    model_config = read_model_config(hf_files)
    trained = read_trained(directory)
    if objective == "mdlm" and trained.objective == "block":
        objective = "block"  # masked diffusion too, with other attention
    if trained.objective not in (None, objective):
        raise UserError(
            f"--model {path}: was trained with --objective {trained.objective}, not {objective}; give that objective"
        )
    processes = dist.get_world_size() if dist.is_initialized() else process_groups.world_size()
    longest = model_config.context_length // (tp := values.get("tensor_model_parallel_size", 1) or 1) * tp
    block = {name: getattr(trained, name) for name in ("block_length", "ar_loss_weight") if objective == "block"}
    block["moe_router_enable_expert_bias"] = has_expert_bias(directory)
    config = build({**values, **block, "objective": objective, "global_batch_size": processes, "seq_length": longest})
    if problems := find_problems(config, model_config, processes):
        raise UserError(problems)
    mask = model_config.mask_token_id if objective != "ar" else -1
    tokenizer = load_tokenizer(hf_files, model_config.vocab_size)
    if objective != "ar":
        check_mask_token(hf_files, mask, model_config.vocab_size)
    ends = read_end_tokens(hf_files, model_config.vocab_size)
    with open_checkpoint(directory, allow_expert_bias=True):
        pass  # UserError unless the checkpoint holds exactly the tensors of the model, in their shapes
    process_groups.initialize(config.parallel)
    model = load_weights(model_config, config, directory)
    hf_config = read_json(hf_files / "config.json", "the model's configuration")
    forward: Model = ParallelModel(model, config)
    causal_context = config.diffusion.ar_loss_weight > 0
    if objective == "block":
        forward = BlockModel(forward, int(mask or 0), config.diffusion.block_length, causal_context)
    return LoadedModel(
        forward=forward,
        tokenizer=tokenizer,
        name=str(path),
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
        num_diffusion_steps=num_diffusion_steps(hf_config),
        has_caches=objective == "block",  # other objectives may have Transformer Engine's attention
        device=device(),
        pad_token_id=pad_token(hf_files, hf_config, ends),
        is_output_rank=dist.get_rank() == 0,
        block_length=config.diffusion.block_length,
        causal_context=causal_context,
    )


def load_weights(model_config: ModelConfig, config: RunConfig, directory: Path) -> DiffusionLM:
    """This rank's shards of the model, in eval mode, without an optimizer. Collective."""
    model = build_model(model_config, config)
    fill_models([model], load_state(models_to_load([model]), directory))
    return model.eval()


class ParallelModel:
    """A `Model` (diffusion/model_interface.py); all ranks call it with the same request and get the same result."""

    def __init__(self, model: DiffusionLM, config: RunConfig):
        self.model = model
        self._windows = PackedWindows()
        layout = config.parallel
        self._seq_shards = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
        owns_results = [False] * dist.get_world_size()
        dist.all_gather_object(owns_results, process_groups.owns_loss())
        self._source = owns_results.index(True)

    @torch.no_grad()
    def __call__(self, request: Request, reduce: Reduce) -> tuple[Tensor, ...]:
        cache = None
        if request.window is not None:
            request, cache = self._windows.pack(request, request.window)
        batch, length = request.tokens.shape
        padding = -length % self._seq_shards  # sequence parallelism shards the sequence evenly
        request = Request(*(None if rows is None else F.pad(rows, (0, padding)) for rows in request))  # type: ignore[arg-type]
        results = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, request, cache, reduce),
            data_iterator=None,
            model=[self.model],
            num_microbatches=1,
            seq_length=length + padding,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
        box = [[column.cpu() for column in results[0]] if results else None]
        dist.broadcast_object_list(box, src=self._source)
        assert box[0] is not None
        return tuple(column.to(request.tokens.device) for column in box[0])


def _forward_step(
    request: Request, cache: KeyValueCache | None, reduce: Reduce, batches: Any, model: DiffusionLM
) -> tuple[Tensor, Any]:
    """megatron's `forward_step_func`: hidden states between stages, those of the needed positions on the last."""
    # Padding is masked off as a separate document.
    documents = None if bool(request.visible.all()) else (~request.visible).long()
    hidden = model.hidden_states(
        request.tokens,
        indices_N=request.needed.flatten().nonzero()[:, 0],
        documents=documents,
        positions=request.positions,
        levels=request.levels,
        cache=cache,
    )
    return hidden, lambda rows, non_loss_data: reduce(rows, model.head)
