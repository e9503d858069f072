"""Command for evaluation: NELBO on held-out data, and tasks of the lm-evaluation-harness.

    python -m megatron_a2d.evaluate --model EXPORT --valid-data-path code=data/code_valid web=data/web_valid --out EVAL
    python -m megatron_a2d.evaluate --model EXPORT --config launch/eval/mmlu.yaml --out EVAL
    python -m megatron_a2d.evaluate --model EXPORT base=QWEN3 DREAM LLADA --config launch/eval/mmlu.yaml --out TABLE
    torchrun --nproc-per-node 8 -m megatron_a2d.evaluate --model CHECKPOINT --expert-model-parallel-size 8 ...

Writes EVAL/results.json with the resolved settings, EVAL/results.md, and EVAL/answers.jsonl while running: the same
command resumes after an interruption. Several models are evaluated one after another, each to a directory TABLE/NAME,
and TABLE/results.md has them side by side. `--compare-with EVAL_BEFORE` adds earlier results to the table, and without
--model makes a table of these alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_a2d.checkpoint.directory import is_checkpoint, resolve
from megatron_a2d.config.settings import build
from megatron_a2d.evaluation.code_execution import allow_programs
from megatron_a2d.evaluation.evaluation_options import NOISE, OPTIONS, Arguments, parse_arguments
from megatron_a2d.evaluation.score_table import markdown, plain, read_results
from megatron_a2d.inference.arguments import (
    SAMPLING,
    check_model,
    close_model,
    load_model,
    own_objective,
    sampling_options,
)
from megatron_a2d.terminal.console import entry_point, hide_noise, progress
from megatron_a2d.utils.atomic_write import new_file, write_json, write_problems
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.printable import print_line, print_text

if TYPE_CHECKING:
    from megatron_a2d.inference.loaded_model import LoadedModel

_RESULTS = ("answers.jsonl", "results.json", "results.md")


def main(argv: list[str] | None = None) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # the harness has progress bars of its own
    arguments = parse_arguments(argv)
    options, out = arguments.options, Path(arguments.options.out)
    earlier = [read_results(Path(directory)) for directory in options.compare_with]
    if problems := write_problems(out, f"--out {out}"):
        raise UserError(problems)  # now, not after hours
    allow_programs(options.allow_code_execution, options.allow_code_network)
    for directory in arguments.models.values():
        check_model(directory, arguments.layout)
    hide_noise("lm_eval.api.task", "lm_eval.evaluator")  # style of task files, requested shots
    # What is missing shows before a model is loaded.
    tasks = _open_tasks(options) if options.tasks else None
    is_several = len(arguments.models) > 1
    runs: list[dict[str, Any]] = []
    page = "" if arguments.models else _write_page(out, earlier)
    for name, directory in arguments.models.items():
        content = _evaluate(arguments, tasks, name, directory, out / name if is_several else out)
        if content is None:
            continue  # another process of the parallel model writes
        runs.append(content)
        page = _write(out / name if is_several else out, content, [] if is_several else earlier)
        if is_several:
            page = _write_page(out, [*runs, *earlier])
    if page:
        print_text(page.rstrip())
        print_line(json.dumps({"results": str(out / ("results.json" if len(runs) == 1 else "results.md"))}), sys.stderr)


def _evaluate(arguments: Arguments, tasks: Any, name: str, directory: str, out: Path) -> dict[str, Any] | None:
    """The content of results.json of one model; None in a process that does not write it."""
    options = argparse.Namespace(**vars(arguments.options))
    options.objective = options.objective or own_objective(directory)
    begin = time.perf_counter()
    try:
        loaded = load_model(directory, arguments.layout, options.objective)
        if loaded.block_length and "block_length" not in arguments.given:
            options.block_length = loaded.block_length  # the file's block length is for models without their own
        noise = {"reset_attention_mask": loaded.reset_attention_mask, **arguments.noise}
        if loaded.objective == "ar":
            noise = {key: value for key, value in noise.items() if key not in NOISE}
        else:
            noise = {"noise_schedule": loaded.noise_schedule, **noise}
        settings = {key: getattr(options, key) for key in OPTIONS}
        content: dict[str, Any] = {
            "name": name, "model": directory, "objective": options.objective, "read_from_model": _facts(loaded),
            "versions": _versions(options),
            "settings": settings | {"sampling": {n: getattr(options, n) for n in SAMPLING if hasattr(options, n)}} |
            noise,
        }  # fmt: skip
        if options.valid_data_path:
            content["held_out"] = _held_out(options, loaded, noise)
        if tasks is not None:
            content |= _run_tasks(options, loaded, tasks, directory, out)
        return {**content, "seconds": round(time.perf_counter() - begin, 1)} if loaded.is_output_rank else None
    finally:
        close_model()
        loaded = None  # type: ignore[assignment]  # the next model needs its memory
        gc.collect()


def _facts(loaded: LoadedModel) -> dict[str, Any]:
    """Settings from the model's own files, which sampling and scoring use."""
    facts = {"positions": loaded.max_positions, "end_token_ids": list(loaded.end_token_ids)}
    if loaded.objective == "ar":
        return facts
    return facts | {
        "label_shift": loaded.label_shift, "mask_token_id": loaded.mask_token_id, "block_length": loaded.block_length,
    }  # fmt: skip


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


