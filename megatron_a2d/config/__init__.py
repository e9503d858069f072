"""Every setting of a run, the command line and recipes that set them, and the checks of what goes together."""
