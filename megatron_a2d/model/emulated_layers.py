"""Linear layers whose matrix products are those of Transformer Engine's FP8 and NVFP4 recipes, emulated in fp32.

Each of a layer's three products reads two matrices that are rounded along its contraction (fake_quantization.py), and
is summed in fp32 and rounded once, to the layer's type:

fprop   y  = x @ W.T      input, weight          along the input features
dgrad   dx = dy @ W       gradient, weight       along the output features
wgrad   dW = dy.T @ x     gradient, input        along the tokens

Which format an operand gets is in `_ROUNDINGS`, and for delayed scaling in `_DelayedScales`, as Transformer Engine 2.12
and 2.20 have it (common/recipe, pytorch/quantization.py, pytorch/module/linear.py). Under sequence parallelism the
gathered tensor is rounded, which gives the same numbers as Transformer Engine, whose processes round their shards and
share the amax. Weights and outputs that tensor parallelism shards are rounded on each process separately, as in
Transformer Engine: with one scale per matrix (tensorwise, nvfp4) the result depends on the layout.

Not emulated: the order in which a kernel sums, partial sums kept in fewer bits (the FP8 products of Hopper), the
random bits of stochastic rounding, and norms whose output goes to FP8 without being rounded to bf16 first.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Literal, Protocol

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_a2d.model.chunked_cross_entropy import OutputLayer, losses_of_logits
from megatron_a2d.model.fake_quantization import (
    E4M3,
    E5M2,
    amax_of,
    blockwise,
    encode_scale,
    generator_of,
    hadamard,
    mxfp8,
    nvfp4,
    per_tensor,
)

Role = Literal["input", "weight", "gradient"]
Product = Literal["fprop", "dgrad", "wgrad"]


class Rounding(Protocol):
    """Rounding of the operands of one forward pass's products and of its backward pass's.

    In: a matrix [rows, contraction], fp32. Out: the matrix, dequantised; its contraction may be padded.
    """

    def __call__(self, matrix: Tensor, role: Role, product: Product) -> Tensor: ...


def _tensorwise(matrix: Tensor, role: Role, product: Product) -> Tensor:
    return per_tensor(matrix, _hybrid(role))


def _blockwise(matrix: Tensor, role: Role, product: Product) -> Tensor:
    return blockwise(matrix, square=role == "weight")


def _mxfp8(matrix: Tensor, role: Role, product: Product) -> Tensor:
    return mxfp8(matrix)


def _nvfp4(matrix: Tensor, role: Role, product: Product) -> Tensor:
    if product == "wgrad" and not _leaves_out("RHT"):
        matrix = hadamard(matrix)
    is_stochastic = role == "gradient" and not _leaves_out("STOCHASTIC_ROUNDING")
    square = role == "weight" and not _leaves_out("2D_QUANTIZATION")
    return nvfp4(matrix, square, generator_of(matrix) if is_stochastic else None)


def _leaves_out(part: str) -> bool:
    """Transformer Engine's switches of the NVFP4 recipe."""
    return os.environ.get(f"NVTE_NVFP4_DISABLE_{part}", "0") == "1"


def _hybrid(role: Role) -> torch.dtype:
    return E5M2 if role == "gradient" else E4M3


_ROUNDINGS: dict[str, Rounding] = {
    "tensorwise": _tensorwise, "blockwise": _blockwise, "mxfp8": _mxfp8, "nvfp4": _nvfp4,
}  # fmt: skip


class _DelayedScales:
    """A layer's scales under delayed scaling: from the amax of the previous micro-batch, over the ranks that hold the
    same layers (megatron.core's amax history of length 1). A new run starts with scales of 1, and so does a resumed
    one."""

    def __init__(self) -> None:
        self._scales: dict[Role, Tensor] = {}
        self._amax: dict[Role, Tensor] = {}  # since the last update; includes validation's since then

    def take(self, role: Role, matrix: Tensor, update: bool) -> Tensor:
        """The scale for `matrix`, whose amax determines the next scale. Collective if `update`."""
        amax = amax_of(matrix)
        scale = self._scales.setdefault(role, torch.ones_like(amax))
        amax = torch.maximum(amax, self._amax.get(role, amax))
        if update:
            group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
            if amax.isfinite() and amax > 0:
                self._scales[role] = encode_scale(amax, _hybrid(role))
            amax = torch.zeros_like(amax)
        self._amax[role] = amax
        return scale

    def now(self, role: Role) -> Tensor:
        return self._scales[role]


