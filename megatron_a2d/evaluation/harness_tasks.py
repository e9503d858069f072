"""Tasks of the lm-evaluation-harness: loaded with their data before a model is, and then run on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from megatron_a2d.evaluation.benchmark_files import reading_from
from megatron_a2d.evaluation.harness import HarnessModel, tasks_without_a_length
from megatron_a2d.utils.errors import UserError, nearest

# Tasks of launch/eval -> their folder in the harness, 0.4.13.
_FOLDERS = {
    "mmlu": "mmlu/default", "arc_challenge": "arc", "race": "race", "bbh_cot_fewshot": "bbh/cot_fewshot",
    "gsm8k": "gsm8k",
}  # fmt: skip


class OpenTasks(NamedTuple):
    """Tasks that are loaded, once for all models."""

    manager: TaskManager
    loaded: TaskDict


def open_tasks(options: argparse.Namespace) -> OpenTasks:
    """--tasks with their data.

    UserError for unknown tasks, for data that is not there, and for tasks that run programs without permission.
    """
    datasets.disable_progress_bars()
    manager = task_manager(options, TaskManager)
    try:
        with tasks_without_a_length(), reading_from(Path(options.data_dir) if options.data_dir else None):
            loaded = manager.load(list(options.tasks))
    except UserError:
        raise
    except Exception as error:
        raise _unusable(options, error) from error
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not options.allow_code_execution:
        raise UserError(
            f"--tasks {' '.join(unsafe)}: runs programs that the model generates; "
            "give --allow-code-execution to permit that on this machine"
        )
    return OpenTasks(manager, loaded)


def run_tasks(options: argparse.Namespace, tasks: OpenTasks, model: HarnessModel) -> dict[str, Any]:
    """The harness's results of a model. It resets a task's requests and random numbers before each use."""
    manager = tasks.manager
    manager.load = lambda names: tasks.loaded  # type: ignore[method-assign, misc]
    model.keep_tasks(manager)
    try:
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(options.tasks), num_fewshot=options.num_fewshot, limit=options.limit,
            task_manager=manager, log_samples=False, confirm_run_unsafe_code=options.allow_code_execution,
        )  # fmt: skip
    except UserError:
        raise
    except Exception as error:
        if model.got_requests:
            raise
        raise _unusable(options, error) from error
    finally:
        del manager.load  # it refers to the model, whose memory the next one needs
    assert found is not None
    return found


def _unusable(options: argparse.Namespace, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"--tasks {' '.join(options.tasks)}: cannot be loaded ({type(error).__name__}: {reason}); "
        "its data set must be on this machine (--data-dir, or in the hub's cache), or the hub reachable"
    )


def task_manager(options: argparse.Namespace, manager_class: Any) -> Any:
    """A task manager that has all tasks; UserError for unknown ones, with the nearest name."""
    folders = [options.include_path] if options.include_path is not None else []
    folders += [str(Path(lm_eval.tasks.__path__[0]) / _FOLDERS[task]) for task in options.tasks if task in _FOLDERS]
    if folders:
        # Listing the harness's thousands of tasks takes seconds.
        manager = manager_class(include_path=folders, include_defaults=False)
        if set(options.tasks) <= set(manager.all_tasks):
            return manager
    manager = manager_class(include_path=options.include_path)
    known = set(manager.all_tasks)
    if problems := [
        f"--tasks {task}: unknown task{nearest(task, known)}" for task in options.tasks if task not in known
    ]:
        raise UserError(problems)
    return manager
