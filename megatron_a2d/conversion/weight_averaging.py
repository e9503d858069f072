"""Weight averaging over checkpoints of one run, streamed: uniform, or an exponential moving average (EMA)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_a2d import __version__
from megatron_a2d.checkpoint.bridge_config import write_run_config
from megatron_a2d.checkpoint.directory import HF_FILES, RUN_CONFIG, TRACKER, copy_hf_files, directory_name, iteration_of
from megatron_a2d.checkpoint.manifest import write_manifest
from megatron_a2d.checkpoint.tensor_rows import FiniteCheck, RowRange, RowSource, num_bytes
from megatron_a2d.checkpoint.torch_dist_reader import read_common
from megatron_a2d.checkpoint.training_facts import read_trained
from megatron_a2d.conversion.compare_weights import model_config_differences
from megatron_a2d.conversion.hf_to_torch_dist import check_space
from megatron_a2d.conversion.resumable_output import describe_files, resumable_directory
from megatron_a2d.conversion.sources import Weights, as_megatron, open_checkpoint
from megatron_a2d.conversion.torch_dist_writer import write_torch_dist
from megatron_a2d.conversion.weight_map import EMBEDDING
from megatron_a2d.conversion.workers import DEFAULT_WORKERS
from megatron_a2d.terminal.console import progress
from megatron_a2d.utils.atomic_write import check_new_directory
from megatron_a2d.utils.errors import UserError


class Averaged(NamedTuple):
    directory: Path
    iterations: list[int]
    factors: list[float]


class MeanRows:
    """A `RowSource`: the weighted sum of `sources`, computed in fp32 and cast to the dtype of the first."""

    def __init__(self, sources: Sequence[RowSource], factors: Sequence[float]):
        self.shapes: Mapping[str, tuple[int, ...]] = sources[0].shapes
        self._sources, self._factors = sources, factors

    def dtype(self, name: str) -> torch.dtype:
        return self._sources[0].dtype(name)

    def read(self, row_range: RowRange, memory: memoryview | None = None) -> torch.Tensor:
        total = None
        for source, factor in zip(self._sources, self._factors, strict=True):
            rows = source.read(row_range).float().mul_(factor) if factor != 1 else source.read(row_range).float()
            total = rows if total is None else total.add_(rows)
        assert total is not None
        return total.to(self.dtype(row_range.name))


def factors_of(count: int, ema_decay: float | None) -> list[float]:
    """The weights of `count` checkpoints, oldest first, which sum to 1.

    With a decay d they are those of ema <- d ema + (1 - d) next, initialised with the first checkpoint.
    """
    if ema_decay is None:
        return [1 / count] * count
    later = [(1 - ema_decay) * ema_decay ** (count - 1 - i) for i in range(1, count)]
    return [ema_decay ** (count - 1), *later]


def average(
    checkpoints: Sequence[Path],
    out: Path,
    ema_decay: float | None = None,
    workers: int = DEFAULT_WORKERS,
    allow_nonfinite: bool = False,
) -> Averaged:
    """Write the mean of `checkpoints` as the checkpoint `out`, with the iteration and settings of the newest.

    It holds weights only: train from it with --finetune, or export it with export_hf. Raises UserError if the
    checkpoints differ in architecture or hold non-finite values.
    """
    check_new_directory(out, "--out")
    with ExitStack() as stack:
        sources = sorted((stack.enter_context(open_checkpoint(path)) for path in checkpoints), key=_iteration)
        _check_alike(sources)
        newest, iterations = sources[-1], [_iteration(weights) for weights in sources]
        factors = factors_of(len(sources), ema_decay)
        checks = [FiniteCheck(weights.tensors) for weights in sources]
        # The newest first: the result has its dtypes.
        mean = MeanRows(checks[::-1], factors[::-1])
        tensors = as_megatron(newest._replace(tensors=mean), None)
        size = num_bytes(tensors)
        check_space(out, size)
        files = [describe_files(weights.directory) for weights in sources]
        identity = {
            "version": __version__,
            "factors": factors,
            "allow_nonfinite": allow_nonfinite,
            "sources": files,
        }
        with resumable_directory(out, "--out", identity) as work:
            work.may_keep = lambda: allow_nonfinite or not any(check.non_finite for check in checks)
            subdirectory = directory_name(iterations[-1])
            directory = work.directory / subdirectory
            (directory / HF_FILES).mkdir(parents=True, exist_ok=True)
            common: dict[str, Any] = {
                "iteration": iterations[-1],
                "consumed_samples": read_common(newest.directory).get("consumed_samples"),
                "averaged_iterations": iterations,
            }
            with progress("averaging", size, "B", work.num_bytes_done()) as advance:
                entries = write_torch_dist(work, subdirectory, tensors, newest.map, common, advance, workers)
            problems = [
                line
                for check, weights in zip(checks, sources, strict=True)
                for line in check.problems(weights.directory)
            ]
            if problems and not allow_nonfinite:
                raise UserError(problems)
            copy_hf_files(newest.directory / HF_FILES, directory / HF_FILES)
            write_run_config(directory, directory / HF_FILES, tensors.dtype(EMBEDDING))
            if (newest.directory / RUN_CONFIG).exists():
                shutil.copyfile(newest.directory / RUN_CONFIG, directory / RUN_CONFIG)
            write_manifest(directory, entries)
            (work.directory / TRACKER).write_text(f"{iterations[-1]}\n", encoding="utf-8")
    return Averaged(out, iterations, factors)


def _iteration(weights: Weights) -> int:
    return iteration_of(weights.directory)


def _check_alike(sources: Sequence[Weights]) -> None:
    if len(sources) < 2:
        raise UserError("--checkpoints: a mean needs at least two; name more iterations")
    problems = [line for other in sources[1:] for line in model_config_differences(sources[0], other)]
    masks = {weights.model_config.mask_token_id for weights in sources}
    if len(masks) > 1:
        problems.append(
            f"--checkpoints: their mask tokens differ ({', '.join(map(str, masks))}); name one run's iterations"
        )
    if len({read_trained(weights.directory) for weights in sources}) > 1:
        problems.append("--checkpoints: their objectives or schedules differ; name one run's iterations")
    directories = [weights.directory.resolve() for weights in sources]
    twice = sorted({path for path in directories if directories.count(path) > 1})
    problems += [f"--checkpoints {path}: is named twice; name each once" for path in twice]
    if problems:
        raise UserError(problems)
