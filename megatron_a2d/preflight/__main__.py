"""The checks before a run, on all its nodes: what cannot work is found before a model is built, and the node is named.

    torchrun ... -m megatron_a2d.preflight ARGUMENTS OF THE TRAINING       launch/train.sh does it
    python -m megatron_a2d.preflight ARGUMENTS OF THE TRAINING             this machine, one process
    python -m megatron_a2d.preflight --settings-only ARGUMENTS...          what needs neither torch nor files: at once

Settings, dataset and checkpoint; the same versions and the same files on all nodes; --save shared and with room; GPUs
there, free and as fast as the others; all-reduces inside nodes, between neighbours and over all (NCCL, or gloo without
GPUs). A table at the end; exit code 2 and a line for each problem. --full also compares checksums and moves larger
messages.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time

from megatron_a2d.checkpoint.training_facts import inherited
from megatron_a2d.config.cli import Parser, parse_run
from megatron_a2d.distributed.environment import rank, world_size
from megatron_a2d.planner.cluster import add_cluster, read_cluster
from megatron_a2d.terminal.console import entry_point, hide_noise
from megatron_a2d.training.resume import check_early
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.exit_codes import USER_ERROR


def main(argv: list[str] | None = None) -> None:
    try:
        parser = Parser(
            prog="megatron_a2d.preflight", description="Check nodes, network, data and checkpoint of a run."
        )
        parser.add_argument("--full", action="store_true", help="compare checksums, and move larger messages")
        parser.add_argument(
            "--settings-only", action="store_true", help="check the settings alone, for WORLD_SIZE processes, and end"
        )
        add_cluster(parser)
        config, options = parse_run(parser, argv, inherited)
        cluster = read_cluster(options.cluster) if options.cluster else None
        check_early(config, world_size())
    except UserError:
        if rank() > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the first rank says it, and torchrun then ends this one
            time.sleep(10)
            sys.exit(USER_ERROR)
        raise
    if options.settings_only:
        return
    hide_noise()
    from megatron_a2d.preflight.node_checks import check_nodes

    training = dataclasses.replace(config.training, verify_checkpoint=options.full)
    check_nodes(dataclasses.replace(config, training=training), options.full, cluster)


if __name__ == "__main__":
    entry_point(main)
