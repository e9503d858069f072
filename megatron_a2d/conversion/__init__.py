"""Weights between Hugging Face directories and megatron.core's torch_dist checkpoints, streamed.

`table` says which rows of which tensor are which. `safetensors_files`, `torch_dist` (writing) and
`torch_dist_reader` know one format each; `sources` opens either under the same names; `convert`, `export`
and `compare` put them together. No model is built and no tensor larger than a slab is ever held.
"""
