"""Model families: what of a config.json and of its tensors is peculiar to each, as data. One file a family."""
