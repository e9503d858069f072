"""Reports of a run from its log: plots on one page, and TensorBoard opened at the same charts."""
