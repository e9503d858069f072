"""Are two forms of a model the same, and does it behave as it should? What `verify` prints, for any size of model."""
