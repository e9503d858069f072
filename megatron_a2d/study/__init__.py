"""Ablation studies: planning, running and measuring several training runs, and reporting the results."""
