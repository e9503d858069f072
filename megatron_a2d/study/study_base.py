"""Base types of studies, and helpers that all of them use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.config.model_config import ModelConfig
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.study.jobs import FIRST_SEED, Job

Record = dict[str, Any]


class Report(NamedTuple):
    """The results of a study: Markdown for the page, and the rows of the table."""

    text: str
    rows: list[Record]


class Study(NamedTuple):
    """An ablation: the jobs it plans, and the report it makes of their records."""

    name: str
    title: str
    question: str  # and method, the first paragraph of the page
    plan: Callable[[RunConfig, Sequence[int], ModelConfig], list[Job]]  # (settings of the base run, seeds, model)
    report: Callable[[list[Record], Path], Report]  # (records of the jobs, directory for images)
    num_seeds: int = 3
    # Checkpoints besides --load that jobs may start from: --load-NAME, and its help. Without one its jobs are left out.
    starts: dict[str, str] = {}  # noqa: RUF012  (never written to)


def seeds_of(count: int) -> list[int]:
    return [FIRST_SEED + number for number in range(count)]


def final(record: Record) -> Record:
    """A run's last validation."""
    return record["validation"][-1]


def by_tag(records: Sequence[Record], *names: str) -> dict[Any, dict[int, Record]]:
    """{value of the tag (a tuple if several): {seed: record}}, in the order of the plan."""
    groups: dict[Any, dict[int, Record]] = {}
    for record in records:
        key = record[names[0]] if len(names) == 1 else tuple(record[name] for name in names)
        groups.setdefault(key, {})[record["seed"]] = record
    return groups
