#!/bin/bash
# Guess before running: a process group that nobody uses costs nothing; its threads sleep until there is something to do.
#
# Seen with torch 2.13.0 on Linux: every gloo process group, also one of a single rank, has an event loop of its own that
# wakes about 100 times a second for as long as the group exists, without any communication. Threads that woke more than
# 30 times a second, and their wake-ups per second together, in a process that sleeps:
#   1 group:    1 thread,  about 100
#   21 groups: 21 threads, about 2,000
# A framework that makes two dozen groups a process (Megatron's parallel_state) keeps some percent of a core busy so.
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os
import sys
import time

import torch.distributed as dist


def switches():
    """Voluntary context switches of each thread of this process."""
    found = {}
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/status") as status:
            found[thread] = next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt_switches"))
    return found


def awake(seconds=4):
    """Wake-ups a second of each thread that has more than 30."""
    before = switches()
    time.sleep(seconds)
    rates = [(count - before.get(thread, 0)) / seconds for thread, count in switches().items()]
    return [rate for rate in rates if rate > 30]


dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
seen = {1: awake()}
groups = [dist.new_group([0], backend="gloo") for _ in range(20)]
seen[21] = awake()
for number, rates in seen.items():
    print(f"{number} groups: {len(rates)} threads, {sum(rates):.0f} wake-ups a second")
sys.exit(not all(len(rates) == number and sum(rates) < 150 * number for number, rates in seen.items()))
PYTHON
