"""What the mask token's row of the embedding holds when conversion begins.

The row is one that text never used: pretraining has left it near where it was initialised, away from all that the model
knows. The mean of all rows is a token like any other, and like none (--mask-embedding mean).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_a2d.training.setup import TrainState


@torch.no_grad()
def set_to_mean(state: TrainState, mask_token_id: int) -> None:
    """The row becomes the mean of all rows, the head's too where it is tied to the embedding. Collective."""
    for model in state.models:
        tables = [model.embedding.word_embeddings.weight] if model.pre_process else []
        if model.share_embeddings_and_output_weights and model.post_process and not model.pre_process:
            tables.append(model.output_layer.weight)  # the last stage has a copy of its own
        for table in tables:
            rows = len(table)
            mean = table.double().sum(0)
            dist.all_reduce(mean, group=parallel_state.get_tensor_model_parallel_group())
            mean /= rows * parallel_state.get_tensor_model_parallel_world_size()
            row = mask_token_id - rows * parallel_state.get_tensor_model_parallel_rank()
            if 0 <= row < rows:
                table[row] = mean.to(table)
    state.optimizer.reload_model_params()
