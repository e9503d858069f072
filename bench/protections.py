"""Benchmark of a run's protections: training steps with all of them against steps with none.

    python -m bench.protections [--rounds 15] [--steps 40] [--out bench/results/protections_cpu.json]

Two processes over gloo, started by torchrun, which train the same MoE model; both kinds of steps take turns. With:
heartbeats for the watchdog, the monitor of dead ranks, checksums of the tokens that are read, the marks, the agreement
on signals, the checks for losses that are not finite, for loss spikes and for what the scan of the data has found, and
a record in log.jsonl after each step. Without: none of these. A side takes so many steps that what happens once a
second happens in it too. CPU time is the first rank's with all its threads. What checkpoints cost: bench.async_save.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from bench.cpu_train_step import SHAPES
from bench.paired import Usage, compare, in_process
from bench.result_file import add_arguments, write
from bench.train_step_variants import LEARNING_RATE, model_config_of
from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import console, entry_point, hide_noise

PROTECTED, BARE = "protected", "bare"
RANKS, BATCH, SEQ_LENGTH, DOCUMENTS = 2, 4, 128, 400


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of each side in a round")
    add_arguments(parser, rounds=15)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [*torchrun, "-m", "bench.protections", *sys.argv[1:]])
    warnings.filterwarnings("ignore")
    hide_noise()
    is_first = os.environ["RANK"] == "0"
    console.quiet = not is_first
    with tempfile.TemporaryDirectory(prefix="bench_protections") as name:
        sides = prepared(Path(name), options.steps)
        compared = compare(f"{options.steps} steps", sides, [(PROTECTED, BARE)], rounds=options.rounds)
        if is_first:
            settings = SHAPES["moe"] | {"seq_length": SEQ_LENGTH, "batch": BATCH, "processes": RANKS}
            write(options.out, "protections", [compared], settings=settings)


def prepared(folder: Path, steps: int) -> dict[str, Any]:
    """The two sides; each takes `steps` steps of one model, on tokens with or without checksums."""
    import torch.distributed as dist

    from megatron_a2d.config.settings import build
    from megatron_a2d.distributed import process_groups
    from megatron_a2d.distributed.hang_watchdog import ATTEMPT, Heartbeat, mark
    from megatron_a2d.distributed.rank_failure import PeerMonitor
    from megatron_a2d.training import data_setup, initialization, train_step
    from megatron_a2d.training.logger import RunLog
    from megatron_a2d.training.loss_spikes import SpikeDetector
    from megatron_a2d.training.stop_conditions import SkippedSteps, StopRequests

    os.environ[ATTEMPT] = str(folder / "attempt")
    sizes = dict(seq_length=SEQ_LENGTH, global_batch_size=BATCH, micro_batch_size=1)
    config = build(sizes | {"lr": LEARNING_RATE, "train_data_path": str(tokens(folder / "summed", True)),
                            "distributed_timeout_minutes": 10.0, "log_interval": 1})  # fmt: skip
    process_groups.initialize(config.parallel)
    rank = dist.get_rank()
    model_config = model_config_of(SHAPES["moe"])
    state = initialization.build_train_state(model_config, config)
    initialization.draw_weights(state, config.data.seed, model_config.initializer_range)
    log = RunLog(build(sizes | {"save": str(folder / "log")}), 0, enabled=rank == 0)
    log.say = lambda message: None  # type: ignore[method-assign]
    requests, skipped, spikes = StopRequests(config.training), SkippedSteps(5), SpikeDetector()

    def batches_of(prefix: Path) -> Any:
        own = build(sizes | {"train_data_path": str(prefix)})
        dataset, _ = data_setup.open_datasets(own, model_config, scan=False)
        assert all(file.has_checksums == (prefix.name == "summed") for file in dataset.files)
        return data_setup.micro_batches(own, model_config, dataset, 1, 0)

    batches = {PROTECTED: batches_of(folder / "summed"), BARE: batches_of(tokens(folder / "plain", False))}

    def bare() -> None:
        for _ in range(steps):
            state.scheduler.step(BATCH)
            train_step.train_step(state.chunks, state.optimizer, batches[BARE].iteration(BATCH))

    def protected() -> None:
        for _ in range(steps):
            state.iteration += 1
            mark("reading samples", state.iteration, limit=600.0)
            state.scheduler.step(BATCH)
            result = train_step.train_step(state.chunks, state.optimizer, batches[PROTECTED].iteration(BATCH))
            assert not skipped.add(result.grad_norm) and requests.reason(state.iteration) is None
            loss = float(result.totals[0] / result.totals[4])
            log.event("train", iteration=state.iteration, loss=loss, is_spike=spikes.is_spike(loss))
            mark("checkpoint", limit=7200.0)

    timed = in_process(bare), in_process(protected)

    def unwatched() -> Usage:
        dist.barrier()
        return timed[0]()

    def watched() -> Usage:
        with Heartbeat(rank), PeerMonitor(600.0):
            dist.barrier()
            return timed[1]()

    return {PROTECTED: watched, BARE: unwatched}


def tokens(prefix: Path, with_checksums: bool) -> Path:
    """Random tokens, as data_prep.tokenize_corpus or as another tool writes them."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_a2d.data.checksums import (
        INDEX_CHECKSUM,
        TABLE_CHECKSUM,
        BlockHasher,
        file_checksum,
        write_metadata,
    )

    random = np.random.default_rng(0)
    vocabulary, per_document = SHAPES["moe"]["mask_token_id"], 4 * SEQ_LENGTH
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(DOCUMENTS):
        builder.add_document(
            torch.from_numpy(random.integers(0, vocabulary, per_document).astype(np.int32)), [per_document]
        )
    builder.finalize(f"{prefix}.idx")
    if with_checksums:
        hasher = BlockHasher()
        table, content = Path(f"{prefix}.sums"), Path(f"{prefix}.bin").read_bytes()
        table.write_bytes(hasher.update(memoryview(content)) + hasher.finish())
        described = {
            "vocab_size": vocabulary, "documents": DOCUMENTS, "tokens": DOCUMENTS * per_document,
            "max_token_id": vocabulary - 1, "max_token_document": 0, "eod_token_id": None,
        }  # fmt: skip
        sums = {TABLE_CHECKSUM: file_checksum(table), INDEX_CHECKSUM: file_checksum(Path(f"{prefix}.idx"))}
        write_metadata(Path(f"{prefix}.json"), described | sums)
    return prefix


if __name__ == "__main__":
    entry_point(main)
