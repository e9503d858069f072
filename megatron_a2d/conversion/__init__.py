"""Weights between Hugging Face directories and megatron.core's torch_dist checkpoints, streamed.

`weight_map` maps rows of HF tensors to rows of megatron tensors. `safetensors_files`, `torch_dist_writer` and
checkpoint/torch_dist_reader.py handle one format each; `sources` opens either under the same names;
`hf_to_torch_dist` and `torch_dist_to_hf` convert, `read_back` verifies what they wrote, `compare_weights` compares any
two. No model is built, and no more than a few slabs of a tensor are held in memory.
"""
