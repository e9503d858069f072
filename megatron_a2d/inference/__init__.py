"""Trained models, opened for sampling and evaluation: from an export, or sharded from a training checkpoint."""
