"""The families that are supported, and lookups among them. A new family is one file and one entry of FAMILIES."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.families import diffullama, dream, llada, llada_moe, llama, own_formats, qwen2, qwen3
from megatron_a2d.families.family import Family, ModelType
from megatron_a2d.families.unsupported import what_is_unsupported
from megatron_a2d.utils.atomic_write import read_json
from megatron_a2d.utils.errors import UserError, nearest

FAMILIES: tuple[Family, ...] = (
    qwen3.QWEN3,
    qwen2.QWEN2,
    llama.LLAMA,
    diffullama.DIFFULLAMA,
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
    """The family and model type of a config.json."""

    family: Family
    model_type: ModelType

    def spellings(self, setting: str) -> tuple[str, ...]:
        """The keys of config.json that hold `setting`; the first is the usual one."""
        return self.family.keys.get(setting) or _SPELLINGS.get(setting) or (setting,)

    def absent(self, setting: str, default: Any, config: Mapping[str, Any]) -> Any:
        """The value of a setting that config.json lacks: the one that the model's class assumes, else `default`."""
        keys = self.spellings(setting)
        return default if any(key in config for key in keys) else self.model_type.absent.get(keys[0], default)


def kinds() -> Iterator[Kind]:
    for family in FAMILIES:
        for model_type in family.model_types:
            yield Kind(family, model_type)


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory; the objective is added if only the tokenizer distinguishes the model."""
    config = read_json(directory / "config.json", "the model's configuration")
    token = declared_mask_token(directory)
    for family in _twins(config) if token is not None and config.get("objective") is None else ():
        if family.diffusion and family.diffusion.mask_token == token:
            config["objective"] = family.diffusion.objective
    return config


def declared_mask_token(directory: Path) -> str | None:
    """The name of the mask token in the files next to a tokenizer; None without one."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists():
            token = read_json(directory / name, "the tokenizer's configuration").get("mask_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


def _twins(config: Mapping[str, Any]) -> list[Family]:
    """Families of diffusion models that share the model_type of this config.json with an autoregressive family."""
    sharing = {kind.family.title: kind.family for kind in kinds() if kind.model_type.name == config.get("model_type")}
    return [family for family in sharing.values() if family.diffusion and family.diffusion.mask_token]


def is_diffusion_family(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a family of diffusion models."""
    return any(kind.family.diffusion for kind in matching_kinds(config))


def twin_remedy(config: Mapping[str, Any]) -> str:
    """Remedy for a config.json that reads as an autoregressive model but may be a diffusion model's; '' for others."""
    return "".join(
        f'; if it is {family.title}, use its own tokenizer, or write "objective": "mdlm" into its config.json'
        for family in _twins(config)
    )


def matching_kinds(config: Mapping[str, Any]) -> list[Kind]:
    """Kinds with config.json's model_type; among several, those of its model class, then those of its objective."""
    found = [kind for kind in kinds() if kind.model_type.name == config.get("model_type")]
    if len({kind.model_type.architecture for kind in found}) > 1:
        listed = config.get("architectures")
        classes = listed if isinstance(listed, list) else []
        found = [kind for kind in found if kind.model_type.architecture in classes]
    if len({bool(kind.family.diffusion) for kind in found}) > 1:
        found = [kind for kind in found if bool(kind.family.diffusion) == (config.get("objective") == "mdlm")]
    return found


def kind_of(config: Mapping[str, Any], where: str) -> Kind:
    """The family of a config.json; `where` names the file. UserError if it is not supported."""
    named, found = config.get("model_type"), matching_kinds(config)
    if reason := what_is_unsupported(config):
        raise UserError(f"{where}: model_type {named!r} is not supported: {reason}; {_instead()}")
    classes = [kind.model_type.architecture for kind in kinds() if kind.model_type.name == named]
    if not found and classes:
        raise UserError(
            f"{where}: architectures is {config.get('architectures')!r}, but model_type {named!r} belongs to "
            f"{' or '.join(classes)}; correct the wrong one"
        )
    if len(found) != 1:
        raise UserError(f"{where}: model_type {named!r} is not supported; {_instead()}")
    return found[0]


def _instead() -> str:
    return f"give one of {', '.join(dict.fromkeys(kind.model_type.name for kind in kinds()))}"


def export_formats() -> list[str]:
    """The formats of `export_hf`."""
    return [family.export_format for family in FAMILIES if family.export_format]


def family_of_format(export_format: str) -> Family | None:
    """The family whose models a format of `export_hf` writes; None if the format belongs to no family."""
    return next((family for family in FAMILIES if family.export_format == export_format), None)


def autoregressive_formats() -> dict[str, Family]:
    """Formats of `export_hf` that are read by classes of transformers -> their family."""
    return {family.export_format: family for family in FAMILIES if family.export_format and not family.diffusion}


def autoregressive_types() -> tuple[str, ...]:
    """Names of the model types that transformers has classes for, which predict the next token."""
    return tuple(kind.model_type.name for kind in kinds() if not kind.family.diffusion)


def diffusion_types() -> tuple[str, ...]:
    """Names of the model types that only diffusion models have."""
    names = dict.fromkeys(kind.model_type.name for kind in kinds() if kind.family.diffusion)
    return tuple(name for name in names if name not in autoregressive_types())


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
    """`config` with another number of layers."""
    kind = kind_of(config, "the configuration")
    lists = {key: [value] * num_layers for key, value in kind.family.per_layer.items() if key in config}
    return {**config, **lists, kind.spellings("num_hidden_layers")[0]: num_layers}


def nearest_published(name: str) -> str:
    """ " (did you mean ...)", or nothing."""
    return nearest(name, published_names())
