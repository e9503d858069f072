"""Training: where model and data meet."""
