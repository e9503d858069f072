#!/bin/bash
# Guess before running: with gloo, a reduce-scatter sends half of what an all-reduce of the same tensor sends, and takes
# half of its time, so that sharding the optimizer over processes (reduce-scatter, later an all-gather) costs no more
# communication than averaging the gradients (all-reduce).
#
# Seen with torch 2.13.0 (CPU), two processes, 32 MB of float32: a reduce-scatter sends as much as an all-reduce, and takes
# longer: it is an all-reduce, and a copy of the part. With the all-gather, 1.5 times as much is sent.
#   all_reduce             67 MB   29 ms
#   reduce_scatter_tensor  67 MB   53 ms
#   all_gather_into_tensor 34 MB   38 ms
# Bytes are those that the loopback device counts for both processes; times are medians, printed and not judged.
# Exits 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$folder/measure.py" <<'PYTHON'
import statistics
import sys
import time
import warnings

import torch
import torch.distributed as dist

warnings.filterwarnings("ignore")
NUM, ROUNDS = 8 << 20, 9
rank, port = map(int, sys.argv[1:])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
whole, half = torch.ones(NUM), torch.ones(NUM // 2)
calls = {
    "all_reduce": lambda: dist.all_reduce(whole),
    "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(half, whole),
    "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(whole, half),
}


def sent():
    (line,) = [line for line in open("/proc/net/dev") if line.strip().startswith("lo:")]
    return int(line.split()[9])


found = {name: [] for name in calls}
for _ in range(ROUNDS):
    for name, call in calls.items():
        whole.fill_(1.0)
        dist.barrier()
        before, begin = sent(), time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        dist.barrier()
        found[name].append((sent() - before, seconds))
dist.destroy_process_group()
if rank == 0:
    middle = {name: [statistics.median(column) for column in zip(*runs)] for name, runs in found.items()}
    for name, (num_bytes, seconds) in middle.items():
        print(f"{name:22} {num_bytes / 1e6:3.0f} MB  {1e3 * seconds:3.0f} ms")
    share = middle["reduce_scatter_tensor"][0] / middle["all_reduce"][0]
    print(f"torch {torch.__version__}: a reduce-scatter sends {share:.2f} of what an all-reduce sends")
    sys.exit(not share > 0.9)
PYTHON
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/python" "$folder/measure.py" 1 "$port" &
"$folder/venv/bin/python" "$folder/measure.py" 0 "$port"
wait
