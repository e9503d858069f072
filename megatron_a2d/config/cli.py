"""Command line and recipes: defaults < --config recipe.yaml (several: the later one) < flags.

A recipe is a flat YAML mapping of the same names, with underscores or dashes. Unknown names are errors that
suggest the nearest known one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import yaml

from megatron_a2d.config.renamed import modernise, modernise_flags, warn_of_key
from megatron_a2d.config.settings import ALTERNATIVES, RunConfig, Setting, build, flag, settings
from megatron_a2d.utils.atomic_write import read_yaml
from megatron_a2d.utils.errors import UserError, nearest

LARGEST = 2**64 - 1  # largest integer of a flag or a setting: above the tokens, bytes and steps of any run
LISTED = 35  # flags that a usage line lists; that of all settings would fill three screens before the help begins
PATHS = {"DIR", "DIRECTORY", "FILE", "PREFIX", "RECIPE"}  # metavars of flags whose value is a path


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts that end with the default, unless the flag has none or the text gives it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", []) or action.default is False or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError for invalid arguments, and accepts no abbreviated flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def format_help(self) -> str:
        """The help; its usage line names only the required flags, and --config, where there are many."""
        if self.usage is None and len(self._actions) > LISTED:
            required = [action for action in self._actions if action.required]
            words = [" ".join([*action.option_strings[:1], str(action.metavar)]) for action in required]
            if config := self._option_string_actions.get("--config"):
                words.append(f"[--config {config.metavar}{' ...' if config.nargs == '+' else ''}]")
            self.usage = " ".join(["%(prog)s", *words, "[options]"])
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # Path("") is the current directory, which nobody means who gives an unset variable of the shell.
        if not arg_string and (action.type is Path or PATHS.intersection(re.findall("[A-Z]+", str(action.metavar)))):
            name = action.option_strings[0] if action.option_strings else action.dest
            raise UserError(f"{name} '': is empty; give a path")
        return super()._get_value(action, arg_string)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        words = modernise_flags(words, known)
        # Checked before argparse does: a mistyped flag is a better message than the required one that is then missing.
        flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        unknown = [] if self._subparsers else [word for word in flags if word not in known]
        if not unknown:
            result, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise UserError(f"{word}: unknown argument{nearest(word, known)}; see --help" for word in unknown)
        if problems := _impossible_values(result):
            raise UserError(problems)
        return result


def _impossible_values(options: argparse.Namespace) -> list[str]:
    """Problems of values that no flag can have, because arithmetic or the operating system cannot handle them."""
    problems = []
    for name, given in vars(options).items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str | Path) and "\0" in str(value):
                problems.append(f"{flag(name)} {value}: holds a NUL character, which no name or path can; correct it")
            elif isinstance(value, int | float) and (reason := _unusable(value)):
                problems.append(f"{flag(name)} {value}: {reason}; correct it")
    return problems


def add_settings(
    parser: argparse.ArgumentParser, names: Iterable[str] | None = None, helps: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Add a flag for every setting, or for those of `names`. Flags have no defaults, so that a recipe can set them.

    `helps`: help texts by name, for a command to which a setting means something else than to training.
    """
    groups: dict[str, Any] = {}
    for item in settings().values() if names is None else (settings()[name] for name in names):
        group = groups.setdefault(item.group, parser.add_argument_group(item.group))
        shown = "" if item.default in (None, "", {}, ()) else f" (default: {_as_text(item.default)})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": helps.get(item.name, item.help) + shown}
        if item.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif item.kind is dict:
            options.update(nargs="+", metavar="ROLE=FACTOR")
        elif item.kind is list:
            count: Any = len(item.metavar) if isinstance(item.metavar, tuple) else "*"
            options.update(nargs=count, metavar=item.metavar)
        else:
            options["metavar"] = "|".join(item.kind) if isinstance(item.kind, tuple) else item.kind.__name__.upper()
        group.add_argument(flag(item.name), **options)


