"""The README.md of an export: what it is, where it comes from, how to load it."""

from __future__ import annotations

import re
from typing import Any

from megatron_a2d.console import human
from megatron_a2d.conversion.hf_config import Exported, Format


def model_card(kind: Format, model: Exported, iteration: int, common: dict[str, Any], settings: dict[str, Any]) -> str:
    """`common` is the checkpoint's common.pt, `settings` its run.json; what they lack is left out."""
    architecture = model.architecture
    base = _base_model(model)
    shape = "mixture of experts" if architecture.is_moe else "dense"
    facts = [
        f"Format: `{kind}`, {shape}, {human(architecture.num_parameters())} parameters "
        f"({human(architecture.num_active_parameters())} active), {model.dtype}.",
        f"Base model: {base}." if base else "Base model: not recorded.",
        f"Training: {_training(iteration, common.get('consumed_samples'), settings.get('seq_length'))}.",
    ]
    tags, loader, arguments, title = "", "AutoModelForCausalLM", "", "Language model"
    if kind != "qwen3":
        facts.append(f"Mask token id: {architecture.mask_token_id}.")
        tags, loader = "tags:\n- diffusion-language-model\n", "AutoModelForMaskedLM"
        arguments, title = ", trust_remote_code=True", "Masked diffusion language model"
    return (
        f"---\nlibrary_name: transformers\n{tags}{f'base_model: {base}' + chr(10) if base else ''}---\n\n"
        f"# {title}\n\n"
        "Written by megatron_a2d.\n\n" + "".join(f"- {fact}\n" for fact in facts) + "\n"
        f"```python\nfrom transformers import {loader}\n\n"
        f'model = {loader}.from_pretrained("DIRECTORY"{arguments})\n```\n\n'
        "Licence: the weights are under the terms of the base model's licence; the Python files in this "
        "directory, if any, are under Apache-2.0.\n"
    )


def _base_model(model: Exported) -> str | None:
    """The hub id that was converted. Paths of someone's disk do not belong into a card."""
    name = model.source.get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None


def _training(iteration: int, samples: int | None, length: int | None) -> str:
    if iteration == 0:
        return "none; these are the base model's weights"
    if samples is None or length is None:
        return f"{iteration} iterations"
    return f"{iteration} iterations, {samples} samples of {length} tokens ({samples * length} tokens seen)"
