"""How good a model is: NELBO on held-out data, and tasks of the lm-evaluation-harness with a diffusion likelihood."""
