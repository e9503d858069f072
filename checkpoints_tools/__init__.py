"""Commands for checkpoints: convert_hf, export_hf, verify, inspect, average, publish, synthesize."""
