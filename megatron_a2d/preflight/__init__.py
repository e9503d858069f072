"""The checks before a run: versions, GPUs, network, disk, files, on all nodes; names the bad one."""
