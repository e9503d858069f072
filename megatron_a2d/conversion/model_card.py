"""The model card (README.md) of an export: base model, training, recipe and usage.

Everything is read from the checkpoint: the base model from hf/config.json, the settings from run.json, the length of
training from common.pt. What is missing or malformed is reported as not recorded: the card may be published by someone
who did not write the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from megatron_a2d.config.renamed import recorded_settings
from megatron_a2d.config.settings import ROLES
from megatron_a2d.conversion.hf_config import Exported, Format, is_autoregressive, objective_mismatch
from megatron_a2d.conversion.public_form import is_public_form
from megatron_a2d.families.family import Family
from megatron_a2d.families.registry import family_of_format
from megatron_a2d.terminal.console import human
from megatron_a2d.utils.printable import one_line

# The settings of a recipe, in the order of the card.
RECIPE = (
    "objective", "loss_weighting", "conversion", "noise_schedule", "timestep_sampling", "min_timestep", "label_shift",
    "block_length", "block_length_schedule", "reset_block_grid", "ar_loss_weight", "complementary_masks",
    "reset_attention_mask", "reset_position_ids", "seq_length",
    "global_batch_size", "rampup_batch_size", "batch_schedule", "lr", "min_lr", "lr_warmup_iters", "lr_warmup_samples",
    "lr_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "weight_decay",
    "optimizer", "muon_momentum", "muon_use_nesterov", "muon_num_ns_steps", "muon_scale_mode",
    "muon_extra_scale_factor", "muon_router", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "bf16", "seed",
)  # fmt: skip


_SHOWN_IF_SET = (
    "block_length", "block_length_schedule", "reset_block_grid", "ar_loss_weight", "complementary_masks",
    "reset_position_ids", "rampup_batch_size", "batch_schedule", "lr_warmup_samples", "lr_wsd_decay_samples",
)  # fmt: skip
_SCHEDULES = ("batch_schedule", "block_length_schedule")
SGLANG_CONFIG = "sglang_dllm.yaml"


class Origin(NamedTuple):
    """The origin of an export's weights: an iteration of a run, and the run's settings ({} for a release)."""

    iteration: int
    consumed_samples: int | None
    settings: Mapping[str, Any]
    averaged: Sequence[int] = ()  # iterations that were averaged

    @property
    def num_tokens(self) -> int | None:
        """Tokens seen in training; None when that is not recorded."""
        length = recorded_settings(self.settings)[0].get("seq_length")
        return None if not _is_count(self.consumed_samples) or length is None else self.consumed_samples * length


def model_card(kind: Format, model: Exported, origin: Origin, evaluation: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown. `evaluation`: results by name, arbitrarily nested; its numbers are shown in a table."""
    trained = origin.iteration > 0
    settings, wrong = recorded_settings(origin.settings)
    sections = [
        _front_matter(kind, model),
        "# Masked diffusion language model" if not is_autoregressive(kind) else "# Language model",
        "Written by megatron_a2d.",
        "\n".join(f"- {fact}" for fact in _facts(kind, model, origin)),
        _usage(kind),
        *(["## Serving", _serving(model)] if kind == "sdar" else []),
        *(["## Data", _data(origin.settings)] if trained else []),
        *(["## Recipe", _recipe(settings, wrong)] if trained and origin.settings else []),
        *(["## Learning rates by role", _learning_rates(settings)] if trained and origin.settings else []),
        *(["## Evaluation", _table(("measure", "value"), _numbers(evaluation))] if evaluation else []),
        "## Licence",
        f"The weights are under the terms of the base model's licence{_named(license_of(model))}; the Python files in "
        "this directory, if any, are under Apache-2.0.",
    ]
    return "\n\n".join(sections) + "\n"


def license_of(model: Exported) -> str | None:
    """The licence from the base model's card, as the hub spells it; None if not recorded."""
    name = model.source.get("_license")
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) else None


def _named(name: str | None) -> str:
    return f" (`{name}`)" if name else ""


def _front_matter(kind: Format, model: Exported) -> str:
    lines = ["library_name: transformers"]
    lines += ["pipeline_tag: text-generation"]
    lines += ["tags:", "- diffusion-language-model"] if not is_autoregressive(kind) else []
    lines += [f"base_model: {base}"] if (base := _base_model(model)) else []
    lines += [f"license: {name}"] if (name := license_of(model)) else []
    return "\n".join(["---", *lines, "---"])


def _facts(kind: Format, model: Exported, origin: Origin) -> Iterator[str]:
    a = model.model_config
    shape = "mixture of experts" if a.is_moe else "dense"
    yield (
        f"Format: `{kind}`, {shape}, {human(a.num_parameters())} parameters "
        f"({human(a.num_active_parameters())} active), {model.dtype}."
    )
    yield f"Base model: {_base_model(model) or 'not recorded'}."
    yield f"Training: {_training(origin)}."
    if origin.averaged and all(map(_is_count, origin.averaged)):
        yield f"Weights: mean of the iterations {', '.join(map(str, origin.averaged))}."
    if mismatch := objective_mismatch(kind, model):
        yield f"**Not what it was trained for**: {mismatch}. Its quality in that use is unknown."
    if not is_autoregressive(kind) and model.trained.block_length:
        yield f"Block diffusion: blocks of {model.trained.block_length} tokens, from left to right."
    if not is_autoregressive(kind):
        shift = "position i - 1 predicts token i" if model.trained.label_shift else "position i predicts token i"
        yield f"Mask token id: {a.mask_token_id}; {shift}."


