"""Command lines for checkpoints: convert_hf, export_hf, verify, inspect, average, publish, synthesize."""
