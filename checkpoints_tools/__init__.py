"""Commands for checkpoints: convert_hf, convert_megatron, export_hf, verify, inspect, average, publish, synthesize."""
