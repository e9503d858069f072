"""Run log: lines in the terminal, log.jsonl, TensorBoard and, with --wandb-project, wandb; only rank 0 writes.

SAVE/log.jsonl      one JSON object per line, {"kind": "start" | "train" | "validation" | "checkpoint" | "end", ...}
SAVE/tensorboard/   the same metrics as curves
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_a2d.config.settings import RunConfig
from megatron_a2d.config.skipped_samples import Range
from megatron_a2d.terminal.console import console, human
from megatron_a2d.training.stop_conditions import SkippedSteps
from megatron_a2d.training.tensorboard_layout import layout
from megatron_a2d.training.validation import ValidationResult
from megatron_a2d.training.wandb_run import WandbRun
from megatron_a2d.utils.atomic_write import finite
from megatron_a2d.utils.parsing import ParseError, parse_json
from megatron_a2d.utils.partial_files import open_log

LONGEST_LINE = 1 << 22  # bytes of log.jsonl
CLOCK_JUMP = 10.0  # seconds; corrections by NTP are smaller


class RunLog:
    """The outputs of a run's metrics and events; does nothing with `enabled=False` (ranks other than 0)."""

    def __init__(self, config: RunConfig, iteration: int, enabled: bool):
        self._enabled = enabled
        self._batch_sizes, self._seq_length = config.batch_sizes, config.data.seq_length
        self._objective = config.diffusion.objective
        self._expert_ranks = config.parallel.expert_model_parallel_size
        if not enabled:
            return
        training = config.training
        self._total, self._total_samples = config.num_iterations, config.num_samples
        self._begin = self._batch_sizes.samples_before(iteration), time.monotonic()
        root = Path(training.save) if training.save else None
        tensorboard = training.tensorboard_dir or (root / "tensorboard" if root else None)
        # A resumed run repeats iterations: TensorBoard drops the older records from `purge_step` on.
        self._tensorboard = _TensorBoard(str(tensorboard), config, iteration) if tensorboard else None
        if root:
            root.mkdir(parents=True, exist_ok=True)
        self._path = root / "log.jsonl" if root else None
        self._jsonl = open_log(self._path) if self._path else None
        is_cut = self._path is not None and _cut_unfinished_line(self._path)
        self._last_logged = _last_iteration(self._path) if self._path else 0
        self._clock = time.time() - time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False), TextColumn("eta"), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=self._total, completed=iteration, numbers="", start=True)
        self._progress.start()
        self._wandb = WandbRun(config, iteration, self.say) if training.wandb_project else None
        if is_cut:
            self.say(f"warning: {self._path}: its last line was unfinished, and has been removed")
        if tensorboard:
            self.say(f"curves: python -m megatron_a2d.report {root or tensorboard} --tensorboard")

    def consumed(self, iteration: int) -> dict[str, int]:
        """Samples and tokens that the run has trained on after so many iterations."""
        samples = self._batch_sizes.samples_before(iteration)
        return {"consumed_samples": samples, "consumed_tokens": samples * self._seq_length}

    def say(self, message: str) -> None:
        """Print one line."""
        if self._enabled:
            self._progress.console.print(message, soft_wrap=True)

    def event(self, kind: str, **values: Any) -> None:
        """Add a line to log.jsonl. A full disk does not end the run: the line is written with the next one."""
        if self._enabled and self._jsonl:
            self._watch_clock()
            record = {"kind": kind, "time": time.time(), **finite(values)}
            try:
                self._jsonl.write(json.dumps(record) + "\n")
                self._jsonl.flush()
            except OSError as error:
                self.say(f"warning: {self._path}: cannot be written now ({error.strerror})")

    def _watch_clock(self) -> None:
        """Warn if the clock that dates the records was set; the run itself does not depend on it."""
        clock = time.time() - time.monotonic()
        if abs(jump := clock - self._clock) > CLOCK_JUMP:
            self._clock = clock
            self.say(f"warning: the clock jumped by {jump:+,.0f} s; the times in log.jsonl jump with it")

    def repeated(self, iteration: int) -> None:
        """Say which iterations a run that starts at `iteration` computes again, because they were not saved."""
        if self._enabled and (last := self._last_logged) > iteration:
            first = iteration + 1
            which = f"iteration {first} is" if last == first else f"iterations {first} to {last} are"
            samples = self._batch_sizes.samples_before(last) - self._batch_sizes.samples_before(iteration)
            self.event("repeated", iteration=iteration, iterations=[first, last], samples=samples)
            self.say(f"{which} in log.jsonl but not in this checkpoint, and computed again ({samples} samples)")

    def checkpoint(self, iteration: int, path: Path, seconds: float, stall: float) -> None:
        """Log a complete checkpoint: `seconds` from its start to its final name, of which training waited `stall`."""
        values = {"seconds": round(seconds, 3), "seconds_waited": round(stall, 3)}
        self.event("checkpoint", iteration=iteration, **self.consumed(iteration), path=str(path), **values)
        if self._enabled:
            self._plot("checkpoint", iteration, values)
        self.say(f"checkpoint {path}: written in {seconds:.2f} s, training waited {stall:.2f} s")

    def train(self, iteration: int, values: dict[str, Any]) -> None:
        """Log the means of a log interval to all outputs."""
        if not self._enabled:
            return
        self.event("train", iteration=iteration, **values)
        self._plot("train", iteration, values)
        mfu = values.get("mfu")
        learnt = f"loss {values['loss']:.4f}  acc {values['accuracy']:.1%}"
        if "grafting_error" in values and not math.isfinite(values["loss"]):
            learnt = f"grafting error {values['grafting_error']:.4f}"
        numbers = (
            f"{learnt}  grad {values['grad_norm']:.2f}  "
            f"lr {values['lr']:.2e}  {human(values['consumed_tokens'], 'tok')}  "
            f"{human(values['tokens_per_second'], 'tok')}/s  "
            f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}"
        )
        by_ranks = values.get("moe", {}).get("rank_imbalance", {})
        if busiest := by_ranks.get(f"ep{self._expert_ranks}"):  # sets the pace of expert parallelism
            numbers += f"  busiest rank {busiest:.2f} x"
        self._progress.update(self._task, completed=iteration, numbers=numbers)
        if not console.is_terminal:  # lines instead of a progress bar
            samples, elapsed = self._batch_sizes.samples_before(iteration), time.monotonic() - self._begin[1]
            eta = elapsed / (samples - self._begin[0]) * (self._total_samples - samples)
            self.say(f"iteration {iteration:>{len(str(self._total))}}/{self._total}  {numbers}  eta {eta:.0f} s")

    def validation(self, iteration: int, result: ValidationResult, source: str | None = None) -> None:
        """Log a validation; `source`: the source of a mixture whose held-out data it used."""
        values = result.to_dict()
        where = {"source": source} if source else {}
        self.event("validation", iteration=iteration, **self.consumed(iteration), **values, **result.tables(), **where)
        if self._enabled:
            self._plot(f"validation/{source}" if source else "validation", iteration, values)
        what, tokens = ("NLL", "next") if self._objective == "ar" else ("NELBO", "masked")
        self.say(
            f"validation at {iteration}{f' on {source}' if source else ''}: {what} {result.nelbo} nats/token, "
            f"accuracy on {tokens} tokens {result.accuracy.mean:.1%} ± {result.accuracy.standard_error:.1%} "
            f"({result.num_samples} samples)"
        )

    def skipped(self, iteration: int, samples: Range, culprits: list[int], skipped: SkippedSteps) -> None:
        """Log a step without an update. `culprits`: the indices of the samples whose loss is not finite."""
        ends = [samples.first, samples.last + 1]
        self.event("skipped", iteration=iteration, samples=ends, not_finite=culprits, total=skipped.total)
        shown = ", ".join(map(str, culprits[:8])) + (" ..." if len(culprits) > 8 else "")
        cause = f"the loss of samples {shown}" if culprits else "the losses are finite, their gradient"
        self.say(
            f"iteration {iteration}: {cause} is not finite, no rank updated its weights "
            f"({skipped.in_a_row} in a row, {skipped.total} in total; samples {samples})"
        )

    def spike(self, iteration: int, loss: float, samples: Range) -> None:
        """Log a loss far above the recent ones, and the samples of its log interval."""
        self.event("spike", iteration=iteration, loss=loss, samples=[samples.first, samples.last + 1])
        self.say(f"iteration {iteration}: the loss {loss:.4f} is far above the recent ones (samples {samples})")

    def rollback(self, iteration: int, target: int, samples: Range, number: int, limit: int) -> None:
        """Log that the run returns to the checkpoint of iteration `target` and skips the samples since then."""
        skipped = [samples.first, samples.last + 1]
        self.event("rollback", iteration=iteration, to=target, samples=skipped, number=number)
        self.say(
            f"iteration {iteration}: rollback {number} of at most {limit}, to the checkpoint of iteration {target}; "
            f"samples {samples} are skipped from now on"
        )

    def crowding(self, iteration: int, warning: str) -> None:
        """Log that masked tokens have been crowding on the same experts for long."""
        self.event("crowding", iteration=iteration, warning=warning)
        self.say(f"iteration {iteration}: {warning}")

    def close(self) -> None:
        if self._enabled:
            self._progress.stop()
            for sink in (self._tensorboard, self._jsonl):
                try:
                    if sink:
                        sink.close()
                except OSError as error:
                    self.say(f"warning: the log is incomplete ({error.strerror})")
            if self._wandb:
                self._wandb.close()

    def _plot(self, group: str, iteration: int, values: dict[str, Any]) -> None:
        """Curves of all numbers in TensorBoard and wandb."""
        curves = dict(_curves(group, values))
        if self._tensorboard:
            try:
                self._tensorboard.add(curves, iteration)
            except OSError as error:
                self.say(f"warning: {self._tensorboard.directory}: cannot be written now ({error.strerror})")
        if self._wandb:
            self._wandb.log(curves, iteration)


