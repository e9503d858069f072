"""From token files on disk to micro-batches: indexed -> dataset (shuffle, pack) -> batches."""