def _open_tasks(options: argparse.Namespace) -> Any:
    _versions(options)  # UserError if the harness is not installed
    from megatron_a2d.evaluation.harness_tasks import open_tasks

    return open_tasks(options)


def _run_tasks(
    options: argparse.Namespace, loaded: LoadedModel, tasks: Any, directory: str, out: Path
) -> dict[str, Any]:
    from megatron_a2d.evaluation.harness import HarnessModel
    from megatron_a2d.evaluation.harness_tasks import run_tasks
    from megatron_a2d.evaluation.loglikelihood import ScoringOptions
    from megatron_a2d.evaluation.response_cache import ResponseCache

    scoring = ScoringOptions(options.likelihood, options.mc_num, options.batch_tokens, options.seed)
    sampling = sampling_options(options, loaded, temperature=0.0)
    # Everything that a response depends on besides the request; batch sizes do not matter.
    dependent = {
        "model": _fingerprint(Path(directory)), "objective": options.objective, "likelihood": options.likelihood,
        "mc_num": options.mc_num, "seed": options.seed, "sampling": repr(sampling),
        "end_token_ids": loaded.end_token_ids, "document_token_id": loaded.document_token_id,
    }  # fmt: skip
    cache = ResponseCache(out / "answers.jsonl", dependent, writes=loaded.is_output_rank)
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].barrier()  # all ranks read the same cache before one adds to it
    model = HarnessModel(
        loaded, scoring, sampling, options.max_new_tokens, options.batch_size, cache,
        lambda what, total, unit: _progress(loaded, what, total, unit), options.seed, options.decision_error,
    )  # fmt: skip
    try:
        found = run_tasks(options, tasks, model)
    finally:
        cache.close()
    return {
        "tasks": plain(found["results"]), "num_fewshot": plain(found.get("n-shot", {})),
        "log_likelihoods": model.error_summary() if loaded.objective != "ar" else {}, "counts": dict(model.counts),
    }  # fmt: skip


def _fingerprint(model: Path) -> list[Any]:
    """A fingerprint of the state of a model's files without reading them.

    Of a training run, that of its newest checkpoint only; --out may be inside the model's directory.
    """
    model = resolve(model) if is_checkpoint(model) else model
    files = sorted(
        path
        for path in model.rglob("*")
        if path.is_file() and path.name not in _RESULTS and not path.name.startswith(".")
    )
    return [str(model.resolve()), [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def _write(out: Path, content: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Write a model's results, and a page of them next to `others`; returns the page."""
    write_json(out / "results.json", content)  # first, in case the table fails
    return _write_page(out, [content, *others])


def _write_page(out: Path, runs: list[dict[str, Any]]) -> str:
    page = markdown(runs)
    with new_file(out / "results.md") as partial:
        partial.write_text(page, encoding="utf-8")
    return page


if __name__ == "__main__":
    entry_point(main)
