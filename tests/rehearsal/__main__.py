"""Every recipe on every cluster size: `python -m tests.rehearsal --out tests/rehearsal/RESULTS.md` (make test-rehearsal).

Each result is kept in build/rehearsal: started again, it makes those that are missing, or were made by other code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_a2d.utils.printable import print_line
from tests.rehearsal.rehearsal_cases import EVERY, LAYOUTS
from tests.rehearsal.rehearsal_results import page, problems_of
from tests.rehearsal.rehearsal_runner import KEPT, run_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the page of results")
    parser.add_argument("--only", default="", help="cases whose name holds this; the page is not written")
    options = parser.parse_args()
    # The largest first, so that the workers end together.
    every = sorted(EVERY, key=lambda case: -("235b" in case.recipe) * 2 - ("b200" in case.recipe))
    cases = [case for case in (*every, *LAYOUTS) if options.only in case.name]
    start, results, failed = time.monotonic(), [], 0
    for number, result in enumerate(run_cases(cases, max(1, min(4, os.cpu_count() or 1)), KEPT), 1):
        problems = problems_of(result)
        failed += bool(problems)
        outcome = "; ".join(problems) or "as planned"
        say(f"{number}/{len(cases)} {result['case']}: {outcome} ({result['seconds']:.0f} s)")
        results.append(result)
    order = {case.name: place for place, case in enumerate([*EVERY, *LAYOUTS])}
    results.sort(key=lambda result: order[result["case"]])
    if not options.only and all(result["ranks"] for result in results):
        options.out.write_text(page(results))
    say(f"{len(results)} cases in {time.monotonic() - start:.0f} s, {failed} not as planned")
    sys.exit(bool(failed))


def say(text: str) -> None:
    print_line(text, sys.stderr)


if __name__ == "__main__":
    main()
