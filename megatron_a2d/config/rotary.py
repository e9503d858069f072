"""The rotary embedding that a Hugging Face `config.json` asks for: base and scaling.

Scalings for texts longer than those of pretraining: YaRN (Peng et al. 2023), and that of Llama 3.1 (`llama3`).

transformers 4 spells it `rope_theta` and `rope_scaling`, transformers 5 puts both into `rope_parameters`, and a file
can hold all three. The versions prefer different ones, so settings that contradict one another are an error.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_a2d.families.registry import Kind

_YARN_NUMBERS = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_YARN_KEYS = {
    *_YARN_NUMBERS, "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "truncate", "finetuned",
}  # fmt: skip
_LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")
_LLAMA3_KEYS = {
    *_LLAMA3_NUMBERS, "type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: slow rotations are slowed by `factor`, fast ones kept, those between blended.

    `attention_factor` multiplies queries and keys, so its square multiplies the attention scores. `beta_fast` and
    `beta_slow` bound the blend, in rotations within `original_max_position_embeddings`; `truncate` rounds its bounds to
    whole frequencies.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def extended_length(self) -> int:
        """Positions for which the scaling is made."""
        return round(self.factor * self.original_max_position_embeddings)

    def to_rope_scaling(self) -> dict[str, Any]:
        """`rope_scaling` of a config.json as in Qwen's model cards, without default values."""
        optional = {
            "attention_factor": (self.attention_factor, attention_factor(self.factor)),
            "beta_fast": (self.beta_fast, 32.0),
            "beta_slow": (self.beta_slow, 1.0),
            "truncate": (self.truncate, True),
        }
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            **{name: value for name, (value, default) in optional.items() if value != default},
        }


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: frequencies with less than `low_freq_factor` rotations within `original_max_position_embeddings` are
    slowed by `factor`, those with more than `high_freq_factor` kept, those between blended by their rotations."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float

    attention_factor = 1.0  # queries and keys keep their length
    extended_length = 0  # max_position_embeddings says it: the factor stands for no number of positions

    def to_rope_scaling(self) -> dict[str, Any]:
        """`rope_scaling` of a config.json."""
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }


RopeScaling = YarnScaling | Llama3Scaling


class Rotary(NamedTuple):
    """Position embedding settings of a config.json."""

    theta: float
    scaling: RopeScaling | None


def attention_factor(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature (equation 22 of the paper) as a factor of queries and keys."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_rotary(
    config: dict[str, Any], where: str, max_position_embeddings: int, problems: list[str], kind: Kind
) -> Rotary:
    """The rotary embedding of `config`; problems are appended to `problems`, with `where`, its file."""
    objects = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value and (not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values())):
            problems.append(f"{where}: {key} is {value!r}, not one object of settings; correct the file")
        elif value:
            objects[key] = {name: item for name, item in value.items() if item is not None}
    theta = _theta(config, objects, where, problems, kind)
    part = agreed(_spellings("partial_rotary_factor", config, objects), where, problems)
    if part not in (None, 1):
        problems.append(
            f"{where}: partial_rotary_factor is {part!r}, and only 1 is supported; "
            f"use an unmodified {kind.family.title}"
        )
    read = []
    for key, found in objects.items():
        length = _spellings("original_max_position_embeddings", config, {key: found})
        original = agreed(length, where, problems)
        read.append(_scaling(found, f"{where}: {key}", original, max_position_embeddings, problems))
    if len(read) == 2 and read[0] != read[1] and not problems:
        problems.append(
            f"{where}: rope_scaling is {config['rope_scaling']} and rope_parameters is {config['rope_parameters']}, "
            "which are different embeddings; remove the wrong one"
        )
    return Rotary(theta, read[0] if read else None)


def agreed(found: dict[str, Any], where: str, problems: list[str]) -> Any:
    """The value of a setting, given all its spellings in `found`; None if there is none, a problem if they differ."""
    first = next(iter(found.values()), None)
    if any(value != first for value in found.values()):
        values = " and ".join(f"{key} is {value!r}" for key, value in found.items())
        problems.append(f"{where}: {values}, which are spellings of one setting; correct or remove the wrong one")
    return first


