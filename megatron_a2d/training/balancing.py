"""Load balancing in a run: what model/load_balancing.py needs to know about the global batch.

    RunBalancing.count      the loads of a global batch, by a forward pass without gradients, where they are not known
    RunBalancing.passes     D / N of the global batch, and the counts of its choices
    RunBalancing.end_step   the counts of all ranks, which are the next step's loads; the update of the experts' biases

global_aux_loss needs the loads of a whole global batch before its first micro-batch is computed. By default they are
the previous step's, which cost nothing and are the same in every layout; they are kept in the checkpoint, so that a
resumed run is the unbroken one. A run's first step counts its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.data.dataloader import Batch
from megatron_a2d.megatron_compat.device import device, send
from megatron_a2d.model.diffusion_lm import DiffusionLM
from megatron_a2d.model.load_balancing import LoadBalancing
from megatron_a2d.model.router import routers

_ANNEALED_SHARE = 0.1  # of the run, at its end: the experts' biases go to zero


class AuxLosses(NamedTuple):
    """Means over the tokens and layers of a step, the same on all ranks; float64 scalars."""

    aux_loss: Tensor  # 1 in balanced layers
    z_loss: Tensor
    dropped_frac: Tensor  # of choices, by --moe-expert-capacity-factor


class RunBalancing:
    """The load balancing of a run's routers; does nothing in a run that neither balances nor observes them."""

    def __init__(self, models: list[DiffusionLM], config: RunConfig, mask_token_id: int | None):
        settings = config.balancing
        self._settings, self._num_iterations = settings, config.num_iterations
        self._routers = [router for model in models for router in routers(model)]
        self.routing = LoadBalancing(settings, models[0].config, mask_token_id)
        for model in models:
            model.watch_tokens, model.balancing = self.routing.see_tokens, self
        for router in self._routers:
            router.balancing = self.routing
        self.is_observed = False  # counts are wanted in any case
        self.is_paused = False  # steps that do not train the routers (grafting.py)
        self._is_global = settings.moe_router_load_balancing_type == "global_aux_loss"

    @property
    def _balances(self) -> bool:
        return self._settings.balances and not self.is_paused

    @property
    def lacks_loads(self) -> bool:
        """Whether the loss needs loads, and none are known yet."""
        return self._is_global and not self.is_paused and self.routing.loads is None

    @property
    def counts_first(self) -> bool:
        """Whether a step begins with a count of its own loads."""
        current = self._is_global and not self.is_paused and self._settings.moe_aux_loss_loads == "current"
        return self.lacks_loads or current

    @contextmanager
    def count(self) -> Iterator[None]:
        """Context around a forward pass of a global batch without gradients, which counts its loads. Collective."""
        with self.routing.counting():
            yield
        self.routing.loads = self.routing.choices.clone()
        dist.all_reduce(self.routing.loads)

    @contextmanager
    def passes(self, micro_batches: list[Batch]) -> Iterator[None]:
        """Context around the forward and backward passes of a global batch. Collective."""
        if not (self._balances or self.is_observed):
            yield
            return
        with self.routing.training(_maskable_share(micro_batches) if self._balances else None):
            yield

    def end_step(self, has_updated: bool) -> AuxLosses | None:
        """Take the counts of the step, whose gradients were applied if it `has_updated`. Collective."""
        if not self._balances:
            return None
        routing = self.routing
        counts = torch.cat([routing.choices.double(), routing.num_dropped[..., None].double()], dim=-1)
        columns = torch.cat([counts.flatten(1), routing.losses], dim=1)
        dist.all_reduce(columns)
        counts, losses = columns[:, :-2].view_as(counts), columns[:, -2:]
        routing.loads = counts[..., :-1].long()
        if has_updated:
            self._update_biases(routing.loads)
        choices = routing.loads.sum()
        means = losses.sum(0) / (choices / routing.choices_per_token)
        return AuxLosses(means[0], means[1], counts[..., -1].sum() / choices)

    @torch.no_grad()
    def _update_biases(self, loads: Tensor) -> None:
        """Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1."""
        rate = self._settings.moe_router_bias_update_rate
        for router in self._routers:
            if router.expert_bias is not None:
                load_E = loads[router.layer_number - 1].sum(0).double()
                router.expert_bias += rate * torch.sign(load_E.mean() - load_E).float()

    @torch.no_grad()
    def anneal(self, iteration: int) -> None:
        """After `iteration`: over the last tenth of the run the biases go to zero, in equal steps but for updates."""
        left = self._num_iterations - iteration
        if 0 <= left < math.ceil(_ANNEALED_SHARE * self._num_iterations):
            for router in self._routers:
                if router.expert_bias is not None:
                    router.expert_bias *= left / (left + 1)

    def assume_even_loads(self) -> None:
        """Set even loads, as if there had been a previous step: only a run's first step counts its own loads."""
        self.routing.loads = torch.ones_like(self.routing.choices)

    def state(self) -> list[Any] | None:
        """The loads [L, 2, E] as nested lists, for a checkpoint."""
        return None if self.routing.loads is None else self.routing.loads.tolist()

    def load_state(self, loads: list[Any] | None) -> None:
        """`loads`: the result of `state`; ValueError unless it has the model's shape."""
        if loads is None:
            return
        table = torch.tensor(loads, dtype=torch.int64, device=device())
        if table.shape != self.routing.choices.shape:
            raise ValueError(f"loads of shape {list(table.shape)}, not {list(self.routing.choices.shape)}")
        self.routing.loads = table


def balancing_of(chunks: list[Any]) -> RunBalancing | None:
    """The load balancing of the run to which the model chunks belong; None for a dense model."""
    balancing: RunBalancing | None = getattr(getattr(chunks[0], "module", None), "balancing", None)
    return balancing


def _maskable_share(micro_batches: list[Batch]) -> Tensor:
    """D / N, maskable tokens of the global batch over routed ones, as a scalar on the device."""
    maskable = send(torch.stack([batch.num_maskable.sum() for batch in micro_batches]).sum().double())
    dist.all_reduce(maskable, group=parallel_state.get_data_parallel_group())
    routed = sum(batch.tokens.numel() for batch in micro_batches) * parallel_state.get_data_parallel_world_size()
    return (maskable / routed).float()
