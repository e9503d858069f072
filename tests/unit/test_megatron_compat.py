"""Each patch of megatron.core on its own: what fails without it works with it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.jit import jit_fuser
from transformers import AutoModelForCausalLM

from megatron_a2d import megatron_compat
from megatron_a2d.megatron_compat import versions
from megatron_a2d.megatron_compat.fused_adam import Adam
from megatron_a2d.utils.errors import UserError
from tests.tiny import write_hf

ROOT = Path(__file__).resolve().parents[2]
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is off where there is CUDA")


@pytest.fixture(autouse=True)
def installed() -> None:
    megatron_compat.install()


def fails_without_install(statement: str) -> bool:
    """True if `statement` raises in a fresh interpreter where nothing was patched."""
    code = f"import torch\ntry:\n    {statement}\nexcept Exception:\n    raise SystemExit(7)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 7


@cpu_only
def test_factories_make_cpu_tensors() -> None:
    assert fails_without_install("torch.zeros(2, device='cuda')")
    for device in ("cuda", "cuda:0", torch.device("cuda")):
        assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.empty(3, device="cuda", pin_memory=True).device.type == "cpu"
    assert torch.zeros_like(torch.ones(2), device="cuda").device.type == "cpu"
    assert torch.ones(1, device="meta").device.type == "meta"


@cpu_only
def test_device_contexts_still_work(tmp_path: Path) -> None:
    """transformers builds a model on "meta" first; its rotary frequencies were uninitialised memory without this."""
    with torch.device("meta"):
        assert torch.arange(3).device.type == torch.empty(2).device.type == "meta"
    write_hf(tmp_path / "model", "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    frequencies = 1e6 ** (-torch.arange(12) / 12)
    assert torch.allclose(loaded.model.rotary_emb.inv_freq, frequencies)


@cpu_only
def test_moves_stay_on_the_cpu() -> None:
    assert fails_without_install("torch.ones(1).cuda()")
    tensor = torch.ones(2)
    assert tensor.cuda() is tensor
    assert tensor.to("cuda").device.type == "cpu" and tensor.to(device="cuda").device.type == "cpu"
    assert tensor.to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


@cpu_only
def test_cuda_module_is_neutral() -> None:
    assert fails_without_install("torch.cuda.current_device()")
    assert torch.cuda.current_device() == torch.device("cpu")
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.Event()
        event.record()
        torch.cuda.current_stream().wait_event(event)
    assert torch.cuda.memory_allocated() == 0
    assert not torch.cuda.is_available()


@cpu_only
def test_random_state_tracker_forks_the_cpu_generator() -> None:
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("inside", 5)
    outside_before = torch.get_rng_state()
    with tracker.fork("inside"):
        first = torch.rand(3)
    with tracker.fork("inside"):
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside_before)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


@cpu_only
def test_nothing_is_compiled() -> None:
    """By megatron.core's decorator: it is replaced, or torch's, which compiles nothing then."""
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    if jit_fuser is torch.compile:
        compiled = torch.compile(double, backend=lambda graph, inputs: calls.append(1) or graph.forward)
        assert compiled(torch.ones(1)).item() == 2 and not calls
    else:
        assert jit_fuser(double) is double


@cpu_only
def test_split_sizes_become_numpy() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    assert token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True).tolist() == [1, 2]
    assert not torch.is_tensor(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1]), as_numpy=True))
    assert token_dispatcher.maybe_move_tensor_to_cpu(None) is None


@cpu_only
def test_gradients_are_clipped() -> None:
    from megatron.core.optimizer import optimizer

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    optimizer.clip_grad_by_total_norm_fp32([parameter], max_norm=10.0, total_norm=1.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@cpu_only
def test_type_names_are_only_changed_inside_optimizer_constructors() -> None:
    assert torch.ones(1).type() == "torch.FloatTensor"
    from megatron.core.optimizer.optimizer import FP32Optimizer

    assert FP32Optimizer.__init__.__wrapped__ is not None


def test_expert_parameters_are_marked() -> None:
    model = torch.nn.ModuleDict(
        {"mlp": torch.nn.ModuleDict({"experts": torch.nn.Linear(2, 2), "router": torch.nn.Linear(2, 2)})}
    )
    versions.mark_expert_parameters(model)
    marked = {name for name, parameter in model.named_parameters() if not getattr(parameter, "allreduce", True)}
    assert marked == {"mlp.experts.weight", "mlp.experts.bias"}


def test_router_finds_its_missing_name() -> None:
    from megatron.core.transformer.moe import moe_utils

    assert hasattr(moe_utils, "te_general_gemm")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions.check_version()
    monkeypatch.setattr("megatron.core.__version__", f"{versions.SUPPORTED[1]}+c2139b3")  # installed within a checkout
    versions.check_version()
    monkeypatch.setattr("megatron.core.__version__", "0.15.0")
    with pytest.raises(UserError, match=r"megatron-core 0\.15\.0"):
        versions.check_version()


@pytest.mark.parametrize(
    ("found", "is_older"), [("0.16.1", True), ("0.17.0", False), ("0.19.2", False), ("1.0", False)]
)
def test_order_of_versions(found: str, is_older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.core.__version__", found)
    assert versions.is_before(0, 17) == is_older


def test_graphed_parts_have_the_name_of_this_version() -> None:
    """megatron.core's own name, not one that it still takes from before."""
    from megatron.core.transformer import TransformerConfig

    given = versions.graphed_parts(("attn",))
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert fields >= given.keys()
    assert ("cuda_graph_modules" in fields) == ("cuda_graph_modules" in given)


