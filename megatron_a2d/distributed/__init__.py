"""Processes of a run: launch environment, process groups, rank failures, hang detection, step timers."""