class _DelayedRounding:
    """Delayed scaling in one micro-batch: both products that read a tensor use one scale."""

    def __init__(self, scales: _DelayedScales, weight_scale: Tensor | None):
        self._all, self._updates = scales, torch.is_grad_enabled()
        self._taken: dict[Role, Tensor] = {} if weight_scale is None else {"weight": weight_scale}

    def __call__(self, matrix: Tensor, role: Role, product: Product) -> Tensor:
        if role not in self._taken:
            self._taken[role] = self._all.take(role, matrix, self._updates)
        return per_tensor(matrix, _hybrid(role), self._taken[role])

    @property
    def weight_scale(self) -> Tensor:
        return self._taken["weight"]


class EmulatedProduct(torch.autograd.Function):
    """x @ W.T with its gradients, the operands of each product rounded. x [..., i], W [o, i]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.rounding = rounding
        product = rounding(_matrix(x), "input", "fprop") @ rounding(weight.float(), "weight", "fprop").T
        return product.view(*x.shape[:-1], len(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rounding, matrix = ctx.rounding, _matrix(gradient)
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            product = rounding(matrix, "gradient", "dgrad") @ rounding(weight.float().T, "weight", "dgrad").T
            x_gradient = product.view(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            product = rounding(matrix.T, "gradient", "wgrad") @ rounding(_matrix(x).T, "input", "wgrad").T
            weight_gradient = product.to(weight.dtype)
        return x_gradient, weight_gradient, None


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.size(-1)).float()


class _Emulated:
    """Base of the linear layers below; their subclasses set `recipe` (`emulated`)."""

    recipe: str
    is_first_microbatch = True  # of a batch: delayed scaling updates the weight's scale only then (`follow_batches`)

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **_: Any,
    ) -> Tensor:
        """Called by megatron.core's linear layers as their matrix product."""
        if sequence_parallel:
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=tp_group)
        if self.recipe == "delayed":
            output = self._delayed_product(input, weight)
        else:
            output = EmulatedProduct.apply(input, weight, _ROUNDINGS[self.recipe])
        return output if bias is None else output + bias

    def _delayed_product(self, input: Tensor, weight: Tensor) -> Tensor:
        if "_scales" not in vars(self):
            self._scales, self._weight_scale = _DelayedScales(), torch.ones((), device=input.device)
        rounding = _DelayedRounding(self._scales, None if self.is_first_microbatch else self._weight_scale)
        output = EmulatedProduct.apply(input, weight, rounding)
        self._weight_scale, self.is_first_microbatch = rounding.weight_scale, False
        return output


class EmulatedColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """megatron.core's column-parallel linear layer with emulated products."""


class EmulatedRowParallelLinear(_Emulated, RowParallelLinear):
    """megatron.core's row-parallel linear layer with emulated products."""


class EmulatedOutputLayer(_Emulated, OutputLayer):  # type: ignore[misc]
    """The LM head with emulated products; materialises all logits instead of a chunk at a time."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, weight: Tensor | None = None, labels_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        logits, bias = super().forward(hidden, weight=weight)
        return (logits, bias) if labels_N is None else losses_of_logits(logits, labels_N, self.tp_group)


@functools.cache
def emulated(layer: type, recipe: str) -> Any:
    """The emulating layer class `layer` for one recipe."""
    return type(f"{recipe.capitalize()}{layer.__name__}", (layer,), {"recipe": recipe})


def follow_batches(chunk: nn.Module) -> None:
    """Have megatron.core's schedules mark the first micro-batch of each batch in the emulated layers of a model chunk,
    as they do for Transformer Engine's layers when TransformerConfig has FP8 (and still do for those: their weights are
    quantised once per batch)."""
    layers = [module for module in chunk.modules() if isinstance(module, _Emulated)]
    if not layers:
        return

    def set_is_first_microbatch() -> None:
        for layer in layers:
            layer.is_first_microbatch = True

    chunk.set_is_first_microbatch = set_is_first_microbatch  # type: ignore[assignment]
