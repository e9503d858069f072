"""The ablations, one file each: what is varied, what is measured, and how the result is reported."""
