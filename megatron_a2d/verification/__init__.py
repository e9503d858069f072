"""Verification of converted and exported models of any size: equality of weights and logits, loss by t."""