@cpu_only
def test_no_triton_is_needed() -> None:
    """In fresh interpreters in which `import triton` fails."""
    code = "import sys; sys.modules['triton'] = None; import {}"
    plain, ours = (
        subprocess.run([sys.executable, "-c", code.format(name)], cwd=ROOT, capture_output=True, text=True)
        for name in ("megatron.core", "megatron_a2d.training.train_step")
    )
    assert ours.returncode == 0, ours.stderr
    if not versions.is_before(0, 17):  # the control
        assert plain.returncode == 1 and "triton" in plain.stderr


@cpu_only
@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="with triton megatron.core compiles")
@pytest.mark.skipif(not versions.is_before(0, 17), reason="a router for inference is compiled")
def test_torchs_compiler_is_not_imported() -> None:
    """Neither by megatron.core nor by the optimizer; its import would take as long as all others. Control: it is known
    to `sys.modules` by this name."""
    code = """
import sys, torch
import megatron_a2d.training.train_step
from megatron_a2d.megatron_compat import fused_adam, install
install()
fused_adam.Adam([torch.ones(2, requires_grad=True)])
print("torch._dynamo" in sys.modules)
torch.optim.AdamW([torch.ones(2, requires_grad=True)])
print("torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "True"], run.stderr


@pytest.mark.parametrize(("adam_w_mode", "weight_decay"), [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_adam_equals_torch(adam_w_mode: bool, weight_decay: float) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in ((33, 7), (5,), (1,), (128, 65))]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    options = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    reference_class = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    optimizer = Adam(
        [{"params": ours[:2]}, {"params": ours[2:], "lr": 1e-2}, {"params": []}],
        adam_w_mode=adam_w_mode,
        **options,
    )
    reference = reference_class([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 1e-2}], fused=True, **options)
    for _ in range(30):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert [group["step"] for group in optimizer.param_groups] == [30, 30, 30]
    assert set(optimizer.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_noise_is_filtered_by_library_and_the_rest_is_heard() -> None:
    """What megatron.core and torch say of missing GPU libraries is left out; our own and others' warnings are not."""
    program = """
import logging, sys, types, warnings
from megatron_a2d.terminal.console import hide_noise
hide_noise("talkative.part")
import megatron_a2d.training.train_loop
for name in ("megatron.core.x", "torch.distributed.x", "transformer_engine", "numpy", "megatron_a2d.data", "mega"):
    exec(f"import warnings; warnings.warn('w {name}', UserWarning)", {"__name__": name})
    logging.getLogger(name).warning("l %s", name)
    logging.getLogger(name).error("e %s", name)
for name in ("talkative.part", "talkative"):
    logging.getLogger(name).warning("l %s", name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if line]
    names = ("megatron.core.x", "torch.distributed.x", "transformer_engine", "numpy", "megatron_a2d.data", "mega")
    heard = {
        kind: {
            n
            for n in (*names, "talkative", "talkative.part")
            # With emerging-optimizers a line of a log begins with its level and name.
            if any(f"{kind} {n}" == re.split(r"\] |:", line)[-1].strip() for line in said)
        }
        for kind in "wle"
    }
    assert heard["w"] == {"numpy", "megatron_a2d.data", "mega"}, said
    assert heard["l"] == {"numpy", "megatron_a2d.data", "mega", "talkative"}, said
    assert heard["e"] == set(names) and len(said) == 3 + 4 + 6, said
