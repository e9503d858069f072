"""`make test-mutants`: small changes to the core, each of which some test should notice.

    python -m tests.mutants --seed 1                 # 150 mutants; started again, it resumes
    make test-mutants SEED=2 ARGS='--size 20'

A mutant is judged by the tests that run the changed function (coverage.py says which), quick ones first, until one fails.
Each is tried in a copy of the tree, in a fork of a process that holds torch and megatron already.
What survives is written down in survivors.yaml with a verdict: equivalent and why, or the test that was added.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.mutants.mutant_runner import Judge, Outcome
from tests.mutants.mutate import sample
from tests.mutants.verdicts import Results, equivalents

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"

# The pure core: files, or folders of them. The only list of its kind.
TARGETS = (
    "megatron_a2d/diffusion",
    "megatron_a2d/data",
    "megatron_a2d/conversion/weight_map.py",
    "megatron_a2d/checkpoint/tensor_rows.py",
    "megatron_a2d/training/optimizer.py",
    "megatron_a2d/training/resume.py",
    "megatron_a2d/training/startup_checks.py",
    "megatron_a2d/training/train_step.py",
    "megatron_a2d/evaluation/loglikelihood.py",
    "megatron_a2d/planner/memory.py",
)


def target_files() -> list[Path]:
    found = []
    for target in TARGETS:
        path = ROOT / target
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert files and all(file.exists() for file in files), f"{target} is not there; see TARGETS"
        found += files
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="another seed is another sample")
    parser.add_argument("--size", type=int, default=150, help="number of mutants")
    parser.add_argument("--list", action="store_true", help="show the sample and end")
    args = parser.parse_args()
    targets = target_files()
    mutants = sample(ROOT, targets, args.seed, args.size)
    if args.list:
        for mutant in mutants:
            print(f"{mutant.file}:{mutant.line}\n  - {mutant.was}\n  + {mutant.now}")
        return 0
    judge = Judge(ROOT, WORK, targets)
    results = Results(WORK / f"seed_{args.seed}.jsonl")
    same = equivalents()
    counts = dict.fromkeys(Outcome, 0)
    for number, mutant in enumerate(mutants, 1):
        digest = judge.digest(mutant)
        outcome = results.known(mutant, digest)
        if outcome is None:
            outcome, detail = judge.judge(mutant)
            results.add(mutant, digest, outcome, detail)
        if outcome is Outcome.SURVIVED and (mutant.file, mutant.was, mutant.now) in same:
            outcome = Outcome.EQUIVALENT
        counts[outcome] += 1
        print(f"{number}/{len(mutants)} {outcome.value:10} {mutant.file}:{mutant.line}", flush=True)
        if outcome is Outcome.SURVIVED:
            print(f"  - {mutant.was}\n  + {mutant.now}", flush=True)
    caught = counts[Outcome.KILLED] + counts[Outcome.TIMEOUT]
    judged = len(mutants) - counts[Outcome.EQUIVALENT]
    shown = ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items())
    print(f"seed {args.seed}: {shown}; {caught / max(judged, 1):.1%} of {judged} that are not equivalent were noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
