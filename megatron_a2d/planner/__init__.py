"""Which layout to train in: memory and time of every legal one, before a GPU is reserved (docs/planning.md)."""
