"""What a study is, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_a2d.config.model_config import Architecture
from megatron_a2d.config.settings import RunConfig
from megatron_a2d.study.jobs import FIRST_SEED, Job

Record = dict[str, Any]


class Report(NamedTuple):
    """What came out, for the page: Markdown, the flat rows of the table, the names of the images that were drawn."""

    text: str
    rows: list[Record]


class Study(NamedTuple):
    name: str
    title: str
    question: str  # and how it is asked, as the page's first paragraph
    plan: Callable[[RunConfig, Sequence[int], Architecture], list[Job]]  # settings of the base run, seeds, the model
    report: Callable[[list[Record], Path], Report]  # the jobs' records, the directory for images
    num_seeds: int = 3


def seeds_of(count: int) -> list[int]:
    return [FIRST_SEED + number for number in range(count)]


def final(record: Record) -> Record:
    """A run's last validation."""
    return record["validation"][-1]


def by_tag(records: Sequence[Record], *names: str) -> dict[Any, dict[int, Record]]:
    """{value of the tag (a tuple of several)}: {seed: record}, in the order of the plan."""
    groups: dict[Any, dict[int, Record]] = {}
    for record in records:
        key = record[names[0]] if len(names) == 1 else tuple(record[name] for name in names)
        groups.setdefault(key, {})[record["seed"]] = record
    return groups
