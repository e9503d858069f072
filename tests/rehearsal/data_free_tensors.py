"""Tensors without data in a rehearsal: memory counted, host waits found, balanced routing, CUDA's names.

Run by tests/unit/test_rehearsal.py in a process of its own, as a rehearsal is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_a2d.rehearsal import dataless_gpu
from megatron_a2d.rehearsal.balanced_routing import Routing, balanced_counts
from megatron_a2d.rehearsal.cuda_names import CudaNames, flex_attention
from megatron_a2d.rehearsal.step_trace import StepTrace


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def eight_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Routing, "num_experts", 8)
    monkeypatch.setattr(Routing, "experts_per_token", 2)


def test_bytes_held_and_their_peak() -> None:
    with StepTrace() as trace, CudaNames():
        kept = on_gpu(100)
        assert (trace.now, trace.peak) == (400, 400)
        view, other = kept[10:], on_gpu(50, dtype=torch.bfloat16)
        assert trace.now == 500, "a view takes nothing"
        del other
        assert (trace.now, trace.peak) == (400, 500)
        del kept
        assert trace.now == 400, "the view holds it"
        del view
        assert trace.now == 0
        torch.zeros(7)
        assert trace.now == 0, "the host's memory is not the GPU's"


def test_one_kernel_holds_its_results_alone() -> None:
    def two_steps(tensor: Tensor) -> Tensor:
        return (tensor + 1) * 2

    tensor = on_gpu(1000)
    with StepTrace() as trace, CudaNames():
        inner = two_steps(tensor)
        assert trace.peak == 8000
    del inner
    with StepTrace() as trace, CudaNames():
        result = dataless_gpu.one_kernel(two_steps, tensor)
        assert (trace.now, trace.peak) == (4000, 4000)
    del result


def test_saved_for_backward_is_held_until_then() -> None:
    weight = on_gpu(64, 64).requires_grad_()
    with StepTrace() as trace, CudaNames(), torch.autograd.set_multithreading_enabled(False):
        loss = (on_gpu(16, 64) @ weight).relu().sum()
        assert trace.now == 16 * 64 * 4 * 2 + 4, "the input and relu's result, and the sum"
        loss.backward()
        del loss
        assert trace.now == 64 * 64 * 4, "the weight's gradient"


def test_flex_attention_keeps_its_output_and_one_number_a_row() -> None:
    query, key, value = (on_gpu(600, 2, heads, 64, dtype=torch.bfloat16).requires_grad_() for heads in (8, 2, 2))
    with StepTrace() as trace, CudaNames():
        output = flex_attention(query, key, value)
        held = output.numel() * 2 + 600 * 2 * 8 * 4
        assert output.shape == query.shape and (trace.now, trace.peak) == (held, held)
        output.backward(on_gpu(*output.shape, dtype=torch.bfloat16))
    for tensor in (query, key, value):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape


WAITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), ".item()"),
    "float": (lambda x: float(x.sum()), ".item()"),
    "bool": (lambda x: bool(x.sum() > 0), ".item()"),
    "if": (lambda x: 1 if x.sum() else 0, ".item()"),
    "tolist": (lambda x: x.tolist(), "copy to the host"),
    "cpu": (lambda x: x.cpu(), "copy to the host"),
    "to": (lambda x: x.to("cpu"), "copy to the host"),
    "copy_": (lambda x: torch.zeros(16, 8).copy_(x), "copy to the host"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "mask": (lambda x: x[x > 0], "index by a mask"),
    "torch.tensor": (lambda x: torch.tensor([x.sum(), x.sum()]), ".item()"),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_of_the_host_is_found(name: str, eight_experts: None) -> None:
    do, how = WAITS[name]
    x = on_gpu(16, 8)
    with StepTrace() as trace, CudaNames():
        do(x)
    assert {wait.operation for wait in trace.waits} == {how}
    place = {wait.place for wait in trace.waits}
    assert all(Path(one.split(":")[0]).name == "data_free_tensors.py" for one in place), place


def test_what_does_not_wait() -> None:
    x, mask = on_gpu(16, 8), on_gpu(16, 8, dtype=torch.bool)
    with StepTrace() as trace, CudaNames():
        x.to("cpu", non_blocking=True)
        x[mask] = 0.0
        torch.where(mask, x, 0.0)
        torch.ones(3).sum().item()
        x + torch.ones(16, 8).to("cuda")
    assert not trace.waits


def test_streams_and_events_wait() -> None:
    with StepTrace() as trace:
        dataless_gpu.Stream().synchronize()
        dataless_gpu.Stream().wait_stream(dataless_gpu.Stream())
    assert [(wait.operation, number) for wait, number in trace.waits.items()] == [("synchronize", 1)]


def test_routing_is_balanced(eight_experts: None) -> None:
    assert balanced_counts(64, 8).tolist() == [16] * 8
    uneven = balanced_counts(6, 8)
    assert uneven.sum() == 12 and set(uneven.tolist()) == {1, 2}
    with StepTrace(), CudaNames():
        chosen = on_gpu(64, 8, dtype=torch.bool)
        counts = chosen.sum(dim=0).long()
        splits = counts.reshape(4, 2).sum(axis=1)
        assert splits.tolist() == [32] * 4 and counts[2:4].cumsum(0).int().cpu().tolist() == [16, 32]
        assert chosen.any(dim=0).tolist() == [True] * 8, "of which nothing is known"
        assert len(on_gpu(64, 8).masked_select(chosen)) == 128


def test_the_size_of_an_unknown_kind_is_refused() -> None:
    with StepTrace(), CudaNames(), pytest.raises(NotImplementedError, match="depends on data"):
        torch.repeat_interleave(on_gpu(4), on_gpu(4, dtype=torch.int64))


def test_names_of_cuda() -> None:
    with CudaNames():
        tensor = torch.empty(3, device=torch.device("cuda"))
        assert tensor.is_cuda and tensor.device == torch.device("cuda", 0) and torch.zeros_like(tensor).is_cuda
        assert tensor.type() == "torch.cuda.FloatTensor" and torch.ones(2).to("cuda").is_cuda
        assert not torch.ones(2).is_cuda and torch.ones(2).device.type == "cpu"
    assert tensor.is_meta
