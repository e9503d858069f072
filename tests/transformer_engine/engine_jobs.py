"""Jobs of tests/parity with Transformer Engine's layers, each on ranks of engine_pool.py that end with it.

What a job changes in its process (the answers about the GPU, how gloo is called) is therefore never taken back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

from megatron_a2d import megatron_compat
from megatron_a2d.config.fp8_recipe import chosen_recipe
from megatron_a2d.config.settings import build
from megatron_a2d.model import emulated_layers, layer_specs, transformer_config
from megatron_a2d.training import initialization, optimizer
from megatron_a2d.training.param_gather import zero_gradients
from megatron_a2d.training.train_step import forward_backward
from tests.parity import inference_jobs, parity_jobs, run_job
from tests.transformer_engine import defects, layer_products
from tests.transformer_engine.pretend_gpu import CUDA, HOPPER, use_gpu
from tests.transformer_engine.stand_in.extension import CALLS


def train_steps(
    settings: dict[str, Any], capability: tuple[int, int] = HOPPER, defect: str | None = None, **options: Any
) -> dict[str, Any]:
    """parity_jobs.train_steps with Transformer Engine's layers; also how often each kernel was called. defect: the name
    of one to plant (defects.py)."""
    as_on_a_gpu(capability)
    if defect:
        getattr(defects, defect)()
    assert layer_specs.choose_implementation(build(parity_jobs.SETTINGS | settings)) == "transformer_engine"
    return {**parity_jobs.train_steps(settings=settings, **options), "calls": dict(CALLS)}


def run(settings: dict[str, Any], capability: tuple[int, int] = HOPPER, **faults: Any) -> dict[str, Any]:
    """run_job.run, the training loop with its checkpoints, with Transformer Engine's layers."""
    as_on_a_gpu(capability)
    assert layer_specs.choose_implementation(build(parity_jobs.SETTINGS | settings)) == "transformer_engine"
    return {**run_job.run(settings, **faults), "calls": dict(CALLS)}


def sample(layout: dict[str, Any], **options: Any) -> dict[str, Any]:
    """inference_jobs.sample, from a checkpoint, with Transformer Engine's layers."""
    as_on_a_gpu(HOPPER)
    assert layer_specs.choose_implementation(build(layout)) == "transformer_engine"
    return {**inference_jobs.sample(layout=layout, **options), "calls": dict(CALLS)}


def fp8_products(checkpoint: str, settings: dict[str, Any], capability: tuple[int, int]) -> dict[str, Any]:
    """The largest distance of any product of a step on one process from its definition (layer_products.py)."""
    as_on_a_gpu(capability)
    config, state, batches = parity_jobs._start(checkpoint, settings, checked_as={"bf16": True})
    records = layer_products.record_layers(state.models)
    state.scheduler.step(1)
    zero_gradients(state.chunks, state.optimizer)
    for model in state.models:
        model.config.finalize_model_grads_func = lambda *_, **__: None  # it divides by the tokens
    forward_backward(state.chunks, parity_jobs._one_iteration(batches), forward_only=False)
    found = [record.distances(chosen_recipe(config)) for record in records]
    worst = {name: max(distances[name] for distances in found) for name in found[0]}
    passes = {len(record.passes) for record in records}
    return {"worst": worst, "layers": len(records), "passes": passes, "calls": dict(CALLS)}


def local_steps(nudged: int | None = None, **options: Any) -> dict[str, Any]:
    """parity_jobs.train_steps with the local layers, in this process with its environment. nudged: a seed; the emulated
    products' inputs and gradients are off by a last bit or not at all, at random."""
    if nudged is not None:
        _nudge_operands(torch.Generator().manual_seed(nudged))
    return {**parity_jobs.train_steps(**options), "calls": {}}


def _nudge_operands(generator: torch.Generator) -> None:
    def nudged(rounding: emulated_layers.Rounding) -> emulated_layers.Rounding:
        def rounded(matrix: torch.Tensor, role: Any, product: Any) -> torch.Tensor:
            bits = torch.randint(-1, 2, matrix.shape, generator=generator) * (role != "weight")
            return rounding(matrix * (1 + bits * torch.finfo(matrix.dtype).eps), role, product)

        return rounded

    for recipe, rounding in emulated_layers._ROUNDINGS.items():
        emulated_layers._ROUNDINGS[recipe] = nudged(rounding)


def as_on_a_gpu(capability: tuple[int, int]) -> None:
    """Choose layers and precision as on that GPU; weights are made as there, not by megatron.core's way for CPUs, which
    would quantise memory that holds nothing yet."""
    megatron_compat.install()
    use_gpu(capability)
    answers = {"has_cuda": True, "compute_capability": capability, "cuda_version": CUDA}
    for module in (layer_specs, transformer_config, initialization, optimizer):
        for name in answers.keys() & vars(module).keys():
            setattr(module, name, lambda answer=answers[name]: answer)
    _call_gloo_as_nccl()


def _call_gloo_as_nccl() -> None:
    """gloo sends tensors that are coalesced as one of the first one's type, and its requests can be waited for once."""
    param_and_grad_buffer._coalescing_manager = dist._coalescing_manager = _one_by_one
    send_and_receive = context_parallel.flash_attn_p2p_communicate
    context_parallel.flash_attn_p2p_communicate = lambda *arguments: [
        _Request(request) for request in send_and_receive(*arguments)
    ]


class _Request:
    """A request that can be waited for twice, as NCCL's."""

    def __init__(self, request: Any):
        self._request = request

    def wait(self, *arguments: Any) -> bool:
        request, self._request = self._request, None
        return True if request is None else request.wait(*arguments)


class _Done:
    def wait(self) -> None:
        pass


@contextlib.contextmanager
def _one_by_one(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[_Done]:
    """In the place of torch's coalescing manager: everything in it is sent by itself, and waited for."""
    places = [
        (param_and_grad_buffer, "dist_all_gather_func"), (param_and_grad_buffer, "dist_reduce_scatter_func"),
        (dist, "all_reduce"), (dist, "all_gather_into_tensor"),
    ]  # fmt: skip
    originals = [getattr(owner, name) for owner, name in places]

    def waited_for(function: Any) -> Any:
        def call(*arguments: Any, async_op: bool = False, **options: Any) -> None:
            function(*arguments, **options)

        return call

    for (owner, name), original in zip(places, originals, strict=True):
        setattr(owner, name, waited_for(original))
    try:
        yield _Done()
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
