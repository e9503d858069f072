"""The training steps to compare: that of the training loop, and a short script's with Hugging Face's model.

Both train the same objective on the same batches of random tokens. A third does nothing but the matrix products and the
attention of our step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_a2d.config.model_config import ModelConfig, model_config_from_hf

LEARNING_RATE = 1e-4


class Batches(NamedTuple):
    """Size of the batches, and their random tokens 0 .. mask_token_id - 1."""

    micro_batch_size: int
    seq_length: int
    mask_token_id: int
    num_microbatches: int = 1  # per step

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.num_microbatches

    def tokens(self, sample_index: int, /) -> np.ndarray:
        return np.random.default_rng(sample_index % 64).integers(0, self.mask_token_id, self.seq_length)

    def documents(self, sample_index: int, /) -> np.ndarray:
        return np.zeros(self.seq_length, dtype=np.int64)

    def eod_token_id(self) -> int | None:
        return None


class Step(NamedTuple):
    """`run` takes one step without synchronising; `head_fraction`: share of positions that reach the LM head."""

    run: Callable[[], None]
    head_fraction: Callable[[], float]


def uses_engine(rehearse: bool) -> bool:
    """Whether there is Transformer Engine; in a rehearsal that over the tests' stand-in of its kernels, from now on."""
    from importlib.util import find_spec

    if not rehearse:
        return torch.cuda.is_available() and find_spec("transformer_engine") is not None
    from tests.transformer_engine import pretend_gpu

    if pretend_gpu.DIRECTORY:
        pretend_gpu.rehearse()
    return bool(pretend_gpu.DIRECTORY)


def model_config_of(model: dict[str, Any]) -> ModelConfig:
    return model_config_from_hf(model, "the benchmark's shape")


def our_step(model: dict[str, Any], batches: Batches, settings: dict[str, Any]) -> Step:
    """The training loop's step, with random weights."""
    from megatron_a2d.config.settings import build
    from megatron_a2d.config.validate import find_problems
    from megatron_a2d.distributed import environment, process_groups
    from megatron_a2d.training import cuda_graphs, data_setup, initialization, train_step
    from megatron_a2d.utils.errors import UserError

    model_config = model_config_of(model)
    sizes = dict(seq_length=batches.seq_length, micro_batch_size=batches.micro_batch_size)
    config = build(dict(global_batch_size=batches.global_batch_size, lr=LEARNING_RATE, **sizes) | settings)
    if problems := find_problems(config, model_config, world_size=1):
        raise UserError(problems)
    environment.apply(config)
    process_groups.initialize(config.parallel, replays_graphs=config.performance.cuda_graph_impl != "none")
    state = initialization.build_train_state(model_config, config)
    graphs = cuda_graphs.CudaGraphs(state, config)
    samples = data_setup.micro_batches(config, model_config, batches, 1, 0)  # type: ignore[arg-type]
    rows: list[torch.Tensor] = []

    def run() -> None:
        state.scheduler.step(1)
        graphs.before_step()
        iteration = [next(samples) for _ in range(samples.num_microbatches)]
        result = train_step.train_step(state.chunks, state.optimizer, iteration)
        rows.append(result.totals[2])

    tokens = config.training.global_batch_size * batches.seq_length
    return Step(run, lambda: float(torch.stack(rows).mean()) / tokens)


# Names of the operators that are matrix products or attention, forward and backward.
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "linear", "attention")


class ProductRecorder(TorchDispatchMode):
    """Keeps the calls of matrix products and attention, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in PRODUCTS or any(part in name for part in ("_linear", "_attention", "flash")):
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def our_products(model: dict[str, Any], batches: Batches, settings: dict[str, Any]) -> Step:
    """The matrix products and the attention of a step of `our_step`, again and again on the same tensors.

    About what they take in a step: their operands are less often in the cache, and bf16 matrices are converted already.
    """
    step = our_step(model, batches, settings)
    step.run()  # what is built once
    with ProductRecorder() as recorder:
        step.run()

    @torch.no_grad()
    def run() -> None:
        for call in recorder.calls:
            call()

    return Step(run, step.head_fraction)


def hugging_face_step(
    model: dict[str, Any], batches: Batches, device: torch.device, bf16: bool, experts: str | None = None
) -> Step:
    """The obvious script: transformers' model, made bidirectional, logits of all positions, torch's AdamW.

    bf16: fp32 weights under autocast, the usual recipe. experts: transformers' implementation of the experts
    ("eager", "grouped_mm"), or its default.
    """
    import transformers

    from megatron_a2d.data.dataloader import MicroBatches
    from megatron_a2d.diffusion.corruption import corrupt
    from megatron_a2d.diffusion.rng import Noise

    kind = "Qwen3Moe" if model["model_type"] == "qwen3_moe" else "Qwen3"
    config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in model.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    with device:
        network = getattr(transformers, f"{kind}ForCausalLM")(config).float().train()
    if experts is not None:
        network.set_experts_implementation(experts)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    noise = Noise(1, batches.mask_token_id)
    samples = MicroBatches(
        batches, lambda tokens, index: corrupt(tokens, index, noise),
        micro_batch_size=batches.micro_batch_size, global_batch_size=batches.global_batch_size,
    )  # fmt: skip
    mask = bidirectional_mask(network, batches, device)

    def run() -> None:
        iteration = [next(samples) for _ in range(batches.num_microbatches)]
        num_maskable = sum(int(batch.num_maskable.sum()) for batch in iteration)
        optimizer.zero_grad()
        for batch in iteration:
            tokens, labels, weights = (tensor.to(device) for tensor in (batch.tokens, batch.labels, batch.weights))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), grouped_products_autocast():
                logits = network(tokens, attention_mask=mask, use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            ((losses * weights.flatten()).sum() / num_maskable).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return Step(run, lambda: 1.0)


@contextmanager
def grouped_products_autocast() -> Iterator[None]:
    """Make autocast cover torch's grouped GEMM, for which it has no rule: transformers' experts would otherwise be
    computed in fp32, and the comparison would be unfair to them."""
    try:
        from transformers.integrations import moe
    except ImportError:  # transformers 4 computes one expert after the other
        yield
        return
    product = moe._grouped_mm

    def grouped(rows: torch.Tensor, weight: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return product(rows.to(dtype), weight.to(dtype), *arguments, **options)

    moe._grouped_mm = grouped  # type: ignore[assignment]
    try:
        yield
    finally:
        moe._grouped_mm = product


def bidirectional_mask(network: Any, batches: Batches, device: torch.device) -> torch.Tensor | None:
    """Make the model bidirectional, if possible without a mask: a mask disables torch's fastest attention."""
    for module in network.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    with torch.no_grad():
        probe = torch.zeros(1, 16, dtype=torch.long, device=device)
        changed = probe.clone()
        changed[0, -1] = 1
        first, second = (network(tokens, use_cache=False).logits[0, 0] for tokens in (probe, changed))
    if (first - second).abs().max() > 1e-4 * first.abs().max():  # the first token's output depends on the last token
        return None
    length = batches.seq_length
    return torch.ones(batches.micro_batch_size, 1, length, length, dtype=torch.bool, device=device)
