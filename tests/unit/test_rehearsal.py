"""The parts of a rehearsal: what it counts, which values it makes up, and what it says of sends and receives."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_a2d import train
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.config.validate import find_problems
from megatron_a2d.conversion.qwen3_shapes import named_model_config
from megatron_a2d.rehearsal import dataless_gpu
from megatron_a2d.rehearsal.balanced_routing import Routing, balanced_counts
from megatron_a2d.rehearsal.cuda_names import CudaNames
from megatron_a2d.rehearsal.pipeline_pairing import pair
from megatron_a2d.rehearsal.rehearse import choose_layers
from megatron_a2d.rehearsal.step_trace import Event, StepTrace
from megatron_a2d.utils.errors import UserError
from tests.unit.test_recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_without_transformer_engine_the_local_layers_are_rehearsed(recipe: Path) -> None:
    """Without the flags that need it, and those that then have no effect, such as the graphs' scope."""
    config, _ = parse_run(Parser(), ["--config", str(recipe)])
    assert config.training.model
    layers = choose_layers(config, has_engine=False)
    assert layers.implementation == "local" and layers.notes
    assert not find_problems(layers.config, named_model_config(config.training.model), 64)


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
    assert all(Path(one.split(":")[0]).name == "test_rehearsal.py" for one in place), place


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


def event(operation: str, rank: int, peer: int, size: int = 8, handle: int = 1) -> Event:
    return Event(operation, "PIPELINE", (0, 1), size, peer, handle)


def exchange(rank: int, peer: int, first: str, size: int = 8) -> list[Event]:
    """Both directions with `peer`, each waited for at once."""
    second = {"send": "recv", "recv": "send"}[first]
    return [
        event(operation, rank, peer, size, handle)
        for handle, name in enumerate((first, second))
        for operation in (name, "wait")
    ]


def test_pairs() -> None:
    done = pair({0: exchange(0, 1, "send"), 1: exchange(1, 0, "recv")})
    assert done.num_pairs == 2 and done.num_bytes == 16 and not done.problems


ALL = Event("all_reduce", "all", (0, 1), 4)
PROBLEMS = {
    "both send first and wait": (
        {0: exchange(0, 1, "send"), 1: exchange(1, 0, "send")}, "rank 0 has send .* where rank 1 has send",
    ),
    "both receive first": (
        {0: exchange(0, 1, "recv"), 1: exchange(1, 0, "recv")}, "rank 0 has recv .* where rank 1 has recv",
    ),
    "another size": (
        {0: exchange(0, 1, "send"), 1: exchange(1, 0, "recv", 16)}, "send of 8 bytes .* where rank 1 has recv of 16 bytes",
    ),
    "one more": (
        {0: exchange(0, 1, "send"), 1: [*exchange(1, 0, "recv"), event("send", 1, 0, 8, 9)]}, "rank 0 has nothing where",
    ),
    "one never comes": ({0: exchange(0, 1, "send"), 1: []}, "where rank 1 has nothing"),
    "a collective before the receive that the peer waits for": (
        {0: [event("send", 0, 1), event("wait", 0, 1), ALL], 1: [ALL, event("recv", 1, 0)]},
        "rank 0 has send .* where rank 1 has nothing",
    ),
    "collectives of two groups crosswise": (
        {0: [ALL, ALL._replace(ranks=(0, 1, 2))], 1: [ALL._replace(ranks=(0, 1, 2)), ALL]},
        "rank 0 hangs at event 1 of 2: all_reduce of 4 bytes",
    ),
    "another collective": ({0: [ALL], 1: [ALL._replace(num_bytes=8)]}, "all_reduce of 4 bytes where rank 1 has"),
    "a collective that one leaves out": ({0: [ALL], 1: []}, "rank 0 hangs at event 1 of 1: all_reduce"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_does_not_pair_is_found(name: str) -> None:
    steps, words = PROBLEMS[name]
    assert re.search(words, "\n".join(pair(steps).problems)), pair(steps).problems


def test_without_waiting_nothing_hangs() -> None:
    """Posted before it waits, the order of a rank's two directions does not matter where they are in two groups."""
    other = (0, 1, 2)
    steps = {
        0: [event("send", 0, 1), event("recv", 0, 1, 8, 2)._replace(ranks=other)],
        1: [event("send", 1, 0)._replace(ranks=other), event("recv", 1, 0, 8, 2)],
    }
    steps = {rank: [*events, *(one._replace(operation="wait") for one in events)] for rank, events in steps.items()}
    assert not pair(steps).problems


def rehearsed(*flags: str) -> str:
    """The command's output, in a separate process: the simulated GPU cannot be removed."""
    command = [sys.executable, "-m", "megatron_a2d.train", "--rehearse", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


RECIPES = ROOT / "launch" / "recipes"


def test_the_command() -> None:
    """A tied model in two stages of two virtual ones: figures, order, pairs."""
    shown = rehearsed(
        "--config", str(RECIPES / "qwen3_0p6b.yaml"), str(RECIPES / "portable.yaml"), "--world-size", "16",
        "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2", "--global-batch-size", "32",
    )  # fmt: skip
    assert "rehearsed 2 of 16 ranks: one step of 4 micro-batches, local layers" in shown
    for part in ("weights", "gradients", "optimizer state"):
        assert re.search(rf"│ {part} +│ +[\d.]+ │ +[\d.]+ │ +[+-]0\.\d% │ +[\d.]+ │ +[\d.]+ │ +[+-]0\.\d% │", shown), (
            shown
        )
    activations = re.search(r"│ activations, logits +│((?: +[+-]?[\d.]+%? │)+)", shown)
    assert activations
    errors = [float(cell.strip(" %")) for cell in activations[1].split("│") if "%" in cell]
    assert len(errors) == 2 and all(abs(error) < 5 for error in errors), shown
    # 3 tensors a micro-batch forward, 3 back: the model's last stage sends nothing on.
    assert "pipeline: 24 sends (0.188 GiB) and receives of 2 stages, which pair up; nothing hangs" in shown
    assert re.search(r"finalize_model_grads.py:\d+ +│ .item\(\) +│ +2 │ +2 │", shown)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rank 0 --dry-run", "--rank: is only valid with --rehearse"),
        ("--rehearse --model Qwen/Qwen3-8B-Base --world-size 8 --rank 8", "--rank 8: is none of the 8 of --world-size"),
        ("--rehearse --world-size 8", "need --model"),
        (
            "--rehearse --model Qwen/Qwen3-8B-Base --world-size 8 --tensor-model-parallel-size 3",
            "--tensor-model-parallel-size 3: ",
        ),
        (
            f"--rehearse --config {RECIPES / 'qwen3_8b.yaml'} --world-size 8 --cluster h100 --micro-batch-size 8",
            "GiB, the run needs",
        ),
    ],
)
def test_the_errors_are_those_of_the_start(flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train.main(flags.split())
