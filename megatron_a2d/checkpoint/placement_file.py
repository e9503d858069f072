"""expert_placement.json: which expert each expert-parallel rank holds, next to the weights that it was measured on.

It is in the directory of an iteration. A run that starts there applies it, and writes it into its own checkpoints. The
manifest does not list it, so that it can be written or removed later: without it a run is slower, but the same. It
names the weights that it belongs to, as another model's placement is no better than none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from megatron_a2d.checkpoint.manifest import MANIFEST, PLACEMENT, Entry, measure, read_manifest
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.utils.atomic_write import read_json, write_json
from megatron_a2d.utils.errors import UserError

_FORMAT = 1
_REMEDY = "write it with checkpoints_tools.place_experts, or give --moe-expert-placement none"


@dataclass(frozen=True)
class ExpertPlacement:
    """A permutation of each layer's experts, and what it was measured on."""

    checkpoint: str  # identity of the weights in the same directory
    measured_at_iteration: int
    expert_model_parallel_size: int
    num_experts_per_tok: int
    imbalance_before: float  # busiest rank's tokens over the mean, mean over layers and held-out batches
    imbalance_after: float
    order: list[list[int]]  # [layers][slots], the original number of the expert in each slot

    def applies_to(self, size: int) -> bool:
        """Whether `size` expert-parallel ranks are a multiple or a divisor of the number that it was made for."""
        made_for = self.expert_model_parallel_size
        return size > 1 and (size % made_for == 0 or made_for % size == 0)

    def describe(self, size: int) -> str:
        """The log line of a run with `size` expert-parallel ranks."""
        made_for = f"made for EP {self.expert_model_parallel_size} at iteration {self.measured_at_iteration}"
        if not self.applies_to(size):
            return f"expert placement: {made_for}, not applied under EP {size}"
        return (
            f"expert placement: {made_for}, where the busiest rank's tokens went from {self.imbalance_before:.2f} to "
            f"{self.imbalance_after:.2f} times the mean"
        )

    def write(self, directory: Path) -> Path:
        """Write the file into an iteration's directory, atomically."""
        write_json(directory / PLACEMENT, {"format": _FORMAT, **asdict(self)})
        return directory / PLACEMENT


def find_placement(config: RunConfig, model_config: ModelConfig, directory: Path) -> ExpertPlacement | None:
    """The placement for a run that starts from the iteration's `directory`, by --moe-expert-placement.

    UserError if it is damaged, belongs to other weights, or if the named file was made for other numbers of ranks.
    """
    setting, size = config.parallel.moe_expert_placement, config.parallel.expert_model_parallel_size
    beside = directory / PLACEMENT
    path = beside if setting == "auto" else Path(setting)
    if setting == "none" or (setting == "auto" and not beside.exists()):
        return None
    placement = read_placement(path, model_config)
    weights = identity(directory)
    if placement.checkpoint != weights:
        # A resumed run still names the file that it started with; its checkpoints hold the same placement.
        held = read_placement(beside, model_config) if beside.exists() else None
        if held is None or held.checkpoint != weights or held.order != placement.order:
            raise UserError(f"{path}: was made for other weights than those of {directory}; {_REMEDY}")
        placement = held
    if setting != "auto" and size > 1 and not placement.applies_to(size):
        raise UserError(
            f"--moe-expert-placement {path}: was made for --expert-model-parallel-size "
            f"{placement.expert_model_parallel_size}, neither a multiple nor a divisor of {size}; {_REMEDY}"
        )
    return placement


def identity(directory: Path) -> str:
    """The identity of an iteration's weights: a digest of the sizes and checksums of its tensor files."""
    if (directory / MANIFEST).exists():
        return _digest(read_manifest(directory))
    # The algorithm of the placements that were written first.
    return _digest(measure(directory, [path.name for path in directory.glob("*.distcp")], algorithm="crc32"))


def carried(placement: ExpertPlacement, entries: Mapping[str, Entry]) -> ExpertPlacement:
    """`placement` for a new checkpoint of the run, whose manifest has the `entries`."""
    return replace(placement, checkpoint=_digest(entries))


def _digest(entries: Mapping[str, Entry]) -> str:
    lines = [f"{name} {entry.size} {entry.checksum}" for name, entry in entries.items() if name.endswith(".distcp")]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def read_placement(path: Path, model_config: ModelConfig) -> ExpertPlacement:
    """The placement in `path`. UserError if it is damaged, or made for a model of another shape."""
    content = read_json(path, "the placement of experts")
    if problem := _damage(content):
        raise UserError(f"{path}: is damaged ({problem}); {_REMEDY}")
    placement = ExpertPlacement(**{name: content[name] for name in get_type_hints(ExpertPlacement)})
    wanted = model_config.num_layers, model_config.num_experts, model_config.num_experts_per_tok
    found = len(placement.order), len(placement.order[0]), placement.num_experts_per_tok
    if not model_config.is_moe:
        raise UserError(f"{path}: the model is dense and has no experts to place; remove the file")
    if found != wanted:
        texts = (
            f"{layers} layers of {experts} experts, {top_k} per token" for layers, experts, top_k in (found, wanted)
        )
        raise UserError(f"{path}: was made for {next(texts)}, but the model has {next(texts)}; {_REMEDY}")
    return placement


def _damage(content: dict[str, Any]) -> str | None:
    """What is wrong with the content of a file, or None."""
    for name, kind in {"format": int, **get_type_hints(ExpertPlacement)}.items():
        if type(content.get(name)) is not (list if name == "order" else kind):
            return f"{name} is {content.get(name)!r:.40}"
    if content["format"] != _FORMAT:
        return f"format {content['format']}, not {_FORMAT}"
    orders, size = content["order"], content["expert_model_parallel_size"]
    experts = list(range(len(orders[0]))) if orders and isinstance(orders[0], list) else []
    if not experts or size < 1 or len(experts) % size:
        return f"expert_model_parallel_size is {size}, and the first layer has {len(experts)} experts"
    for number, order in enumerate(orders, 1):
        is_list = isinstance(order, list) and all(type(expert) is int for expert in order)
        if not is_list or sorted(order) != experts:
            return f"layer {number} does not hold every expert once"
    return None
