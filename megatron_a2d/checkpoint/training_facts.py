"""How a model was trained: settings that its later use depends on and that the tensors do not show.

A run writes them to run.json, an export to config.json under the names of version 0.1, which other tools read, and a
conversion copies config.json: they survive any sequence of these. They are the defaults of a run that starts from the
checkpoint (`inherited`), which warns if it differs (`contradictions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.checkpoint.directory import (
    HF_FILES,
    RUN_CONFIG,
    directory_name,
    iteration_of,
    latest_iteration,
    list_iterations,
    resolve,
)
from megatron_a2d.config.renamed import modernise_record, name_in, recorded_settings
from megatron_a2d.config.settings import RunConfig, flag, settings
from megatron_a2d.families.registry import kind_of, read_config
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError

# SDAR's models were trained so, and its engines count blocks and positions from the beginning of a request.
_SDAR_GRID = {"reset_attention_mask": True, "reset_block_grid": True, "reset_position_ids": True}


class Trained(NamedTuple):
    """Settings (settings.py) of the run that produced the weights."""

    objective: str | None = None  # None: not recorded, the weights are those of the original model
    label_shift: bool = True
    block_length: int = 0
    ar_loss_weight: float = 0.0
    noise_schedule: str = "linear"
    reset_attention_mask: bool = False
    reset_block_grid: bool = False
    reset_position_ids: bool = False

    def as_exported(self) -> dict[str, Any]:
        """The fields of an export's config.json."""
        facts = self._asdict()
        isolated = facts.pop("reset_attention_mask")
        return facts | {"document_attention": "isolated" if isolated else "open"}

    @property
    def is_diffusion(self) -> bool:
        return self.objective in ("mdlm", "block")

    @property
    def is_causal(self) -> bool:
        """Whether next tokens were trained under causal attention, alone or next to block diffusion."""
        return self.objective == "ar" or (self.objective == "block" and self.ar_loss_weight > 0)


def read_trained(directory: str | Path) -> Trained:
    """How the model in an iteration's or a Hugging Face directory was trained. UserError for invalid values."""
    directory = Path(directory)
    if (directory / RUN_CONFIG).is_file() and iteration_of(directory) > 0:
        return _of_run(directory)
    path = (directory / HF_FILES if (directory / HF_FILES).is_dir() else directory) / "config.json"
    config = read_config(path.parent)
    trained = kind_of(config, str(path)).family.diffusion
    if trained is None:
        return _from(config, path, None)
    if trained.objective == "block":
        return _of_blocks(config, path)
    return _from({"label_shift": trained.label_shift, **config}, path, trained.objective)


def _of_run(directory: Path) -> Trained:
    path = directory / RUN_CONFIG
    return _from(read_json(path, "the run's settings"), path, settings()["objective"].default)


def _of_blocks(config: Mapping[str, Any], path: Path) -> Trained:
    """Training facts of a model in SDAR's form; exports of this project also record its objective."""
    length = config.get("block_size")
    if length is None:
        raise UserError(f"{path}: has no block_size; write the block length that the model was trained with into it")
    grid = {} if "objective" in config else _SDAR_GRID
    known = {"objective": "block", "label_shift": False, **grid, **config, "block_length": length}
    return _from(known, path, "block")


def _from(values: Mapping[str, Any], path: Path, objective: str | None) -> Trained:
    modern = modernise_record(values)
    given = {name: modern[name] for name in Trained._fields if modern.get(name) is not None}
    found, wrong = recorded_settings(given)
    if wrong:
        names = ", ".join(name_in(values, name) for name in wrong)
        raise UserError(f"{path}: has no usable {names}; write what the model was trained with into it")
    # null in the export of a model that was not trained.
    return Trained(**{"objective": values.get("objective", objective), **found})


def inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a run with the given settings `values`: how the checkpoint that it starts from was trained.

    Empty if there is no checkpoint yet, or none that can be read, which the start of the run reports.
    """
    trained = _of_start(values)
    if trained is None:
        return {}
    facts = trained._asdict()
    if not trained.is_diffusion or values.get("objective", trained.objective) == "ar":
        facts = {"reset_attention_mask": trained.reset_attention_mask}
    elif values.get("objective", trained.objective) != "block":
        names = ("label_shift", "noise_schedule", "reset_attention_mask", "reset_position_ids")
        facts = {name: facts[name] for name in names}
    return {name: value for name, value in facts.items() if value != settings()[name].default}


def _of_start(values: Mapping[str, Any]) -> Trained | None:
    save, load, wanted = (values.get(name) for name in ("save", "load", "ckpt_step"))
    try:
        own = list_iterations(save) if save else []
        if own and save:
            latest = latest_iteration(save)
            for iteration in reversed(own):
                directory = Path(save) / directory_name(iteration)
                if (directory / RUN_CONFIG).is_file() and (latest is None or iteration <= latest):
                    return _of_run(directory)
            return None
        if not load or values.get("conversion") == "random":
            return None
        return read_trained(resolve(Path(load) / directory_name(wanted) if wanted else load))
    except (UserError, OSError):
        return None


def contradictions(config: RunConfig, trained: Trained, where: Path) -> list[str]:
    """A line for each setting in which a run differs from how the weights in `where` were trained."""
    if not trained.is_diffusion:
        return []
    now, names = config.to_dict(), list(Trained._fields)
    if now["objective"] == "ar":
        names = ["objective", "reset_attention_mask"]
    elif now["objective"] != trained.objective:
        names = ["objective", "label_shift", "noise_schedule", "reset_attention_mask", "reset_position_ids"]
    then = trained._asdict()
    return [
        f"{flag(name)} {_text(now[name])}: {where} was trained with {_text(then[name])}"
        for name in names
        if now[name] != then[name]
    ]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
