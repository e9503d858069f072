"""Masked diffusion in numpy and torch: noise, corruption, objective, likelihood, sampling. No megatron here."""
