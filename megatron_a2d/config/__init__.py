"""Settings of a run, the command line and recipes that set them, and their validation."""
