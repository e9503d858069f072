"""Preflight checks on all nodes of a run: problems are found before the model is built, and name the node.

    torchrun ... -m megatron_a2d.preflight ARGUMENTS OF THE TRAINING       as launch/train.sh does
    python -m megatron_a2d.preflight ARGUMENTS OF THE TRAINING             this machine, one process
    python -m megatron_a2d.preflight --settings-only ARGUMENTS...          only the settings, without torch: instant

Checked are: settings, dataset and checkpoint; equal versions and files on all nodes; --save shared, with enough free
space; GPUs present, unused and as fast as the others; all-reduces inside nodes, between neighbours and over all nodes
(NCCL, or gloo without GPUs). Prints a table; exit code 2 and one line per problem. --full also compares checksums and
sends larger messages.
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
from megatron_a2d.training.startup_checks import check_early
from megatron_a2d.utils.errors import UserError
from megatron_a2d.utils.exit_codes import USER_ERROR


def main(argv: list[str] | None = None) -> None:
    try:
        parser = Parser(
            prog="python -m megatron_a2d.preflight",
            description="Check nodes, network, data and checkpoint of a run, with its arguments.",
        )
        parser.add_argument("--full", action="store_true", help="also compare checksums and send larger messages")
        parser.add_argument(
            "--settings-only", action="store_true", help="check only the settings, for WORLD_SIZE processes"
        )
        add_cluster(parser)
        config, options = parse_run(parser, argv, inherited)
        cluster = read_cluster(options.cluster) if options.cluster else None
        check_early(config, world_size())
    except UserError:
        if rank() > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # rank 0 reports the error, and torchrun then stops this rank
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
