"""--profile: a trace of a few iterations for Perfetto, and how their time divides into phases.

SAVE/profile/iterations_10-12_rank_0.json.gz    torch's trace of a rank; open it at ui.perfetto.dev or chrome://tracing
SAVE/profile/iterations_10-12.json              milliseconds per step by phase and profiled rank; printed as a table

The first rank of each pipeline stage is profiled. The profiler itself takes time, on a CPU a considerable share: trust
the shares more than the milliseconds.
"""

from __future__ import annotations

import gzip
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.distributed.step_timers import PHASES, Recorder
from megatron_a2d.megatron_compat.device import has_cuda
from megatron_a2d.training.logger import RunLog
from megatron_a2d.training.train_state import TrainState
from megatron_a2d.utils.atomic_write import new_file, write_json


class Profile:
    """Profile of a run; does nothing without --profile."""

    def __init__(self, config: RunConfig, state: TrainState, log: RunLog):
        training = config.training
        self._first, self._last = training.profile_step_start, training.profile_step_end
        self._is_on = training.profile and state.iteration < self._first
        self._profiler: torch.profiler.profile | None = None
        self._error: str | None = None
        self._recorder: Recorder | None = None
        if training.profile and not self._is_on:  # no error: a requeued job has the same flags
            log.say(f"--profile: iterations {self._first} to {self._last} are already past; nothing is profiled")
        if self._is_on:
            assert training.save is not None
            self._name = f"iterations_{self._first}-{self._last}"
            self._directory = Path(training.save) / "profile"
            if _is_first_of_stage():
                self._recorder = Recorder([model.config for model in state.models])

    def measure(self, iteration: int) -> AbstractContextManager[None]:
        """Context around the step of `iteration`."""
        if self._recorder is None or not self._first - 1 <= iteration <= self._last:
            return nullcontext()
        if self._profiler is None:
            # The profiler starts up in the iteration before, if there is one.
            self._profiler = torch.profiler.profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_cuda() else [])],
                schedule=torch.profiler.schedule(
                    wait=0, warmup=self._first - iteration, active=self._last - self._first + 1, repeat=1
                ),
                on_trace_ready=self._write_trace,
            )
            self._profiler.start()
        return self._recorder.measuring() if iteration >= self._first else nullcontext()

    def after(self, iteration: int, log: RunLog) -> None:
        """To be called after the step, outside the timed part; the last one writes files and table. Collective."""
        if self._profiler is not None:
            self._profiler.step()
        if self._is_on and iteration == self._last:
            self._report(log)
            self._is_on, self._profiler, self._recorder = False, None, None

    def close(self, log: RunLog) -> None:
        """To be called at the end of the run; an incomplete profile is discarded."""
        if self._profiler is not None:
            self._profiler.on_trace_ready = None
            self._profiler.stop()
        if self._is_on:
            log.say(f"--profile: the run ended before iteration {self._last}; no profile was written")

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        try:
            with new_file(self._directory / f"{self._name}_rank_{dist.get_rank()}.json.gz") as partial:
                plain = partial.with_suffix(".json")
                try:
                    profiler.export_chrome_trace(str(plain))
                    with open(plain, "rb") as source, gzip.open(partial, "wb") as target:
                        shutil.copyfileobj(source, target)
                finally:
                    plain.unlink(missing_ok=True)
        except (OSError, RuntimeError) as error:  # a full disk does not end the run
            self._error = f"{self._directory}: the trace of rank {dist.get_rank()} could not be written ({error})"

    def _report(self, log: RunLog) -> None:
        mine: dict[str, Any] | None = None
        if self._recorder is not None:
            steps = self._last - self._first + 1
            times = {name: time / steps for name, time in self._recorder.milliseconds().items()}
            stage = parallel_state.get_pipeline_model_parallel_rank()
            mine = {"rank": dist.get_rank(), "stage": stage, "ms_per_step": times, "error": self._error}
        gathered: list[dict[str, Any] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        ranks = sorted((item for item in gathered if item), key=lambda item: item["stage"])
        if dist.get_rank() > 0:
            return
        for error in filter(None, (item.pop("error") for item in ranks)):
            log.say(f"warning: {error}")
        result = {"first_iteration": self._first, "last_iteration": self._last, "ranks": ranks}
        try:
            write_json(self._directory / f"{self._name}.json", result)
        except OSError as error:
            log.say(f"warning: {self._directory}: the table could not be written ({error.strerror})")
        log.event("profile", iteration=self._last, **result)
        log.say(as_table(result))
        log.say(f"traces for ui.perfetto.dev: {self._directory}/{self._name}_rank_*.json.gz")


def as_table(result: dict[str, Any]) -> str:
    """Milliseconds per step and shares by phase, a pair of columns for each profiled rank."""
    ranks = result["ranks"]
    total = [sum(item["ms_per_step"].values()) for item in ranks]
    head = [f"profile of iterations {result['first_iteration']} to {result['last_iteration']}"]
    if len(ranks) > 1:
        names = (f"stage {item['stage']}, rank {item['rank']}" for item in ranks)
        head.append(" " * 12 + "".join(f"  {name:>18}" for name in names))
    head.append(f"{'phase':<12}" + f"  {'ms per step':>11}{'share':>7}" * len(ranks))
    rows = [(name, [item["ms_per_step"][name] for item in ranks]) for name in PHASES]
    lines = [
        f"{name:<12}" + "".join(f"  {value:>11.2f}{value / whole:>7.1%}" for value, whole in zip(v, total, strict=True))
        for name, v in [*rows, ("step", total)]
    ]
    return "\n".join([*head, *lines])


def _is_first_of_stage() -> bool:
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0 and (
        parallel_state.get_tensor_model_parallel_rank() == 0
    )
