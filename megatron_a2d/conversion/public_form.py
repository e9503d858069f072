"""config.json of exports in the form that a family of diffusion models is published in (`dream`, `llada`, ...).

A model that was converted from this form is exported with all of its original keys; any other model with those of the
family's published model, and its own sizes. The modelling code is the family's own: `auto_map` refers to it on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_a2d.checkpoint.training_facts import Trained
from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.families.family import Diffusion, Family, PublicCode
from megatron_a2d.families.registry import kind_of
from megatron_a2d.utils.atomic_write import read_json, write_json


def is_public_form(family: Family) -> bool:
    """Whether a family's format is that of published diffusion models, with code that is not this project's."""
    return family.diffusion is not None and bool(family.published)


def refusals(family: Family, a: ModelConfig, trained: Trained) -> list[str]:
    """Why a model cannot be exported in a family's form; its layers are compared elsewhere."""
    assert family.diffusion is not None
    shift = "with" if family.diffusion.label_shift else "without"
    reasons = {
        f"it was trained in blocks of {trained.block_length} (--objective block), and {family.title} has none": (
            trained.objective == "block"
        ),
        f"its label shift is {str(trained.label_shift).lower()}, and {family.title} is trained {shift} it": (
            trained.is_diffusion and trained.label_shift != family.diffusion.label_shift
        ),
        f"its heads have {a.head_dim} channels, and {family.title}'s the hidden size over the number of heads": (
            family.heads_fill_hidden and a.head_dim * a.num_attention_heads != a.hidden_size
        ),
        f"its rotary embedding is scaled (YaRN or llama3), and {family.title}'s cannot be": (
            a.rope_scaling is not None and "rope_scaling" in family.fixed
        ),
        f"its chosen experts are{'' if a.norm_topk_prob else ' not'} renormalised, unlike {family.title}'s": (
            a.is_moe and family.norm_topk_prob not in (None, a.norm_topk_prob)
        ),
    }
    return [why for why, holds in reasons.items() if holds]


def came_in_form(source: Mapping[str, Any], family: Family) -> bool:
    """Whether a checkpoint was converted from a model in the family's form, by the config.json that it kept."""
    return kind_of(source, "the checkpoint's hf/config.json").family is family


def public_config(
    family: Family, source: Mapping[str, Any], shape: Mapping[str, Any], trained: Trained, more: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json in the family's form.

    `shape`: the sizes and settings of the model by Hugging Face's names. `more`: keys of every form, such as the dtype
    and special tokens; of special tokens those of a model that came in this form stay as they are.
    """
    assert family.diffusion is not None
    if came_in_form(source, family):
        config = {key: value for key, value in source.items() if not key.startswith("_")}
        config |= {key: value for key, value in more.items() if not key.endswith("_token_id") or key == "mask_token_id"}
        if "dtype" in config:  # the other spelling, which must agree
            config["dtype"] = config["torch_dtype"]
    else:
        config = dict(next(iter(family.published.values())))
        lists = {key: [value] * shape["num_hidden_layers"] for key, value in family.per_layer.items() if key in config}
        sizes = {key: value for name, value in shape.items() for key in family.keys.get(name, (name,))}
        config |= {**sizes, **lists, **more}
    if family.code is not None:
        config["auto_map"] = {
            name: f"{family.code.repository}--{where}" for name, where in family.code.auto_map.items()
        }
    else:
        config.pop("auto_map", None)
    return config | facts(trained, family.diffusion)


def facts(trained: Trained, diffusion: Diffusion) -> dict[str, Any]:
    """The training settings (checkpoint/training_facts.py) that the form does not imply."""
    implied = Trained(objective=diffusion.objective, label_shift=diffusion.label_shift).as_exported()
    kept = {"objective"} if diffusion.mask_token is not None else set()  # which the tokenizer alone says otherwise
    return {name: value for name, value in trained.as_exported().items() if name in kept or value != implied[name]}


def refer_to_tokenizer_code(directory: Path, code: PublicCode) -> None:
    """Make the tokenizer's `auto_map`, if it has one, refer to the hub: its Python files are not part of an export."""
    path = directory / "tokenizer_config.json"
    settings = read_json(path, "the tokenizer's configuration") if path.exists() else {}
    classes = settings.get("auto_map")
    if isinstance(classes, dict):
        settings["auto_map"] = {name: _on_hub(where, code.repository) for name, where in classes.items()}
        write_json(path, settings)


def leave_out_tokenizer_code(directory: Path) -> None:
    """Make transformers read tokenizer.json with one of its own classes: Python files that the tokenizer's `auto_map`
    names are not part of an export."""
    path = directory / "tokenizer_config.json"
    settings = read_json(path, "the tokenizer's configuration") if path.exists() else {}
    if "auto_map" in settings and (directory / "tokenizer.json").exists():
        del settings["auto_map"]
        write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _on_hub(where: Any, repository: str) -> Any:
    """A class of `auto_map`, or the pair of a slow and a fast tokenizer's, with its repository."""
    if isinstance(where, list):
        return [_on_hub(item, repository) for item in where]
    return f"{repository}--{where}" if isinstance(where, str) and "--" not in where else where
