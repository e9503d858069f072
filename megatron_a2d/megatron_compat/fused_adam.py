"""AdamW with the interface of Transformer Engine's and apex's FusedAdam, for when neither is installed.

megatron.core's checkpoints expect `step` as a number in each parameter group and {exp_avg, exp_avg_sq} as a
parameter's state; torch.optim.AdamW has a step tensor per parameter, with which the state
reshards incorrectly. The arithmetic is torch's own fused kernel (Loshchilov & Hutter 2019).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Optimizer):
    # Without its decorator, whose first call imports torch's compiler: 1.5 s of CPU time at the start of every process.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ):
        assert bias_correction, "FusedAdam without bias correction is not supported"
        assert not capturable, "a step captured in a CUDA graph is not supported"
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))
        self._kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            # Also for groups that are empty on this rank, so that all ranks' groups have the same step.
            group["step"] = int(group.get("step", 0)) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            for device in {parameter.device for parameter in parameters}:
                self._step_on(device, group, [parameter for parameter in parameters if parameter.device == device])

    def _step_on(self, device: torch.device, group: dict[str, Any], parameters: list[Tensor]) -> None:
        step = torch.tensor(float(group["step"]), device=device)
        self._kernel(
            parameters,
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [step] * len(parameters),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def install() -> None:
    """Make megatron.core use this `Adam` where it would fall back to torch.optim.AdamW."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = Adam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
