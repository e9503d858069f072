"""Model families, described as data: what is particular to each one's config.json and tensors. One file per family."""
