"""Command for evaluation: NELBO on held-out data, and tasks of the lm-evaluation-harness.

    python -m megatron_a2d.evaluate --model EXPORT --valid-data-path code=data/code_valid web=data/web_valid --out EVAL
    python -m megatron_a2d.evaluate --model EXPORT --config launch/eval/mmlu.yaml --out EVAL
    python -m megatron_a2d.evaluate --model QWEN3 --objective ar --config launch/eval/mmlu.yaml --out EVAL_BEFORE
    torchrun --nproc-per-node 8 -m megatron_a2d.evaluate --model CHECKPOINT --expert-model-parallel-size 8 ...

Writes EVAL/results.json with the resolved settings, EVAL/results.md, and EVAL/answers.jsonl while running: the same
command resumes after an interruption. `--compare-with EVAL_BEFORE` adds earlier results to the table. Files of
--config hold the same names as the flags; flags win.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_a2d.config.cli import Parser, add_settings, given_settings
from megatron_a2d.config.renamed import FLAGS, warn_of_key
from megatron_a2d.config.settings import build, flag
from megatron_a2d.evaluation.code_execution import allow_programs
from megatron_a2d.evaluation.score_table import read_results
from megatron_a2d.inference.arguments import (
    LAYOUT,
    SAMPLING,
    add_sampling_flags,
    check_model,
    close_model,
    load_model,
    sampling_options,
)
from megatron_a2d.terminal.console import entry_point, hide_noise, progress
from megatron_a2d.utils.atomic_write import make_parent, new_file, read_yaml, write_json
from megatron_a2d.utils.errors import UserError, nearest
from megatron_a2d.utils.printable import print_line, print_text

if TYPE_CHECKING:
    from megatron_a2d.evaluation.response_cache import ResponseCache
    from megatron_a2d.inference.loaded_model import LoadedModel


class Option(NamedTuple):
    """A flag, and a key of --config files."""

    kind: type  # of the value, or of each of a list's values
    default: Any
    help: str
    choices: tuple[str, ...] = ()


OPTIONS = {
    "objective": Option(str, "mdlm", "ar: an autoregressive model, for a baseline before conversion", ("mdlm", "ar")),
    "valid_data_path": Option(str, [], "held-out datasets, PREFIX or NAME=PREFIX ..."),
    "seq_length": Option(int, 1024, "held-out data: tokens per sample; that of training gives comparable losses"),
    "num_samples": Option(int, 512, "held-out data: samples per dataset"),
    "verify_tokenizer": Option(bool, True, "held-out data: reject data of a tokenizer other than the model's"),
    "micro_batch_size": Option(int, 8, "held-out data: samples per forward pass"),
    "tasks": Option(str, [], "tasks or groups of the harness, by name"),
    "include_path": Option(str, None, "directory with more task files; the code that they name is executed"),
    "num_fewshot": Option(int, None, "examples before each question (default: the task's own)"),
    "limit": Option(int, None, "questions per task; for quick tests only"),
    "likelihood": Option(
        str, "monte_carlo", "score of continuations: a Monte Carlo bound, or the pseudo-log-likelihood (PLL)",
        ("monte_carlo", "pseudo"),
    ),
    "mc_num": Option(int, 128, "maximum forward passes per log-likelihood; exact if they suffice"),
    "decision_error": Option(
        float, 0.005, "multiple choice: probability that the best choice is not that of all --mc-num passes, 0: all"
    ),
    "batch_tokens": Option(int, 4096, "tokens per forward pass when scoring; raise it on a GPU"),
    "batch_size": Option(int, 16, "texts generated together"),
    "max_new_tokens": Option(int, 256, "tokens per answer, for tasks that set no length"),
    "seed": Option(int, 0, "seed of Monte Carlo masks and of sampling"),
    "allow_code_execution": Option(bool, False, "run programs that the model generates, in subprocesses with limits"),
    "allow_code_network": Option(bool, False, "run them even where they cannot be kept off the network"),
}  # fmt: skip
# Settings that allow code to run: accepted on the command line only, not from a file.
_CONSENT = {
    "include_path": "task files are programs",
    "allow_code_execution": "it runs programs that the model generates",
    "allow_code_network": "it gives generated programs network access",
}
_RESULTS = ("answers.jsonl", "results.json", "results.md")
_NOISE = ("noise_schedule", "timestep_sampling", "min_timestep")
_HELD_OUT = (*_NOISE, "reset_attention_mask")


def main(argv: list[str] | None = None) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # the harness has progress bars of its own
    options, layout, noise = _parse(argv)
    beside = [read_results(Path(directory)) for directory in options.compare_with]
    make_parent(Path(options.out) / "results.json")  # fail now, not after hours
    allow_programs(options.allow_code_execution, options.allow_code_network)
    check_model(options.model, layout)
    hide_noise("lm_eval.api.task", "lm_eval.evaluator")  # style of task files, requested shots
    begin = time.perf_counter()
    try:
        loaded = load_model(options.model, layout, options.objective)
        noise = {"reset_attention_mask": loaded.reset_attention_mask, **noise}
        if loaded.objective != "ar":
            noise = {"noise_schedule": loaded.noise_schedule, **noise}
        settings = {name: getattr(options, name) for name in OPTIONS}
        content: dict[str, Any] = {
            "model": options.model, "objective": options.objective, "versions": _versions(options),
            "settings": settings | {"sampling": {n: getattr(options, n) for n in SAMPLING if hasattr(options, n)}} |
            noise,
        }  # fmt: skip
        if options.valid_data_path:
            content["held_out"] = _held_out(options, loaded, noise)
        if options.tasks:
            content |= _tasks(options, loaded)
        if loaded.is_output_rank:
            _write(Path(options.out), {**content, "seconds": round(time.perf_counter() - begin, 1)}, beside)
    finally:
        close_model()


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any]]:
    """(options, layout settings, noise settings); UserError with all problems."""
    parser = Parser(
        prog="python -m megatron_a2d.evaluate", description="Evaluate a model: held-out NELBO and lm-eval tasks."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="an export, a checkpoint, or a model of the hub")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for the results")
    parser.add_argument("--config", metavar="FILE", help="YAML file of the settings below, as launch/eval/*.yaml")
    parser.add_argument(
        "--compare-with", nargs="+", default=[], metavar="DIR", help="earlier results to add to the table"
    )
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
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_settings(parser, (*_HELD_OUT, *LAYOUT))
    given = parser.parse_args(argv)
    problems: list[str] = []
    layout = given_settings(given, LAYOUT, problems)
    noise = given_settings(given, _HELD_OUT, problems)
    recipe = _read_config(given.config, problems) if given.config else {}
    if problems:
        raise UserError(problems)
    values = {name: option.default for name, option in OPTIONS.items()} | recipe
    options = argparse.Namespace(**{**values, **vars(given)})
    if not options.valid_data_path and not options.tasks:
        problems.append("--valid-data-path, --tasks: nothing to evaluate; give at least one of them")
    for name in (
        "seq_length",
        "num_samples",
        "micro_batch_size",
        "mc_num",
        "batch_tokens",
        "batch_size",
        "max_new_tokens",
    ):
        if getattr(options, name) < (2 if name == "seq_length" else 1):
            problems.append(f"{flag(name)} {getattr(options, name)}: is too small")
    for name, least in (("num_fewshot", 0), ("limit", 1), ("seed", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            problems.append(f"{flag(name)} {getattr(options, name)}: must be at least {least}")
    if not 0 <= options.decision_error < 0.5:
        problems.append(f"--decision-error {options.decision_error}: must be a probability below 0.5, or 0")
    if options.seed >= 1 << 64:
        problems.append(f"--seed {options.seed}: must be below 2^64")
    if not 0 < noise.get("min_timestep", 0.5) < 1:
        problems.append(f"--min-timestep {noise['min_timestep']}: must lie between 0 and 1; 0.001 is usual")
    if options.objective == "ar":
        problems += [
            f"{flag(name)} {noise[name]}: has no effect with --objective ar; remove it"
            for name in _NOISE
            if name in noise
        ]
    if problems:
        raise UserError(problems)
    return options, layout, noise


def _read_config(path: str, problems: list[str]) -> dict[str, Any]:
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


def _versions(options: argparse.Namespace) -> dict[str, str]:
    from importlib.metadata import version

    names = ["torch", "transformers", "tokenizers", *(["lm_eval"] if options.tasks else [])]
    try:
        return {name: version(name) for name in names}
    except ImportError:
        raise UserError(
            "--tasks: the lm-evaluation-harness is not installed; in the clone, pip install --editable '.[eval]'"
        ) from None


@contextmanager
def _progress(loaded: LoadedModel, what: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    with progress(what, total, unit) if loaded.is_output_rank else nullcontext(lambda amount: None) as advance:
        yield advance


def _held_out(options: argparse.Namespace, loaded: LoadedModel, noise: dict[str, Any]) -> dict[str, Any]:
    from megatron_a2d.data.tokenizer_fingerprint import vocabulary_in
    from megatron_a2d.evaluation.heldout_nelbo import evaluate_sources, open_sources
    from megatron_a2d.evaluation.score_table import plain

    if options.seq_length > loaded.max_positions:
        raise UserError(
            f"--seq-length {options.seq_length}: the model has {loaded.max_positions} positions; shorten the samples"
        )
    mask = loaded.mask_token_id if loaded.objective != "ar" else None
    vocabulary = vocabulary_in(json.loads(loaded.tokenizer.to_str())) if options.verify_tokenizer else None
    sources = open_sources(
        options.valid_data_path, options.seq_length, loaded.vocab_size, mask, vocabulary, loaded.document_token_id
    )
    config = build(
        {
            "objective": loaded.objective, "seq_length": options.seq_length, "label_shift": loaded.label_shift,
            "micro_batch_size": options.micro_batch_size, "block_length": loaded.block_length,
            "ar_loss_weight": float(loaded.causal_context), **noise,
        }
    )  # fmt: skip
    total = sum(min(options.num_samples, source.dataset.num_samples) for source in sources)
    with _progress(loaded, "held-out data", total, "samples") as advance:
        results = evaluate_sources(loaded, config, sources, options.num_samples, advance)
    return {name: plain(result.to_dict() | result.tables()) for name, result in results.items()}


def _tasks(options: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    from megatron_a2d.evaluation.loglikelihood import ScoringOptions
    from megatron_a2d.evaluation.response_cache import ResponseCache

    scoring = ScoringOptions(options.likelihood, options.mc_num, options.batch_tokens, options.seed)
    sampling = sampling_options(options, loaded, temperature=0.0)
    # Everything that a response depends on besides the request; batch sizes do not matter.
    dependent = {
        "model": _fingerprint(Path(options.model)), "objective": options.objective, "likelihood": options.likelihood,
        "mc_num": options.mc_num, "seed": options.seed, "sampling": repr(sampling),
        "end_token_ids": loaded.end_token_ids, "document_token_id": loaded.document_token_id,
    }  # fmt: skip
    cache = ResponseCache(Path(options.out) / "answers.jsonl", dependent, writes=loaded.is_output_rank)
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].barrier()  # all ranks read the same cache before one adds to it
    try:
        return _run_harness(options, loaded, scoring, sampling, cache)
    finally:
        cache.close()


def _run_harness(
    options: argparse.Namespace, loaded: LoadedModel, scoring: Any, sampling: Any, cache: ResponseCache
) -> dict[str, Any]:
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    from megatron_a2d.evaluation.harness import HarnessModel, tasks_without_a_length
    from megatron_a2d.evaluation.score_table import plain

    datasets.disable_progress_bars()
    manager = _task_manager(options, TaskManager)
    model = HarnessModel(
        loaded, scoring, sampling, options.max_new_tokens, options.batch_size, cache,
        lambda what, total, unit: _progress(loaded, what, total, unit), options.seed, options.decision_error,
    )  # fmt: skip
    model.keep_tasks(manager)
    try:
        with tasks_without_a_length():
            found = lm_eval.simple_evaluate(
                model=model, tasks=list(options.tasks), num_fewshot=options.num_fewshot, limit=options.limit,
                task_manager=manager, log_samples=False, confirm_run_unsafe_code=options.allow_code_execution,
            )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        if model.got_requests:
            raise
        reason = " ".join(str(error).split())[:300]
        if "unsafe" in reason:
            raise UserError(
                f"--tasks {' '.join(options.tasks)}: runs programs that the model generates; "
                "give --allow-code-execution to permit that on this machine"
            ) from None
        raise UserError(
            f"--tasks {' '.join(options.tasks)}: cannot be loaded ({type(error).__name__}: {reason}); "
            "its data set must be on this machine, or the hub reachable"
        ) from error
    assert found is not None
    return {
        "tasks": plain(found["results"]), "num_fewshot": plain(found.get("n-shot", {})),
        "log_likelihoods": model.error_summary() if loaded.objective != "ar" else {}, "counts": dict(model.counts),
    }  # fmt: skip


def _task_manager(options: argparse.Namespace, manager_class: Any) -> Any:
    """A task manager that has all tasks; UserError for unknown ones, with the nearest name."""
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path {options.include_path}: there is no such directory")
    if options.include_path is not None:
        # Listing the harness's thousands of tasks takes seconds.
        manager = manager_class(include_path=options.include_path, include_defaults=False)
        if set(options.tasks) <= set(manager.all_tasks):
            return manager
    manager = manager_class(include_path=options.include_path)
    known = set(manager.all_tasks)
    if problems := [
        f"--tasks {task}: unknown task{nearest(task, known)}" for task in options.tasks if task not in known
    ]:
        raise UserError(problems)
    return manager


def _fingerprint(model: Path) -> list[Any]:
    """A fingerprint of the state of a model's files without reading them.

    Of a training run, that of its newest checkpoint only; --out may be inside the model's directory.
    """
    from megatron_a2d.checkpoint.directory import is_checkpoint, resolve

    model = resolve(model) if is_checkpoint(model) else model
    files = sorted(
        path
        for path in model.rglob("*")
        if path.is_file() and path.name not in _RESULTS and not path.name.startswith(".")
    )
    return [str(model.resolve()), [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def _write(out: Path, content: dict[str, Any], beside: list[dict[str, Any]]) -> None:
    from megatron_a2d.evaluation.score_table import markdown

    write_json(out / "results.json", content)  # first, in case the table fails
    page = markdown([content, *beside])
    with new_file(out / "results.md") as partial:
        partial.write_text(page, encoding="utf-8")
    print_text(page.rstrip())
    print_line(json.dumps({"results": str(out / "results.json")}), sys.stderr)


if __name__ == "__main__":
    entry_point(main)