class _TensorBoard:
    """TensorBoard's writer, or a new one after it has failed: a full disk ends its thread, after which it raises."""

    def __init__(self, directory: str, config: RunConfig, iteration: int):
        self.directory, self._config = directory, config
        self._writer: Any = None
        self._open(iteration)

    def _open(self, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self.directory, purge_step=iteration)
        self._writer.add_custom_scalars(layout(self._config))

    def add(self, curves: dict[str, float], iteration: int) -> None:
        """OSError if the file cannot be written; what it held back is lost, and the next call begins another file."""
        try:
            if not self._writer:
                self._open(iteration)
            for name, value in curves.items():
                self._writer.add_scalar(name, value, iteration)
        except OSError:
            self._writer = None
            raise

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def _curves(group: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """All finite numbers, nested ones by path; lists are only in log.jsonl."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _curves(f"{group}/{name}", value)
        elif isinstance(value, float | int) and math.isfinite(value):
            yield f"{group}/{name}", value


def _cut_unfinished_line(path: Path) -> bool:
    """Remove a killed run's unfinished last line, to which the next record would be appended; whether there was one."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LONGEST_LINE))
        tail = file.read()
        end = size - len(tail) + tail.rfind(b"\n") + 1
        if end < size:
            file.truncate(end)
        return end < size


def _last_iteration(path: Path) -> int:
    """The iteration of the last training record; 0 if there is none."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        if b'"kind": "train"' in line:
            try:
                return int(parse_json(line.decode(errors="replace"))["iteration"])
            except (ParseError, KeyError, TypeError, ValueError):
                continue
    return 0
