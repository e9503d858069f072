"""The auxiliary losses by their definition: the whole global batch in one graph of one process, and autograd.

Nothing of model/load_balancing.py is used; the loss, with its auxiliary terms, is divided before the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_a2d.config.balancing_config import BalancingConfig
from megatron_a2d.config.settings import RunConfig, build
from megatron_a2d.model.router import Router
from megatron_a2d.training.optimizer import update_parameters
from megatron_a2d.training.param_gather import zero_gradients
from megatron_a2d.training.train_step import find_loss_positions
from tests.parity import parity_jobs
from tests.parity.parity_jobs import SETTINGS
from tests.tiny import MASK_TOKEN_ID


def defined_steps(checkpoint: str, settings: dict[str, Any], save_reference: str, num_steps: int = 2) -> dict[str, Any]:
    """What parity_jobs.train_steps returns and saves as a reference, by the definition."""
    wanted = build({**SETTINGS, **settings})
    plain = {name: value for name, value in settings.items() if not hasattr(BalancingConfig, name)}
    _, state, batches = parity_jobs._start(checkpoint, {**plain, "micro_batch_size": SETTINGS["global_batch_size"]})
    losses, norms, gradients = [], [], {}
    previous: list[Tensor] | None = None
    for _ in range(num_steps):
        state.scheduler.step(1)
        zero_gradients(state.chunks, state.optimizer)
        (batch,) = parity_jobs._one_iteration(batches)
        where = find_loss_positions(batch)
        with _logits_of_layers() as logits_of_layers:
            output = state.chunks[0](
                batch.tokens, where.labels, where.indices, batch.documents, batch.positions, batch.annealing, batch.levels
            )  # fmt: skip
        loss = (output.losses * where.weights).sum() / batch.num_maskable.sum()
        kinds = batch.tokens.T == MASK_TOKEN_ID
        chosen = [_one_hot(logits, state.models[0].config.moe_router_topk) for logits in logits_of_layers]
        counts = [_by_kind(layer, kinds) for layer in chosen]
        uses = counts if previous is None or wanted.balancing.moe_aux_loss_loads == "current" else previous
        terms = [
            _auxiliary(wanted, logits, layer, kinds, load)
            for logits, layer, load in zip(logits_of_layers, chosen, uses, strict=True)
        ]
        previous = counts
        (loss + sum(terms)).backward()  # DistributedDataParallel's hooks add to main_grad
        gradients = parity_jobs._global_shards(state, parity_jobs._gradient)
        norms.append(update_parameters(state.optimizer))
        losses.append(float(loss))
    seen = {"gradients": gradients, "parameters": parity_jobs._global_shards(state, lambda p: p.data)}
    torch.save({name: parity_jobs._assemble(shards) for name, shards in seen.items()}, save_reference)
    return {"losses": losses, "grad_norms": norms}


@contextmanager
def _logits_of_layers() -> Iterator[list[Tensor]]:
    """The routers' logits [s, b, E], layer after layer, within their graph."""
    seen: list[Tensor] = []
    routing = Router.routing

    def watched(self: Router, logits: Tensor, padding_mask: Any = None) -> Any:
        seen.append(logits)
        return routing(self, logits, padding_mask)

    with mock.patch.object(Router, "routing", watched):
        yield seen


def _one_hot(logits: Tensor, top: int) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, logits.topk(top, -1).indices, 1.0).detach()


def _by_kind(chosen: Tensor, masked: Tensor) -> Tensor:
    """[kind, expert]: choices of the whole batch."""
    return torch.stack([chosen[~masked].sum(0), chosen[masked].sum(0)])


def _auxiliary(config: RunConfig, logits: Tensor, chosen: Tensor, masked: Tensor, loads: Tensor) -> Tensor:
    """A layer's terms: one sum over samples, positions and experts, in plain loops over samples and kinds."""
    settings, probabilities = config.balancing, torch.softmax(logits, -1)
    num_tokens, num_experts = masked.numel(), logits.size(-1)
    total = torch.zeros(())
    for sample in range(logits.size(1)):
        own = _by_kind(chosen[:, sample], masked[:, sample])
        counts = loads if settings.moe_router_load_balancing_type == "global_aux_loss" else own
        for kind in (0, 1):
            here = masked[:, sample] == bool(kind)
            if settings.moe_aux_loss_tokens == "unmasked" and kind == 1:
                continue
            of_group = counts[kind] if settings.moe_aux_loss_tokens != "all" else counts.sum(0)
            if here.any() and settings.moe_router_load_balancing_type != "none":
                shares = of_group / of_group.sum()
                total = total + (probabilities[here, sample] * shares * num_experts).sum()
    z = torch.logsumexp(logits, -1).square().sum()
    return (settings.moe_aux_loss_coeff * total + settings.moe_z_loss_coeff * z) / num_tokens
