"""Training data, from token files on disk to micro-batches: indexed_dataset -> packed_dataset -> dataloader."""
