"""Detection of activation recomputation: a recomputed layer runs forward twice, hooks that count skip the second."""

from __future__ import annotations

import torch


def is_recomputed() -> bool:
    """Whether what runs now is a layer's second forward pass; torch.utils.checkpoint asks the same."""
    return torch._C._current_graph_task_id() != -1
