"""A process that rehearses one case after another on one kind of GPU: `python -m tests.rehearsal.rehearsal_worker h100`,
cases by stdin as lines of JSON, results by stdout."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from megatron_a2d.planner.cluster import read_cluster
from megatron_a2d.rehearsal.rehearse import choose_layers, prepare
from megatron_a2d.terminal.console import hide_noise
from tests.recipe_sizes import RECIPES
from tests.rehearsal.rehearsal_cases import Case

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    hide_noise()
    has_engine = prepare(read_cluster(sys.argv[1]))
    output, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        fields = json.loads(line)
        case = Case(fields["recipe"], fields["gpus"], tuple(fields["places"]), tuple(fields["flags"]))
        print(json.dumps(rehearse_case(case, has_engine)), file=output, flush=True)


def rehearse_case(case: Case, has_engine: bool) -> dict[str, Any]:
    """Figures beside the planner's for each rank, and what came of the stages' exchange."""
    from megatron_a2d.rehearsal.pipeline_pairing import pair
    from megatron_a2d.rehearsal.rank_rehearsal import rehearse_rank
    from megatron_a2d.rehearsal.rehearsal_report import compare_memory, compare_traffic, job_rehearsed

    start = time.process_time()
    config, model_config = case.config()
    layers = choose_layers(config, has_engine)
    job = job_rehearsed(layers.config, model_config, case.gpus, layers.implementation)
    ranks, problems, pairs = [], [], 0
    for place, numbers in case.ranks(job.pipeline_model_parallel_size).items():
        done = [rehearse_rank(layers.config, model_config, rank, case.gpus, lambda what: None) for rank in numbers]
        pairing = pair({item.rank: item.events for item in done})
        problems += pairing.problems
        pairs += pairing.num_pairs
        ranks += [
            {
                "place": place,
                "rank": item.rank,
                "stage": item.stage,
                "memory": {part.name: [part.counted, part.planned] for part in compare_memory(item, job)},
                "traffic": {part.name: [part.counted, part.planned] for part in compare_traffic(item, job)},
                "waits": {
                    f"{wait.place} {wait.operation}": number
                    for wait, number in item.waits.items()
                    if wait.phase != "build"
                },
                "collectives": sum(event.peer is None and len(event.ranks) > 1 for event in item.events),
            }
            for item in done
        ]
    return {
        "case": case.name,
        "cluster": case.cluster,
        "layers": layers.implementation,
        "micro_batches": job.num_microbatches,
        "ranks": ranks,
        "pairs": pairs,
        "problems": problems,
        "files": _files(case),
        "seconds": time.process_time() - start,
    }


def _files(case: Case) -> list[str]:
    """Our own that a result depends on: the modules that were imported, and the recipe."""
    paths = {Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    own = {path for path in paths if path.is_relative_to(ROOT / "megatron_a2d") or path == Path(__file__)}
    return sorted(str(path.relative_to(ROOT)) for path in {*own, RECIPES[case.recipe]})


if __name__ == "__main__":
    main()