def parse_run(
    parser: Parser,
    argv: list[str] | None,
    inherit: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {},
) -> tuple[RunConfig, argparse.Namespace]:
    """Read a run's configuration; with --print-config print it and exit. Reports all problems together.

    `inherit` gives defaults that depend on the given settings: those of the checkpoint that a run starts from.
    """
    parser.add_argument(
        "--config",
        nargs="+",
        default=[],
        metavar="RECIPE",
        help="YAML files of settings; later files override earlier ones, flags override files",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and exit")
    add_settings(parser)
    options = parser.parse_args(argv)
    problems: list[str] = []
    values: dict[str, Any] = {}
    for recipe in options.config:
        _override(values, _read_recipe(recipe, problems))
    _override(values, given_settings(options, settings(), problems))
    if problems:
        raise UserError(problems)
    config = build(inherit(values) | values)
    if options.print_config:
        yaml.safe_dump(config.to_dict(), sys.stdout, sort_keys=False)
        sys.exit(0)
    return config, options


def _override(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Add `given`; where it sets one of several alternatives, the earlier source's others are dropped."""
    for names in ALTERNATIVES:
        if any(given.get(name) for name in names):
            for name in names:
                values.pop(name, None)
    values.update(given)


def given_settings(options: argparse.Namespace, names: Iterable[str], problems: list[str]) -> dict[str, Any]:
    """The settings of `names` that were given as flags; invalid ones are added to `problems`."""
    values: dict[str, Any] = {}
    for name in names:
        if hasattr(options, name):
            _set(values, settings()[name], getattr(options, name), flag(name), problems)
    return values


def _read_recipe(path: str, problems: list[str]) -> dict[str, Any]:
    content = read_yaml(path, f"--config {path}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        given = key.replace("-", "_"), value
        name, value = modernise(*given)
        if name not in settings():
            problems.append(f"--config {path}: unknown setting {key}{nearest(name, settings())}")
            continue
        if (name, value) != given:
            warn_of_key(f"--config {path}", given, (name, value))
        if name in values:
            problems.append(f"--config {path}: {name} is given twice, once as {given[0]}; keep one")
        _set(values, settings()[name], value, f"--config {path}: {given[0]}", problems)
    return values


def _set(values: dict[str, Any], item: Setting, given: Any, where: str, problems: list[str]) -> None:
    try:
        values[item.name] = _convert(item, given)
    except ValueError as error:
        problems.append(f"{where} {_as_text(given) or repr('')}: {error}")


def _convert(item: Setting, given: Any) -> Any:
    if given is None:
        if item.optional:
            return None
        raise ValueError("is empty; give it a value, or leave it out")
    if isinstance(item.kind, tuple):
        if given not in item.kind:
            raise ValueError(f"must be one of {', '.join(item.kind)}{nearest(str(given), item.kind)}")
        return given
    if item.kind is bool:
        if not isinstance(given, bool):
            raise ValueError("must be true or false")
        return given
    if item.kind is dict:
        return _convert_factors(given)
    if item.kind is list:
        return _convert_list(item, given)
    if item.kind is str:
        if given == "" and item.optional:
            unset = f"a line `{item.name}:` in a further --config unsets a recipe's"
            raise ValueError(f"is empty; give it a value, or leave it out ({unset})")
        return item.read(_convert_text(given)) if item.read else _convert_text(given)
    return _convert_number(item.kind, given)


def _convert_text(given: Any) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise ValueError("must be a string; quote it")
    if "\0" in str(given):
        raise ValueError("holds a NUL character, which no name or path can")
    return str(given)


def _convert_number(kind: type, given: Any) -> int | float:
    try:
        if isinstance(given, bool):
            raise ValueError
        number: int | float = float(given) if kind is float else int(str(given).replace("_", ""))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be a {'number' if kind is float else 'whole number'}") from None
    if reason := _unusable(number):
        raise ValueError(reason)
    return number


def _unusable(number: int | float) -> str:
    """Why no setting can have the value `number`, or ''."""
    if isinstance(number, int):
        return "" if abs(number) <= LARGEST else "must be below 2**64"
    return "" if math.isfinite(number) else "must be a finite number"


def _convert_factors(given: Any) -> dict[str, float]:
    if isinstance(given, dict):
        pairs: Any = given.items()
    elif isinstance(given, list):
        pairs = [str(word).partition("=")[::2] for word in given]
    else:
        pairs = [(None, None)]
    factors = {}
    for role, factor in pairs:
        try:
            factors[str(role)] = float(_convert_number(float, factor))
        except ValueError:
            raise ValueError("must be written as role=factor, for example attention=1 mlp=0.1") from None
    return factors


def _convert_list(item: Setting, given: Any) -> tuple[Any, ...]:
    shown = item.metavar if isinstance(item.metavar, str) else " ".join(item.metavar)
    if not isinstance(given, list | tuple):
        raise ValueError(f"must be a list of {', '.join(item.choices) or shown}")
    if isinstance(item.metavar, tuple) and len(given) not in (0, len(item.metavar)):
        raise ValueError(f"must be a list of {len(item.metavar)} numbers, {shown}")
    if item.element is int:
        return tuple(_convert_number(int, value) for value in given)
    if item.read:
        return tuple(item.read(_convert_text(value)) for value in given)
    for name in given:
        if not isinstance(name, str) or name not in item.choices:
            raise ValueError(f"{name!r} is none of {', '.join(item.choices)}{nearest(str(name), item.choices)}")
    return tuple(given)


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
