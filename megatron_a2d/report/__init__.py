"""Reports of a training run from its log: a page of plots, and TensorBoard with the same charts."""
