"""RMS norm, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.transformer_engine.stand_in.enums import torch_dtype
from tests.transformer_engine.stand_in.fp8_casts import check, flat
from tests.transformer_engine.stand_in.quantized import quantize


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:  # fmt: skip
    """[output, None, 1 / root of the mean square of each row]; the output is quantised if there is a quantizer."""
    check(weight.dim() == 1 and weight.numel() == input.size(-1), "the weight of a norm")
    rows = flat(input.detach()).float()
    rsigma = torch.rsqrt(rows.square().mean(-1) + eps)
    gamma = weight.detach().float() + zero_centered_gamma
    # As the local layers do it, to the last bit: FP8 shows every difference of one.
    result = F.rms_norm(rows, (rows.size(-1),), gamma, eps).to(torch_dtype(otype)).view(input.shape)
    if quantizer is not None:
        result = quantize(result, quantizer, ln_out)
    elif ln_out is not None:
        result = ln_out.copy_(result)
    return [result, None, rsigma]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    """[gradient of the input, gradient of the weight]."""
    check(dz.shape == x.shape, f"gradient {tuple(dz.shape)} of a norm of {tuple(x.shape)}")
    check(dz.dtype == x.dtype, f"gradient {dz.dtype} of a norm of {x.dtype}")
    rows, gradient = flat(x).float(), flat(dz).float()
    check(rsigma.numel() == rows.size(0), "rsigma")
    normed = rows * rsigma.view(-1, 1)
    weighted = gradient * (gamma.float() + zero_centered_gamma)
    dx = rsigma.view(-1, 1) * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype).view(x.shape), (gradient * normed).sum(0).to(gamma.dtype)]
