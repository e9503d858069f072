"""Renamed settings, flags and metrics: the names of version 0.1, and their current names and values.

For one version flags and recipes may use the old names, with a warning that gives the new one. A run's records
(run.json, log.jsonl) are read with either.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_a2d.config.settings import Setting, settings, without_spaces
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line


class Renamed(NamedTuple):
    """A setting's current name, and old value -> new value; other values are unchanged."""

    name: str
    values: Mapping[Any, Any] = {}


SETTINGS = {
    "document_attention": Renamed("reset_attention_mask", {"open": False, "isolated": True}),
    "eod_maskable": Renamed("eod_mask_loss", {True: False, False: True}),
    "load_iteration": Renamed("ckpt_step"),
    "keep_last": Renamed("keep_latest_k"),
    "keep_every": Renamed("save_retain_interval"),
    "fp8": Renamed("fp8_recipe"),
    "fp4": Renamed("fp4_recipe"),
    "transformer_impl": Renamed("transformer_impl", {"portable": "local"}),
    "attention_annealing_steps": Renamed("attention_annealing_iters"),
    "grafting_steps": Renamed("grafting_iters"),
    "time_sampling": Renamed("timestep_sampling"),
    "min_time": Renamed("min_timestep"),
    "loss_weights": Renamed("loss_weighting"),
    "mask_embedding": Renamed("mask_token_init", {"as_is": "pretrained"}),
}
# Flags that are not settings. Replaced only for a command that has the new flag and not the old one.
FLAGS = {
    "--beside": "--compare-with",
    "--guidance": "--cfg-scale",
    "--thorough": "--full",
    "--hf": "--hf-model",
    "--export": "--hf-model",
    "--json-key": "--json-keys",
}
# Metrics of log.jsonl. Those of "router" are now under "moe".
METRICS = {
    "router": "moe",
    "noise_scale": "grad_noise_scale",
    "gradient_noise": "tr_sigma",
    "gradient_signal": "grad_norm_sq",
    "update_ratio_by_role": "update_to_weight_ratio",
    "drift_by_role": "relative_weight_change",
    "loss_by_time": "loss_by_t",
}
MOE_METRICS = {
    "load_masked": "load_imbalance_masked",
    "load_visible": "load_imbalance_unmasked",
    "entropy_visible": "entropy_unmasked",
    "load_difference": "load_tv_distance",
    "dropped": "dropped_token_frac",
    "overflow": "over_mean_load_frac",
}


def modernise_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of log.jsonl with current names."""
    result = {METRICS.get(name, name): value for name, value in record.items()}
    if isinstance(result.get("moe"), dict):
        result["moe"] = {MOE_METRICS.get(name, name): value for name, value in result["moe"].items()}
    return result


def modernise(name: str, value: Any) -> tuple[str, Any]:
    """A setting's current name and value."""
    if name not in SETTINGS:
        return name, value
    now, values = SETTINGS[name]
    return now, values[value] if isinstance(value, bool | str) and value in values else value


def modernise_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's recorded settings with current names; if both names are present, the new one counts."""
    modern = [(name, *modernise(name, value)) for name, value in values.items()]
    return {now: value for name, now, value in modern if now == name or now not in values}


def recorded_settings(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that a run's record (run.json) holds, and the names of those whose values none can have.

    A name that is not known is left out: it is of an older or a newer version.
    """
    known = {name: value for name, value in modernise_record(values).items() if name in settings()}
    wrong = [name for name, value in known.items() if not _can_be(settings()[name], value)]
    return {name: _as_read(settings()[name], value) for name, value in known.items() if name not in wrong}, wrong


def _as_read(item: Setting, value: Any) -> Any:
    """A value as settings are read now; earlier versions recorded the spaces of a schedule."""
    return without_spaces(value) if item.read is without_spaces else value


def _can_be(item: Setting, value: Any) -> bool:
    if value is None:
        return item.optional
    if isinstance(item.kind, tuple):
        return isinstance(value, str) and value in item.kind
    if item.kind is list:
        return isinstance(value, list) and all(type(part) is item.element for part in value)
    if item.kind is dict:
        return isinstance(value, dict) and all(_is_number(factor) for factor in value.values())
    if item.kind in (bool, str):
        return isinstance(value, item.kind)
    return _is_number(value) and (item.kind is float or isinstance(value, int))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def name_in(values: Mapping[str, Any], name: str) -> str:
    """The name, old or new, under which `values` hold the setting `name`."""
    return next((old for old, new in SETTINGS.items() if new.name == name and old in values), name)


def modernise_flags(words: Sequence[str], known: Collection[str]) -> list[str]:
    """A command line with current flags, for a command whose flags are `known`; warns about each old one."""
    result: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word == "--":
            return [*result, word, *pending]
        given, equals, text = word.partition("=")
        if (found := _flag(given, known)) is None:
            result.append(word)
            continue
        new, values = found
        old = given
        if not values:
            result.append(new + equals + text)
        elif True in values:  # a switch
            new = _switch(new, values[not given.startswith("--no-")])
            result.append(new)
        else:
            text = text if equals or not pending else pending.pop(0)
            value = values.get(text, text)
            if given == new and value == text:
                result += [given, text]
                continue
            old = f"{given} {text}"
            if True in values.values() and text not in values:
                raise UserError(f"{old}: must be one of {', '.join(values)}; or use {new}, its new name")
            result += [new := _switch(new, value)] if isinstance(value, bool) else [new, value]
            new = new if isinstance(value, bool) else f"{new} {value}"
        _warn(old, new)
    return result


def _flag(given: str, known: Collection[str]) -> tuple[str, Mapping[Any, Any]] | None:
    """The new flag and its values for an old one; None if the flag has not been renamed."""
    if given in FLAGS:
        return (FLAGS[given], {}) if FLAGS[given] in known and given not in known else None
    old = given.removeprefix("--no-" if given.startswith("--no-") else "--").replace("-", "_")
    if not given.startswith("--") or old not in SETTINGS:
        return None
    name, values = SETTINGS[old]
    new = "--" + name.replace("_", "-")
    if new not in known or (given.startswith("--no-") and True not in values):
        return None
    return new, values


def _switch(flag: str, on: bool) -> str:
    return flag if on else f"--no-{flag[2:]}"


def warn_of_key(where: str, old: tuple[str, Any], new: tuple[str, Any]) -> None:
    """Warn about a recipe's (name, value) in the old spelling."""
    if old[1] == new[1]:
        _warn(f"{where}: {old[0]}", new[0])
    else:
        _warn(f"{where}: {old[0]}: {_yaml(old[1])}", f"{new[0]}: {_yaml(new[1])}")


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _warn(old: str, new: str) -> None:
    """Once per run: on the first rank, and in the first process of launch/train.sh that reads the settings."""
    if os.environ.get("RANK", "0") == "0" and "A2D_SETTINGS_READ" not in os.environ:
        print_line(f"warning: {old} is now {new}; the old name will be removed in the next version", sys.stderr)
