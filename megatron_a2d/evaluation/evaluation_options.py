"""Flags of the evaluate command, and its --config files, which hold the same names; flags win."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.config.cli import Parser, add_settings, given_settings
from megatron_a2d.config.renamed import FLAGS, warn_of_key
from megatron_a2d.config.settings import flag
from megatron_a2d.inference.arguments import LAYOUT, LAYOUT_HELP, SAMPLING, add_sampling_flags
from megatron_a2d.utils.atomic_write import read_yaml
from megatron_a2d.utils.errors import UserError, nearest
from megatron_a2d.utils.printable import is_name


class Option(NamedTuple):
    """A flag, and a key of --config files."""

    kind: type  # of the value, or of each of a list's values
    default: Any
    help: str
    choices: tuple[str, ...] = ()


OPTIONS = {
    "objective": Option(
        str, None, "ar: as an autoregressive model, mdlm: as a diffusion model (default: what the model is)",
        ("mdlm", "ar"),
    ),
    "valid_data_path": Option(str, [], "held-out datasets, PREFIX or NAME=PREFIX ..."),
    "seq_length": Option(int, 1024, "held-out data: tokens per sample; that of training gives comparable losses"),
    "num_samples": Option(int, 512, "held-out data: samples per dataset"),
    "verify_tokenizer": Option(bool, True, "held-out data: reject data of a tokenizer other than the model's"),
    "micro_batch_size": Option(int, 8, "held-out data: samples per forward pass"),
    "tasks": Option(str, [], "tasks or groups of the harness, by name"),
    "include_path": Option(str, None, "directory with more task files; the code that they name is executed"),
    "data_dir": Option(str, None, "directory with the benchmarks' files (docs/evaluation.md), instead of the hub"),
    "num_fewshot": Option(int, None, "examples before each question (default: the task's own)"),
    "limit": Option(int, None, "questions per task; for quick tests only"),
    "likelihood": Option(
        str, "monte_carlo", "score of continuations: a Monte Carlo bound, or the pseudo-log-likelihood (PLL)",
        ("monte_carlo", "pseudo"),
    ),
    "mc_num": Option(int, 128, "maximum forward passes per log-likelihood; exact if they suffice"),
    "decision_error": Option(
        float, 0.005, "multiple choice: probability that the best choice is not that of all --mc-num passes; 0: run all"
    ),
    "batch_tokens": Option(int, 4096, "tokens per forward pass when scoring; raise it on a GPU"),
    "batch_size": Option(int, 16, "texts generated together"),
    "max_new_tokens": Option(int, 256, "tokens per answer, for tasks that set no length"),
    "seed": Option(int, 0, "seed of Monte Carlo masks and of sampling"),
    "allow_code_execution": Option(bool, False, "run programs that the model generates, in subprocesses with limits"),
    "allow_code_network": Option(bool, False, "run them even if their network access cannot be blocked"),
}  # fmt: skip
# Settings that allow code to run: accepted on the command line only, not from a file.
_CONSENT = {
    "include_path": "task files are programs",
    "allow_code_execution": "it runs programs that the model generates",
    "allow_code_network": "it gives generated programs network access",
}
_LEAST = {"seq_length": 2, "num_fewshot": 0, "limit": 1, "seed": 0} | dict.fromkeys(
    ("num_samples", "micro_batch_size", "mc_num", "batch_tokens", "batch_size", "max_new_tokens"), 1
)
NOISE = ("noise_schedule", "timestep_sampling", "min_timestep")
_HELD_OUT = (*NOISE, "reset_attention_mask")


class Arguments(NamedTuple):
    """The parsed arguments of the command."""

    models: dict[str, str]  # name -> directory
    options: argparse.Namespace
    given: frozenset[str]  # options given as flags, not by a file
    layout: dict[str, Any]
    noise: dict[str, Any]


def parse_arguments(argv: list[str] | None) -> Arguments:
    """Parse the command line and its --config file; UserError with all problems."""
    given = _parser().parse_args(argv)
    problems: list[str] = []
    layout = given_settings(given, LAYOUT, problems)
    noise = given_settings(given, _HELD_OUT, problems)
    recipe = read_config(given.config, problems) if given.config else {}
    if problems:
        raise UserError(problems)
    values = {name: option.default for name, option in OPTIONS.items()} | recipe
    options = argparse.Namespace(**{**values, **vars(given)})
    models = _named_models(given.model, problems)
    _check(options, noise, problems)
    if problems:
        raise UserError(problems)
    return Arguments(models, options, frozenset(vars(given)), layout, noise)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m megatron_a2d.evaluate",
        description="Evaluate models: held-out NELBO and tasks of the lm-evaluation-harness.",
    )
    parser.add_argument(
        "--model", nargs="+", default=[], metavar="[NAME=]DIR",
        help="exports, checkpoints, or model directories from the hub; several are evaluated one after another, each "
        "into its own directory NAME in --out",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the results")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of the settings below, such as launch/eval/mmlu.yaml"
    )
    parser.add_argument(
        "--compare-with", nargs="+", default=[], metavar="DIR",
        help="earlier results to add to the table; without --model, a table of these alone",
    )  # fmt: skip
    group = parser.add_argument_group("evaluation")
    for name, option in OPTIONS.items():
        kind: dict[str, Any] = {"type": option.kind}
        if option.kind is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif option.choices:
            kind["choices"] = option.choices
        else:
            kind["metavar"] = option.kind.__name__.upper()
        if option.default == []:
            kind["nargs"] = "+"
        shown = "" if option.default in (None, []) else f" (default: {option.default})"
        group.add_argument(flag(name), help=option.help + shown, default=argparse.SUPPRESS, **kind)
    add_sampling_flags(parser.add_argument_group("sampling"), temperature=0.0)
    add_settings(parser, (*_HELD_OUT, *LAYOUT), LAYOUT_HELP)
    return parser


def _named_models(words: list[str], problems: list[str]) -> dict[str, str]:
    """`DIR` or `NAME=DIR` -> directory by name; the default name is the last part of the directory."""
    models: dict[str, str] = {}
    for word in words:
        name, equals, directory = word.partition("=")
        if not equals or Path(word).is_dir():
            name, directory = Path(word).resolve().name, word
        if not is_name(name):
            problems.append(f"--model {word}: {name!r} is not a valid name; give NAME={directory}")
        elif name in models:
            problems.append(f"--model {word}: two models have the name {name!r}; give NAME={directory}")
        models[name] = directory
    return models


def _check(options: argparse.Namespace, noise: dict[str, Any], problems: list[str]) -> None:
    has_work = bool(options.valid_data_path or options.tasks)
    if not options.model and not options.compare_with:
        problems.append("--model: nothing to evaluate; give a model, or earlier results to --compare-with")
    elif options.model and not has_work:
        problems.append("--valid-data-path, --tasks: nothing to evaluate; give at least one of them")
    elif not options.model and has_work:
        problems.append("--model: is missing; without one, --compare-with only makes a table of earlier results")
    for name, least in _LEAST.items():
        if (value := getattr(options, name)) is not None and value < least:
            problems.append(f"{flag(name)} {value}: must be at least {least}")
    if not 0 <= options.decision_error < 0.5:
        problems.append(f"--decision-error {options.decision_error}: must be a probability below 0.5, or 0")
    if options.seed >= 1 << 64:
        problems.append(f"--seed {options.seed}: must be below 2^64")
    if not 0 < noise.get("min_timestep", 0.5) < 1:
        problems.append(f"--min-timestep {noise['min_timestep']}: must lie between 0 and 1; 0.001 is usual")
    if options.objective == "ar":
        problems += [
            f"{flag(name)} {noise[name]}: has no effect with --objective ar; remove it"
            for name in NOISE
            if name in noise
        ]
    for name, what in (("include_path", "task files"), ("data_dir", "benchmark files")):
        directory = getattr(options, name)
        if directory is not None and not Path(directory).is_dir():
            problems.append(f"{flag(name)} {directory}: there is no such directory; name the one with the {what}")


def read_config(path: str, problems: list[str]) -> dict[str, Any]:
    """The settings of a --config file; adds to `problems`."""
    from megatron_a2d.diffusion.sampling_options import SamplingOptions

    content = read_yaml(path, f"--config {path}")
    values = {}
    known = [*OPTIONS, *SAMPLING]
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known and (new := FLAGS.get(flag(name), "")[2:].replace("-", "_")) in known:
            warn_of_key(f"--config {path}", (name, value), (new, value))
            name = new
        if name not in known:
            problems.append(f"--config {path}: unknown setting {key}{nearest(name, known)}")
            continue
        if name in _CONSENT and value:
            # A relative directory is relative to the file.
            given = f" {Path(path).parent / value}" if name == "include_path" and isinstance(value, str) else ""
            problems.append(
                f"--config {path}: {name}: {_CONSENT[name]}; if you trust it, give {flag(name)}{given} on the "
                "command line"
            )
            continue
        option = OPTIONS.get(name)
        if option and option.default == [] and not isinstance(value, list):
            value = [value]
        wrong = option and any(
            type(item) is not option.kind and not (option.kind is float and type(item) is int)
            for item in (value if isinstance(value, list) else [value])
        )
        if wrong or (option and option.choices and value not in option.choices):
            assert option
            expected = " or ".join(option.choices) or option.kind.__name__
            problems.append(f"--config {path}: {name} is {value!r}; it must be {expected}")
        if option is None:
            kind = type(getattr(SamplingOptions, name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                problems.append(f"--config {path}: {name} is {value!r}; it must be {kind.__name__}")
        values[name] = value
    return values
