"""Model families, described as data: what distinguishes each one's config.json and tensors. One file per family."""
