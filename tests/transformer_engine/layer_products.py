"""Every FP8 product of a training step where it happens, against its definition with the very same operands.

What goes into each of Transformer Engine's linear layers and what comes out, forward and backward, is kept; afterwards
each is computed from that by the emulation. So no difference can grow from layer to layer, and what is compared is
exact: which half of a quantised tensor is read, cached weights, gradients added up over the micro-batches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_engine.pytorch import GroupedLinear, LayerNormLinear, Linear

from megatron_a2d.model.emulated_layers import _ROUNDINGS, EmulatedProduct, _DelayedRounding, _DelayedScales


class Pass(NamedTuple):
    """One micro-batch's way through a layer: input, tokens of each expert, output; filled in backward: gradients."""

    x: Tensor
    splits: list[int]
    y: Tensor
    gradients: dict[str, Tensor]


class LayerRecord:
    """The micro-batches of one step through one layer."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.passes: list[Pass] = []
        names = sorted(name for name, _ in layer.named_parameters() if name.startswith("weight"))
        self.parameters = [getattr(layer, name) for name in names]
        self.weights: list[Tensor] = []
        self._entered: Tensor
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave)

    def _enter(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        self._entered = arguments[0].view_as(arguments[0])  # of this layer alone: its gradient is the layer's
        if not self.weights:
            self.weights = [parameter.detach().clone() for parameter in self.parameters]
        return (self._entered, *arguments[1:])

    def _leave(self, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        y, gradients = output[0], dict[str, Tensor]()
        splits = list(arguments[1]) if isinstance(self.layer, GroupedLinear) else [y.numel() // y.size(-1)]
        self.passes.append(
            Pass(self._entered.detach().clone(), [int(n) for n in splits], y.detach().clone(), gradients)
        )
        self._entered.register_hook(lambda gradient: gradients.__setitem__("x", gradient.clone()))
        y.register_hook(lambda gradient: gradients.__setitem__("y", gradient.clone()))

    def distances(self, recipe: str) -> dict[str, float]:
        """Relative distances of outputs, input gradients and the weights' summed gradients from the definition."""
        found, sums = {"output": 0.0, "input gradient": 0.0}, [torch.zeros_like(weight) for weight in self.weights]
        scales = [_DelayedScales() for _ in self.weights]
        weight_scales: list[Tensor | None] = [None] * len(self.weights)
        for item in self.passes:
            roundings: list[Any] = [_ROUNDINGS.get(recipe)] * len(self.weights)
            if recipe == "delayed":
                roundings = [_DelayedRounding(*pair) for pair in zip(scales, weight_scales, strict=True)]
            x, weights = item.x.clone().requires_grad_(), [weight.clone().requires_grad_() for weight in self.weights]
            rows = self._normed(x).flatten(0, -2).split(item.splits)
            y = torch.cat([EmulatedProduct.apply(*each) for each in zip(rows, weights, roundings, strict=True)])
            y = y.view(item.y.shape)
            y.backward(item.gradients["y"])
            for name, ours, theirs in (("output", y, item.y), ("input gradient", x.grad, item.gradients["x"])):
                found[name] = max(found[name], _distance(theirs, ours))
            for total, weight in zip(sums, weights, strict=True):
                total += weight.grad
            if recipe == "delayed":
                weight_scales = [rounding.weight_scale for rounding in roundings]
        measured = torch.stack([parameter.main_grad for parameter in self.parameters])
        return {**found, "weight gradient": _distance(measured, torch.stack(sums))}

    def _normed(self, x: Tensor) -> Tensor:
        if not isinstance(self.layer, LayerNormLinear):
            return x
        return F.rms_norm(x, (x.size(-1),), self.layer.layer_norm_weight.detach(), self.layer.eps)


def record_layers(models: list[nn.Module]) -> list[LayerRecord]:
    linear = (LayerNormLinear, Linear, GroupedLinear)
    return [LayerRecord(layer) for model in models for layer in model.modules() if isinstance(layer, linear)]


def _distance(measured: Tensor, expected: Tensor) -> float:
    return float((measured - expected).norm() / expected.norm())
