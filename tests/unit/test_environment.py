"""What a process takes from its machine: CUDA's variables, CPU cores, the FP8 and FP4 scaling that its GPU has."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_a2d.config.fp8_recipe import Scaling, choose_scaling
from megatron_a2d.config.settings import build
from megatron_a2d.distributed.environment import Gpu, as_text, environment, own_cores, parse_cpu_list
from megatron_a2d.utils.errors import UserError
from tests.cases import FUSED_EXPERTS

ROOT = Path(__file__).resolve().parents[2]
HOPPER, BLACKWELL, RACK = Gpu("NVIDIA H200", (9, 0)), Gpu("NVIDIA B200", (10, 0)), Gpu("NVIDIA GB200", (10, 0))
ALWAYS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"}
MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20"}
CUDNN = {"NVTE_NORM_FWD_USE_CUDNN": "1", "NVTE_NORM_BWD_USE_CUDNN": "1"}
ORDERED = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
FLEX = {"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 16}


@pytest.mark.parametrize(
    ("given", "gpu", "more"),
    [
        ({}, HOPPER, {}),
        ({"tensor_model_parallel_size": 2}, HOPPER, ORDERED),
        ({"context_parallel_size": 2}, HOPPER, ORDERED),
        ({"tensor_model_parallel_size": 2}, BLACKWELL, {"NCCL_NVLS_ENABLE": "0"}),
        ({"overlap_moe_expert_parallel_comm": True}, BLACKWELL, {"NCCL_NVLS_ENABLE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "32", **MARGINS}),
        ({"overlap_moe_expert_parallel_comm": True, "tensor_model_parallel_size": 2}, HOPPER, {"CUDA_DEVICE_MAX_CONNECTIONS": "32", **MARGINS}),
        ({"overlap_grad_reduce": True}, HOPPER, MARGINS),
        ({"overlap_param_gather": True}, HOPPER, MARGINS),
        ({"num_virtual_stages_per_pipeline_rank": 2}, HOPPER, MARGINS),
        ({"overlap_grad_reduce": True, "transformer_impl": "local"}, HOPPER, {}),
        ({"overlap_grad_reduce": True, "objective": "block"}, HOPPER, MARGINS),
        ({"fp8_recipe": "mxfp8"}, BLACKWELL, {"NCCL_NVLS_ENABLE": "0", **CUDNN}),
        ({"fp8_recipe": "auto"}, BLACKWELL, {"NCCL_NVLS_ENABLE": "0", **CUDNN}),
        ({"fp8_recipe": "auto"}, HOPPER, {}),
        ({"fp8_recipe": "tensorwise"}, BLACKWELL, {"NCCL_NVLS_ENABLE": "0"}),
        (FUSED_EXPERTS, HOPPER, {"NVTE_CUTEDSL_FUSED_GROUPED_MLP": "1"}),
        ({"cuda_graph_impl": "transformer_engine"}, HOPPER, {"NCCL_GRAPH_REGISTER": "0"}),
        (FLEX, HOPPER, {"NVLINK_DOMAIN_SIZE": "8", "USE_MNNVL": "0", "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN": "8"}),
        (FLEX, RACK, {"NCCL_NVLS_ENABLE": "0", "NVLINK_DOMAIN_SIZE": "72", "USE_MNNVL": "1", "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN": "16", "NUM_OF_TOKENS_PER_CHUNK_COMBINE_API": "128"}),
        ({**FLEX, "moe_flex_dispatcher_backend": "deepep"}, HOPPER, {}),
    ],
)  # fmt: skip
def test_environment(given: dict[str, Any], gpu: Gpu, more: dict[str, str]) -> None:
    assert environment(build(given), gpu) == ALWAYS | more


def test_environment_without_a_gpu() -> None:
    assert environment(build({"tensor_model_parallel_size": 2}), None) == {}
    assert as_text({}) and as_text({"B": "1", "A": "2"}) == "A=2 B=1"


def test_environment_is_set_before_cuda_starts() -> None:
    """CUDA reads its variables when it is first asked anything."""
    code = """
import torch
order = []
torch.cuda.is_available = lambda: bool(order.append("CUDA"))
from megatron_a2d import train
from megatron_a2d.distributed import environment
environment.apply = lambda config: order.append("environment") or {}
train.main("--model Qwen/Qwen3-8B --dry-run --settings-only --world-size 1".split())
assert not order, "settings alone ask no GPU"
older = "tests/fixtures/written_by_0_1_0"
train.main(f"--load {older}/run --finetune --train-data-path {older}/tokens --seq-length 32 --dry-run".split())
torch.cuda.is_available()
print(order)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("['environment', 'CUDA'"), run.stdout


