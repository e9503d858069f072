"""The families that are supported, and lookups among them. A new family is one file and one entry of FAMILIES."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from megatron_a2d.families import dream, llada, llada_moe, llama, own_formats, qwen2, qwen3
from megatron_a2d.families.family import Family, ModelType
from megatron_a2d.families.unsupported import what_is_unsupported
from megatron_a2d.utils.errors import UserError, nearest

FAMILIES: tuple[Family, ...] = (
    qwen3.QWEN3,
    qwen2.QWEN2,
    llama.LLAMA,
    dream.DREAM,
    llada.LLADA,
    llada_moe.LLADA_MOE,
    own_formats.RND1,
    own_formats.A2D,
    own_formats.SDAR,
)

# Spellings that every family's files may have: those of the hub, and those of transformers 5.
_SPELLINGS = {"num_experts": ("num_experts", "num_local_experts")}
# What a hub name has besides the model's: the form of training, and a date.
_VARIANT = re.compile(r"-(?:Base|Instruct|Thinking|[Cc]hat|cpGRPO|hf)(?=-|$)|-\d{4}$")


class Kind(NamedTuple):
    """What a config.json is of."""

    family: Family
    model_type: ModelType

    def spellings(self, setting: str) -> tuple[str, ...]:
        """The keys of config.json that hold `setting`; the first is the usual one."""
        return self.family.keys.get(setting) or _SPELLINGS.get(setting) or (setting,)

    def absent(self, setting: str, default: Any, config: Mapping[str, Any]) -> Any:
        """What a model takes for a setting without value: its class's choice for a missing key, else `default`."""
        keys = self.spellings(setting)
        return default if any(key in config for key in keys) else self.model_type.absent.get(keys[0], default)


def kinds() -> Iterator[Kind]:
    for family in FAMILIES:
        for model_type in family.model_types:
            yield Kind(family, model_type)


def kind_of(config: Mapping[str, Any], where: str) -> Kind:
    """The family of a config.json; `where` names the file. UserError if it is not supported."""
    named = config.get("model_type")
    found = [kind for kind in kinds() if kind.model_type.name == named]
    if len(found) > 1:
        listed = config.get("architectures")
        classes = listed if isinstance(listed, list) else []
        found = [kind for kind in found if kind.model_type.architecture in classes]
    if reason := what_is_unsupported(config):
        raise UserError(f"{where}: model_type {named!r} is not supported: {reason}; {_instead()}")
    if len(found) != 1:
        raise UserError(f"{where}: model_type {named!r} is not supported; {_instead()}")
    return found[0]


def _instead() -> str:
    return f"give one of {', '.join(dict.fromkeys(kind.model_type.name for kind in kinds()))}"


def export_formats() -> list[str]:
    """The formats of `export_hf`."""
    return [family.export_format for family in FAMILIES if family.export_format]


def family_of_format(export_format: str) -> Family | None:
    """The family whose models a format of `export_hf` writes; None for a format that is no family's."""
    return next((family for family in FAMILIES if family.export_format == export_format), None)


def autoregressive_formats() -> dict[str, Family]:
    """Formats of `export_hf` that are read by classes of transformers -> their family."""
    return {family.export_format: family for family in FAMILIES if family.export_format and not family.diffusion}


def autoregressive_types() -> tuple[str, ...]:
    """Names of the model types that transformers has classes for, which predict the next token."""
    return tuple(kind.model_type.name for kind in kinds() if not kind.family.diffusion)


def diffusion_types() -> tuple[str, ...]:
    """Names of the model types of diffusion models."""
    return tuple(dict.fromkeys(kind.model_type.name for kind in kinds() if kind.family.diffusion))


def published_names() -> list[str]:
    """The published models that can be named without a directory."""
    return [f"{family.owners[0]}/{name}" for family in FAMILIES for name in family.published]


def published_config(name: str) -> dict[str, Any] | None:
    """config.json of a published model by its name on the hub, with or without owner; None if it is not known."""
    owner, _, rest = name.rpartition("/")
    plain = _VARIANT.sub("", _VARIANT.sub("", rest))
    for family in FAMILIES:
        if plain in family.published and owner in ("", *family.owners):
            return dict(family.published[plain])
    return None


def with_layers(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json of as many layers."""
    kind = kind_of(config, "the configuration")
    lists = {key: [value] * num_layers for key, value in kind.family.per_layer.items() if key in config}
    return {**config, **lists, kind.spellings("num_hidden_layers")[0]: num_layers}


def nearest_published(name: str) -> str:
    """ " (did you mean ...)", or nothing."""
    return nearest(name, published_names())
