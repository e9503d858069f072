"""The ablations, one per file: settings varied, measurements, and report."""
