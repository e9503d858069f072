"""Benchmark of balanced and placed experts: a step under expert parallelism of one demo's model against another's.

    python -m bench.placed_experts --demo demo_run [--rounds 20] [--out bench/results/placed_experts_cpu.json]
    python -m bench.placed_experts --demo demo_run --against older_demo_run --out FILE

--demo: a finished `make demo`, whose recipe balances its routers; its experts are placed (place_experts, in a copy).
--against: another demo, such as one converted without balancing, whose experts stay in their order; without it the same
demo's, in their order. Each model takes steps on its own training data and with its own run's balancing, at EP 2 and
EP 4 (experts over all processes), both kinds of steps in turns, with a learning rate of 0 so that all route alike.

Measured is CPU time, in which a process that waits for another does nothing: that of the slower rank, of a step and of
its experts (forward and backward) alone; and that of the slower rank of each layer, summed over layers, since ranks
wait for one another in every layer. Ratios above 1: the placed ones are faster.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.paired import Comparison, Side, Usage, compare
from bench.process_tree import module
from bench.result_file import add_arguments, write
from megatron_a2d.config.cli import Parser
from megatron_a2d.report.plots import read_log
from megatron_a2d.terminal.console import console, entry_point
from megatron_a2d.utils.errors import UserError

PLACED, IN_ORDER = "placed", "in order"
PARTS = ("step", "experts", "experts layer by layer")
BALANCING = ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_aux_loss_tokens", "moe_aux_loss_loads")


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo_run"), help="output directory of make demo")
    parser.add_argument(
        "--against", type=Path, default=None, help="another demo's, its experts in order; default: the same"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4], help="expert-parallel sizes")
    parser.add_argument("--job", help="with torchrun: the runs to compare (internal)")
    add_arguments(parser, rounds=20)
    options = parser.parse_args()
    if options.job:
        measure(json.loads(options.job), options.rounds)
        return
    against = options.against or options.demo
    for flag, demo in (("--demo", options.demo), ("--against", against)):
        if not (demo / "run").is_dir():
            raise UserError(f"{flag} {demo}: has no finished conversion; run make demo")
    compared: list[Comparison] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="bench_placed_experts") as name:
            shutil.copytree(options.demo / "run", Path(name, "run"))
            place = ["--checkpoint", Path(name, "run"), "--valid-data", options.demo / "corpus_valid"]
            _run(module("checkpoints_tools.place_experts", *place, "--expert-model-parallel-size", size))
            other = f"another demo's, {IN_ORDER}" if options.against else IN_ORDER
            runs = {PLACED: [f"{name}/run", str(options.demo)], other: [str(against / "run"), str(against)]}
            result = Path(name, "result.json")
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", size, "-m", "bench.placed_experts"]
            job = json.dumps({"runs": runs, "result": str(result)})
            _run(module(*map(str, torchrun), "--rounds", options.rounds, "--job", job))
            compared += map(Comparison.from_json, json.loads(result.read_text()))
    settings = {"against": "another demo" if options.against else "the same demo"}
    write(options.out, "placed_experts", compared, settings=settings)


def _run(words: list[str]) -> None:
    if code := subprocess.run(words).returncode:
        console.print(f"failed with exit code {code}: {' '.join(words[:6])} ...")
        sys.exit(code)


def measure(job: dict[str, Any], rounds: int) -> None:
    """One rank of a comparison; the first writes the result."""
    from megatron_a2d.distributed import environment, process_groups

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    ranks = environment.world_size()
    console.quiet = environment.rank() > 0
    parts: dict[str, dict[str, list[Usage]]] = {name: {kind: [] for kind in job["runs"]} for name in PARTS}

    def recorded(kind: str, step: Any) -> Side:
        def side() -> Usage:
            used = step()
            for name, usage in zip(PARTS, used, strict=True):
                parts[name][kind].append(usage)
            return Usage(*used[0])

        return side

    steps = {kind: prepared(Path(run), Path(demo), ranks, kind == PLACED) for kind, (run, demo) in job["runs"].items()}
    sides = {kind: recorded(kind, step) for kind, step in steps.items()}
    pairs = [(kind, PLACED) for kind in sides if kind != PLACED]
    compare(f"EP {ranks}, step", sides, pairs, rounds=rounds)
    if dist.get_rank() == 0:
        found = [
            Comparison(f"EP {ranks}, {name}", {kind: used[-rounds:] for kind, used in kinds.items()}, pairs)
            for name, kinds in parts.items()
        ]
        Path(job["result"]).write_text(json.dumps([compared.to_json() for compared in found]))
    process_groups.finalize()


def prepared(run: Path, demo: Path, ranks: int, place: bool) -> Any:
    """A function that takes a step of a run's newest checkpoint, and returns the usages of PARTS."""
    from megatron_a2d.checkpoint.directory import HF_FILES, resolve
    from megatron_a2d.checkpoint.placement_file import find_placement
    from megatron_a2d.config.model_config import read_model_config
    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.training import data_setup, initialization, train_step

    directory, started = resolve(run), next(record for record in read_log(run) if record["kind"] == "start")
    balancing = {name: started["settings"][name] for name in BALANCING if started["settings"].get(name) is not None}
    config = build(
        dict(seq_length=128, micro_batch_size=8, global_batch_size=8 * ranks, lr=0.0, weight_decay=0.0, num_workers=0,
             train_data_path=str(demo / "corpus_train"), expert_model_parallel_size=ranks,
             use_distributed_optimizer=True) | balancing
    )  # fmt: skip
    model_config = read_model_config(directory / HF_FILES)
    if not dist.is_initialized():
        process_groups.initialize(config.parallel)
    data, _ = data_setup.open_datasets(config, model_config)
    state = initialization.build_train_state(model_config, config)
    if place:
        placement = find_placement(config, model_config, directory)
        assert placement and placement.applies_to(ranks)
        state.place_experts(placement)
    initialization.load_checkpoint(state, directory, weights_only=True)
    experts = ExpertTime(state.models[0])
    batches = data_setup.micro_batches(config, model_config, data, 1, 0)

    def step() -> list[Usage]:
        iteration = [next(batches) for _ in range(batches.num_microbatches)]
        state.scheduler.step(1)
        experts.seconds = [Usage(0.0, 0.0)] * model_config.num_layers
        begin = _now()
        train_step.train_step(state.chunks, state.optimizer, iteration)
        own = [_since(begin), Usage(*map(sum, zip(*experts.seconds, strict=True))), *experts.seconds]
        taken = torch.tensor(own)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return [Usage(*values.tolist()) for values in (taken[0], taken[1], taken[2:].sum(0))]

    return step


def _now() -> Usage:
    return Usage(time.perf_counter(), time.process_time())


def _since(begin: Usage) -> Usage:
    now = _now()
    return Usage(now.wall - begin.wall, now.cpu - begin.cpu)


class ExpertTime:
    """Time that a model's experts take, forward and backward, by layer."""

    def __init__(self, model: Any):
        self.seconds: list[Usage] = []
        for number, layer in enumerate(model.decoder.layers):
            experts, end = layer.mlp.experts, partial(self._end, number)
            experts.register_forward_pre_hook(self._begin)
            experts.register_forward_hook(end)
            experts.register_full_backward_pre_hook(self._begin)
            experts.register_full_backward_hook(end)

    def _begin(self, *_: Any) -> None:
        self._started = _now()

    def _end(self, number: int, *_: Any) -> None:
        before, taken = self.seconds[number], _since(self._started)
        self.seconds[number] = Usage(before.wall + taken.wall, before.cpu + taken.cpu)


if __name__ == "__main__":
    entry_point(main)
