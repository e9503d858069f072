"""Preflight checks of all nodes before a run: versions, GPUs, network, disk and files; problems name the node."""
