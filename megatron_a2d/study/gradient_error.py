"""Gradient error of a run's precision: gradients of some batches against those of the same weights in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_a2d.checkpoint.directory import resolve
from megatron_a2d.config.settings import ROLES, PerformanceConfig, build
from megatron_a2d.data.dataloader import MakeSample
from megatron_a2d.diffusion.corruption import corrupt
from megatron_a2d.diffusion.rng import Noise
from megatron_a2d.study.gradient_moments import one_batch
from megatron_a2d.study.load_run import LoadedRun
from megatron_a2d.terminal.console import progress
from megatron_a2d.training.initialization import build_train_state, load_checkpoint
from megatron_a2d.training.param_shards import over_ranks, owned_shards, squares_by_role
from megatron_a2d.training.validation import run_validation


@dataclass(frozen=True)
class FixedTime(Noise):
    """Noise at the same timestep for every sample."""

    timestep: float = 0.5

    def time(self, sample_index: int) -> float:
        return self.timestep


def in_fp32(loaded: LoadedRun) -> LoadedRun:
    """The same weights and data in fp32, without FP8 or FP4. Collective."""
    defaults = vars(PerformanceConfig())
    names = [name for name in defaults if name.startswith(("fp8_", "fp4_")) or name.endswith("_bf16")]
    config = build({**loaded.config.to_dict(), **{name: defaults[name] for name in names}, "bf16": False})
    assert config.training.load is not None
    state = build_train_state(loaded.model_config, config)
    load_checkpoint(state, resolve(config.training.load), weights_only=True)
    return LoadedRun(config, loaded.model_config, state, loaded.train_data, loaded.valid_data)


def gradient_error(loaded: LoadedRun, batch_size: int, num_batches: int, timesteps: Sequence[float]) -> dict[str, Any]:
    """Cosine and relative error of the gradient by timestep, means over batches; collective.

    Returns {"by_timestep": [{"timestep", "cosine", "relative_error", "cosine_by_role"}], "nelbo_fp32": NELBO of the
    same weights in fp32}.
    """
    exact = in_fp32(loaded)
    rows = []
    with progress("gradients against fp32", len(timesteps) * num_batches, "batches") as advance:
        for timestep in timesteps:
            sums = torch.zeros(2, len(ROLES) + 1, dtype=torch.float64)
            for number in range(num_batches):
                sums += _compare(loaded, exact, _samples(loaded, timestep), batch_size, number * batch_size)
                advance(1)
            cosines, errors = (sums / num_batches).tolist()
            by_role = {role: value for role, value in zip(ROLES, cosines[:-1], strict=True) if value == value}
            rows.append(
                {"timestep": timestep, "cosine": cosines[-1], "relative_error": errors[-1], "cosine_by_role": by_role}
            )
    likelihood = run_validation(exact.state, exact.config, exact.model_config, exact.valid_data)
    return {"by_timestep": rows, "nelbo_fp32": likelihood.nelbo.mean}


def _samples(loaded: LoadedRun, timestep: float) -> MakeSample:
    diffusion = loaded.config.diffusion
    assert diffusion.objective == "mdlm" and loaded.model_config.mask_token_id is not None
    noise = FixedTime(
        seed=loaded.config.data.seed,
        mask_token_id=loaded.model_config.mask_token_id,
        schedule=diffusion.noise_schedule,
        min_timestep=diffusion.min_timestep,
        label_shift=diffusion.label_shift,
        timestep=timestep,
    )
    return lambda tokens, index: corrupt(tokens, index, noise)


def _compare(loaded: LoadedRun, exact: LoadedRun, make: MakeSample, batch_size: int, first: int) -> torch.Tensor:
    """[2, roles + 1]: cosine and relative error of one batch's gradient by role, and of the whole one."""
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for run, gradients in ((loaded, found), (exact, expected)):
        one_batch(run, run.train_data, make, batch_size, first)
        shards = owned_shards(run.state)
        gradients += [shard.gradient().float().clone() for shard in shards]
    squares = [
        squares_by_role(shards, lambda number, _, values=values: values[number])  # type: ignore[misc]
        for values in (found, expected, [a - b for a, b in zip(found, expected, strict=True)])
    ]
    own, reference, difference = (torch.cat([part, part.sum()[None]]) for part in over_ranks(torch.stack(squares)))
    cosine = (own + reference - difference) / (2 * (own * reference).sqrt())
    return torch.stack([cosine, (difference / reference).sqrt()]).cpu()
