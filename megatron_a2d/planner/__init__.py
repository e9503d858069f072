"""Planner of parallel layouts: modelled memory and time of every valid layout, without a GPU (docs/planning.md)."""
