"""Evaluation: NELBO on held-out data, and lm-evaluation-harness tasks with a diffusion log-likelihood."""
