"""Every recipe on every cluster size: `python -m tests.rehearsal --out tests/rehearsal/RESULTS.md` (make test-rehearsal)."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.rehearsal.rehearsal_cases import EVERY, LAYOUTS
from tests.rehearsal.rehearsal_results import problems_of, run_cases, say, table, waits

PAGE = """# Rehearsals

Written by `make test-rehearsal`: every recipe on the numbers of GPUs of docs/planning.md that it fits, and layouts that no recipe
has. The first, a middle and the last rank of each pipeline stage are built at their real size with tensors that hold no data, and
take one step; of the micro-batches as many as fill the pipeline. Of a case's ranks the one is shown whose activations are furthest
from the plan (in parentheses: the plan's error). Memory must be within 5% of the plan, traffic within 2%; sends and receives of all
stages must pair up. Host waits are those of one step.

{table}

## Where the host waits

{waits}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the page of results")
    parser.add_argument("--only", default="", help="cases whose name holds this; nothing is written")
    options = parser.parse_args()
    # The largest first: what each has to say takes longest to come.
    every = sorted(EVERY, key=lambda case: case.recipe not in ("rnd1_30b_a3b_64xb200", "qwen3_235b_a22b"))
    cases = [case for case in (*every, *LAYOUTS) if options.only in case.name]
    start, results, failed = time.monotonic(), [], 0
    for number, result in enumerate(run_cases(cases, max(1, min(4, os.cpu_count() or 1))), 1):
        problems = problems_of(result)
        failed += bool(problems)
        say(
            f"{number}/{len(cases)} {result['case']}: {'; '.join(problems) or 'as planned'} ({result['seconds']:.0f} s)"
        )
        results.append(result)
    order = {case.name: place for place, case in enumerate(cases)}
    results.sort(key=lambda result: order[result["case"]])
    shown = [result for result in results if result["ranks"]]
    if not options.only:
        options.out.write_text(PAGE.format(table=table(shown), waits=waits(shown)))
    say(f"{len(results)} cases in {time.monotonic() - start:.0f} s, {failed} not as planned")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