def _usage(kind: Format) -> str:
    family = family_of_format(kind)
    if family is not None and is_public_form(family):
        return _public_usage(family)
    if is_autoregressive(kind):
        loader, arguments, use, plain = "AutoModelForCausalLM", "", "", ""
    else:
        loader = "AutoModelForCausalLM" if kind == "sdar" else "AutoModelForMaskedLM"
        arguments = ", trust_remote_code=True"
        plain = ", trust_remote_code=False"  # the tokenizer has no code; transformers 5 would ask to run the model's
        use = (
            'prompt = tokenizer("def mean(values):", return_tensors="pt")\n'
            "tokens = model.generate(**prompt, max_new_tokens=64, num_steps=64)\n"
            "print(tokenizer.decode(tokens[0]))\n"
        )
    return (
        f"```python\nfrom transformers import AutoTokenizer, {loader}\n\n"
        f'model = {loader}.from_pretrained("DIRECTORY"{arguments})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY"{plain})\n{use}```'
    )


def _public_usage(family: Family) -> str:
    """Of a family's own form, whose modelling code is not part of the export."""
    ours = "`python -m megatron_a2d.generate --model DIRECTORY` runs it without any."
    if family.code is None:
        return (
            f"Loads as transformers' own class, which attends causally: {family.title}'s code replaces its mask. {ours}"
        )
    return (
        f"The modelling code is {family.title}'s own, which `auto_map` in config.json names on the hub "
        f"({family.code.repository}); transformers fetches it. {ours}\n\n"
        "```python\nfrom transformers import AutoModel\n\n"
        'model = AutoModel.from_pretrained("DIRECTORY", trust_remote_code=True)\n```'
    )


def _serving(model: Exported) -> str:
    """How each engine is told the block length, which none reads from config.json."""
    length = model.trained.block_length
    wide = "; export with --dtype bf16, because LMDeploy runs these weights in float16" if "32" in model.dtype else ""
    commands = [
        f"lmdeploy serve api_server DIRECTORY --backend pytorch --trust-remote-code --dllm-block-length {length}",
        "python -m sglang.launch_server --model-path DIRECTORY --trust-remote-code \\",
        f"    --dllm-algorithm LowConfidence --dllm-algorithm-config DIRECTORY/{SGLANG_CONFIG}",
    ]
    text = (
        f"The model was trained in blocks of {length} tokens. Engines do not read that from config.json (their default "
        f"is 4), so set it{wide}:\n\n```bash\n" + "\n".join(commands) + "\n```"
    )
    if not (model.trained.reset_block_grid and model.trained.reset_position_ids):
        text += (
            "\n\nEngines count blocks and positions from the beginning of a request. In training they were counted "
            "through samples of several documents (no `--reset-block-grid --reset-position-ids`)."
        )
    return text


def sglang_config(model: Exported) -> str:
    """The file of SGLang's --dllm-algorithm-config."""
    return f"block_size: {model.trained.block_length}\n"


def _training(origin: Origin) -> str:
    if origin.iteration == 0:
        return "none; these are the base model's weights"
    if origin.num_tokens is None:
        return f"{origin.iteration} iterations"
    return (
        f"{origin.iteration} iterations, {origin.consumed_samples} samples of {origin.settings['seq_length']} tokens "
        f"({origin.num_tokens} tokens seen)"
    )


def _data(settings: Mapping[str, Any]) -> str:
    """The training mixture: names of data sets and their weights, without the local paths."""
    given = settings.get("train_data_path")
    words = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    names = [PurePath(str(word)).name for word in words]
    if not words or not all(re.fullmatch(r"[\w.+-]{1,100}", name) for name in names):
        return "Not recorded."
    rows, weight = [], ""
    for name in names:
        if re.fullmatch(r"[\d.eE+-]+", name):
            weight = name
        else:
            rows.append((name, weight or "all"))
            weight = ""
    return _table(("data set", "weight"), rows)


def recipe_rows(settings: Mapping[str, Any], wrong: Sequence[str]) -> list[tuple[str, str]]:
    """(setting, value) of the recipe; `settings` are the valid ones, `wrong` the names of the malformed ones."""
    # The free text of a recipe.
    wrong = [*wrong, *(name for name in _SCHEDULES if not re.fullmatch(r"[\d:, ]*", str(settings.get(name, ""))))]
    unset = [name for name in _SHOWN_IF_SET if not settings.get(name)]
    if settings.get("optimizer") != "muon":
        unset += [name for name in RECIPE if name == "optimizer" or name.startswith("muon_")]
    shown = {name: str(value) for name, value in settings.items() if name not in unset} | dict.fromkeys(
        wrong, "not recorded"
    )
    return [(name, shown[name]) for name in RECIPE if name in shown]


def _recipe(settings: Mapping[str, Any], wrong: Sequence[str]) -> str:
    return _table(("setting", "value"), recipe_rows(settings, wrong))


def _learning_rates(settings: Mapping[str, Any]) -> str:
    if "lr" not in settings:
        return "Not recorded."
    factors = settings.get("lr_mult") or {}
    rows = [(role, f"{factors.get(role, 1.0):g}", f"{settings['lr'] * factors.get(role, 1.0):.3g}") for role in ROLES]
    return _table(("role", "factor", "peak learning rate"), rows)


def _numbers(results: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in results.items():
        if isinstance(value, Mapping):
            rows += _numbers(value, f"{prefix}{name} / ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((f"{prefix}{name}", f"{value:.4g}"))
    return rows


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """`text` as a table cell, with Markdown escaped: names in a results.json may hold anything."""
    return re.sub(r"([\\|<>\[\]`])", r"\\\1", one_line(text))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _base_model(model: Exported) -> str | None:
    """The hub id of the converted model; None if not recorded."""
    name = model.source.get("_name_or_path")
    return name if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) else None