FREED = """
import resource, torch
from megatron_a2d.distributed import environment
environment.keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_memory_of_freed_tensors_is_reused() -> None:
    """Without new page faults, of which 64 MB would cause 16,000 in every round; in the first one the heap grows. Glibc
    does not do it in every process, so that several are tried."""
    runs = (subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True) for _ in range(8))
    assert any(int(run.stdout) < 1000 for run in runs)


# A DGX H100: 2 x 56 cores with two threads each; four GPUs on either side.
LEFT, RIGHT = parse_cpu_list("0-55,112-167"), parse_cpu_list("56-111,168-223\n")
SIBLINGS = {core: core % 112 for core in range(224)}


def test_cores_are_those_near_the_gpu() -> None:
    """Cut in a row, the cores of GPUs 2 and 3 would lie on the other side."""
    near = [LEFT] * 4 + [RIGHT] * 4
    shares = [own_cores(range(224), near, rank, SIBLINGS) for rank in range(8)]
    assert sorted(core for share in shares for core in share) == list(range(224))
    assert all(set(share) <= set(near[rank]) and len(share) == 28 for rank, share in enumerate(shares))
    assert shares[0] == parse_cpu_list("0-13,112-125") and shares[7] == parse_cpu_list("98-111,210-223")


def test_cores_of_gpus_in_another_order() -> None:
    near = [RIGHT, LEFT, RIGHT, LEFT]
    shares = [own_cores(range(224), near, rank, SIBLINGS) for rank in range(4)]
    assert all(set(share) <= set(near[rank]) and len(share) == 56 for rank, share in enumerate(shares))
    assert not set(shares[1]) & set(shares[3])


def test_cores_that_the_job_was_given() -> None:
    assert own_cores(range(48, 64), [LEFT, RIGHT], 0) == list(range(48, 56))
    assert own_cores([4, 0], [LEFT] * 4, 1) == [0, 4], "fewer cores than processes: all that are near"
    assert own_cores(range(56, 60), [LEFT], 0) == [56, 57, 58, 59], "none is near: nothing is bound"
    assert own_cores(range(8), [[], []], 1) == list(range(8)), "not known: nothing is bound"
    assert parse_cpu_list("\n") == [] and parse_cpu_list("3,5-6") == [3, 5, 6]


@pytest.mark.parametrize(
    ("wish", "capability", "expected"),
    [
        ("none", None, None),
        ("auto", (10, 0), Scaling("mxfp8", "e4m3")),
        ("auto", (10, 3), Scaling("mxfp8", "e4m3")),
        ("auto", (11, 0), Scaling("mxfp8", "e4m3")),
        ("auto", (12, 0), Scaling("tensorwise", "hybrid")),
        ("auto", (12, 1), Scaling("tensorwise", "hybrid")),
        ("auto", (9, 0), Scaling("tensorwise", "hybrid")),
        ("auto", (8, 9), Scaling("tensorwise", "hybrid")),
        ("blockwise", (9, 0), Scaling("blockwise", "e4m3")),
        ("delayed", (8, 9), Scaling("delayed", "hybrid")),
        ("nvfp4", (10, 0), Scaling("nvfp4", "e2m1")),
        ("nvfp4", (12, 0), Scaling("nvfp4", "e2m1")),
    ],
)
def test_scaling_by_gpu(wish: str, capability: tuple[int, int] | None, expected: Scaling | None) -> None:
    assert choose_scaling(wish, capability) == expected


@pytest.mark.parametrize(
    ("wish", "capability", "words"),
    [
        (
            "mxfp8",
            (9, 0),
            "--fp8-recipe mxfp8: a GPU of compute capability 9.0 has no mxfp8, which needs 10.0; use auto",
        ),
        (
            "mxfp8",
            (12, 0),
            "capability 12.0 has no mxfp8 in Transformer Engine, which supports it below 12.0; use auto",
        ),
        ("blockwise", (8, 9), "needs 9.0; use auto"),
        ("auto", (8, 0), "needs 8.9; use none"),
        ("mxfp8", (8, 0), "needs 10.0; use none"),
        ("tensorwise", None, "--fp8-recipe tensorwise: this machine has no CUDA device; use none, or emulate it"),
        ("nvfp4", None, "--fp4-recipe nvfp4: this machine has no CUDA device"),
        (
            "nvfp4",
            (9, 0),
            "--fp4-recipe nvfp4: a GPU of compute capability 9.0 has no nvfp4, which needs 10.0; use none",
        ),
    ],
)
def test_scaling_that_a_gpu_lacks(wish: str, capability: tuple[int, int] | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_scaling(wish, capability)


def test_blockwise_needs_a_late_cuda() -> None:
    assert choose_scaling("blockwise", (9, 0), (12, 9)) == choose_scaling("blockwise", (9, 0), (13, 0))
    assert choose_scaling("auto", (9, 0), (12, 4)) == Scaling("tensorwise", "hybrid")
    with pytest.raises(UserError, match=r"--fp8-recipe blockwise: needs CUDA 12.9, and torch has 12.8; use auto"):
        choose_scaling("blockwise", (9, 0), (12, 8))