def is_positive(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _spellings(name: str, config: dict[str, Any], objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """key -> value of the setting `name`, wherever config.json has it."""
    places = {name: config.get(name)} | {f"{key}.{name}": found.get(name) for key, found in objects.items()}
    return {key: value for key, value in places.items() if value is not None}


def _theta(
    config: dict[str, Any], objects: dict[str, dict[str, Any]], where: str, problems: list[str], kind: Kind
) -> float:
    found = _spellings("rope_theta", config, objects)
    theta = agreed(found, where, problems)
    if theta is None:
        theta = kind.absent("rope_theta", None, config)
    if theta is None:
        problems.append(
            f"{where}: rope_theta is missing; write the base of the model's rotary embedding into the file (Qwen2.5 "
            "and Qwen3 use 1000000)"
        )
    elif not is_positive(theta) or theta <= 1:
        problems.append(f"{where}: rope_theta is {theta!r}, not a positive number above 1; correct the file")
    elif "rope_scaling" in objects and set(found) == {"rope_parameters.rope_theta"}:
        problems.append(
            f"{where}: rope_theta is only in rope_parameters, which transformers ignores next to rope_scaling; "
            "write it at the top level too"
        )
    else:
        return float(theta)
    return 1.0


def _scaling(found: dict[str, Any], here: str, original: Any, longest: int, problems: list[str]) -> RopeScaling | None:
    """The scaling of a config.json's object of rotary settings; None without one, or if a setting is invalid."""
    kind = agreed({name: found[name] for name in ("rope_type", "type") if name in found}, here, problems) or "default"
    if kind == "yarn":
        return _yarn(found, here, original, longest, problems)
    if kind == "llama3":
        return _llama3(found, here, original, problems)
    if kind != "default":
        problems.append(
            f"{here}: rotary scaling {kind!r} is not supported, only 'yarn' and 'llama3'; use the base model without it"
        )
    return None


def _wrong_settings(
    found: dict[str, Any], here: str, original: Any, names: tuple[str, ...], known: set[str], title: str
) -> list[str]:
    """Problems with the numbers `names` of a scaling, and with keys that it does not have."""
    numbers = {name: found[name] for name in names if name in found}
    wrong = [
        f"{here}: {name} is {value!r}, not a positive number; correct the file"
        for name, value in {**numbers, "original_max_position_embeddings": original}.items()
        if not is_positive(value) and not (value == 0 and name.startswith("mscale"))
    ]
    if not wrong and original != int(original):
        wrong.append(f"{here}: original_max_position_embeddings is {original!r}, not a whole number; correct the file")
    wrong += [
        f"{here}: {title} has no setting {name!r}, and transformers ignores it; remove it"
        for name in found
        if name not in known
    ]
    return wrong


def _llama3(found: dict[str, Any], here: str, original: Any, problems: list[str]) -> Llama3Scaling | None:
    wrong = [f"{here}: {name} is missing, and llama3 has no default" for name in _LLAMA3_NUMBERS if name not in found]
    wrong += _wrong_settings(found, here, original, _LLAMA3_NUMBERS, _LLAMA3_KEYS, "llama3")
    if not wrong:
        factor, low, high = (float(found[name]) for name in _LLAMA3_NUMBERS)
        if factor < 1:
            wrong.append(f"{here}: factor is below 1; give the new context length divided by the original")
        if high <= low:
            wrong.append(f"{here}: high_freq_factor {high:g} must exceed low_freq_factor {low:g}; correct the file")
    if wrong:
        problems += wrong
        return None
    return Llama3Scaling(factor, int(original), low, high)


def _yarn(found: dict[str, Any], here: str, original: Any, longest: int, problems: list[str]) -> YarnScaling | None:
    """YaRN settings, with transformers' rules for missing keys; None if a setting is invalid."""
    original = original or longest
    numbers = {name: found[name] for name in _YARN_NUMBERS if name in found}
    wrong = _wrong_settings(found, here, original, _YARN_NUMBERS, _YARN_KEYS, "YaRN")
    truncate = found.get("truncate", True)
    if not isinstance(truncate, bool):
        wrong.append(f"{here}: truncate is {truncate!r}, neither true nor false; correct the file")
    if wrong:
        problems += wrong
        return None
    factor = float(numbers["factor"]) if "factor" in numbers else longest / original
    if factor < 1 or (factor == 1 and "factor" not in numbers):
        problems.append(f"{here}: factor is missing or below 1; give the new context length divided by the original")
    fast, slow = float(numbers.get("beta_fast", 32)), float(numbers.get("beta_slow", 1))
    if fast < slow:
        problems.append(f"{here}: beta_fast {fast:g} is below beta_slow {slow:g}; swap them")
    above, below = numbers.get("mscale"), numbers.get("mscale_all_dim")
    scale = numbers.get("attention_factor")
    if scale is None and above and below:
        scale = attention_factor(factor, above) / attention_factor(factor, below)
    return YarnScaling(factor, int(original), float(scale or attention_factor(factor)), fast, slow, truncate)
