"""The documents' tables of measurements, from the result files: `make bench-report`.

    python -m bench.report            # rewrites every block
    python -m bench.report --check    # exit code 1 if one differs; what CI does

A block stands between `<!-- bench: NAME -->` and `<!-- end of bench: NAME -->` in README.md or docs/, and is made from
bench/results/NAME.json: `NAME`, all its ratios and figures; `NAME, TEXT`, those whose name holds
TEXT. Nothing in it is typed. A ratio is a median with its quartiles; one whose quartiles are more than 10% of it apart
is not shown, but called noisy.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import choice_decisions, expert_balance, scaling, soak_table, speculative_decoding, wrong_settings
from bench.paired import CLOCKS, FEWEST_WITH_QUARTILES, Comparison
from bench.result_file import RESULTS, ROOT, Figure, Result, read
from megatron_a2d.config.cli import Parser
from megatron_a2d.study.results_page import markdown_table
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.atomic_write import new_file
from megatron_a2d.utils.errors import UserError

BLOCK = re.compile(r"(<!-- bench: (?P<name>[^>]*?) -->\n).*?(<!-- end of bench: (?P=name) -->)", re.DOTALL)
# Results that are not times of sides; their benchmarks make the tables.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "choice_decisions_cpu": choice_decisions.block,
    "expert_balance_cpu": expert_balance.block,
    "speculative_decoding_cpu": speculative_decoding.block,
    "wrong_settings_cpu": wrong_settings.block,
    "scaling_cpu": scaling.block,
    "soak_cpu": soak_table.block,
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="bench.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a block differs")
    options = parser.parse_args(argv)
    stale = []
    for path in documents():
        page = path.read_text(encoding="utf-8")
        if (wanted := rewritten(page)) != page:
            stale.append(path)
            if not options.check:
                with new_file(path) as partial:
                    partial.write_text(wanted, encoding="utf-8")
    for path in stale:
        console.print(f"{path.relative_to(ROOT)}: {'differs from its results' if options.check else 'rewritten'}")
    if options.check and stale:
        console.print("make bench-report rewrites them")
        sys.exit(1)


def documents() -> list[Path]:
    """Pages that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(page: str, folder: Path = RESULTS) -> str:
    """The page with every block made anew."""
    if page.count("<!-- bench: ") != len(BLOCK.findall(page)):
        raise UserError("a block of measurements has no end; each needs <!-- end of bench: NAME -->")
    return BLOCK.sub(lambda found: found[1] + block(found["name"], folder) + found[3], page)


def block(name: str, folder: Path = RESULTS) -> str:
    """The content of a block."""
    stem, _, part = name.partition(", ")
    if stem in TABLES:
        path = folder / f"{stem}.json"
        return TABLES[stem](json.loads(path.read_text()) | {"part": part}) if path.is_file() else _NONE
    result = read(stem, folder)
    if result is None:
        return _NONE
    comparisons = [item for item in result.comparisons if part in item.name]
    figures = [item for item in result.figures if part in item.name]
    if not comparisons and not figures:
        raise UserError(f"bench: {name}: {stem}.json has nothing of that name")
    (ratios, noisy_ratios), (measured, noisy_figures) = ratio_table(comparisons), figure_table(figures)
    tables = [table for table in (ratios, measured) if table]
    if noisy := noisy_ratios + noisy_figures:
        tables.append(f"Too noisy to show: {'; '.join(noisy)}.\n")
    return "\n".join([*tables, caption(result, comparisons)])


_NONE = "*Not measured yet in this form.*\n"


def ratio_table(comparisons: list[Comparison]) -> tuple[str, list[str]]:
    """A row per ratio: medians and quartiles by CPU time and by the clock, and the sides' CPU seconds.

    Returns the names of those without a figure to show as well.
    """
    cached = any(item.cache for item in comparisons)
    others = list(dict.fromkeys(key for item in comparisons for key in item.figures))
    head = ["", "ratio", *(["page cache"] if cached else []), "CPU time", "wall time", "CPU s", "wall s", *others]
    rows, noisy = [], []
    for item in comparisons:
        for side, over in item.pairs:
            if not item.figures and all(item.ratio(side, over, clock).noisy for clock in CLOCKS):
                noisy.append(f"{item.name}, {side} / {over}" + (f", {item.cache}" if item.cache else ""))
                continue
            ratios = [item.ratio(side, over, clock).text() for clock in CLOCKS]
            seconds = [
                "noisy"
                if item.ratio(side, over, clock).noisy
                else " / ".join(f"{item.median(one, clock):.3g}" for one in (side, over))
                for clock in CLOCKS
            ]
            cache = [item.cache or ""] if cached else []
            rows.append(
                [item.name, f"{side} / {over}", *cache, *ratios, *seconds]
                + [str(item.figures.get(key, "")) for key in others]
            )
    return markdown_table(head, rows) if rows else "", noisy


def figure_table(figures: list[Figure]) -> tuple[str, list[str]]:
    """A row per figure, and the names of those too noisy to show."""
    rows = [[item.name, item.text()] for item in figures if not item.noisy]
    return markdown_table(["", "measured"], rows) if rows else "", [item.name for item in figures if item.noisy]


def caption(result: Result, comparisons: list[Comparison]) -> str:
    """Machine, versions, command and commit, in a line."""
    about, machine = result.about, result.about["machine"]
    rounds = sorted({len(next(iter(item.runs.values()))) for item in comparisons})
    kind = "quartiles" if rounds and rounds[0] >= FEWEST_WITH_QUARTILES else "smallest to largest"
    spread = f"Medians ({kind}) of {' or '.join(map(str, rounds))} rounds in turns. " if rounds else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    where = f"{machine['cpu']}, {machine['cores']} cores, {threads}, torch {machine['torch']}"
    return f"{spread}{where}; `{about['command']}` at {about['commit']}.\n"


if __name__ == "__main__":
    entry_point(main)
