"""pass@1 of generated programs, in a file beside the task's YAML: lm-eval 0.4.9 loads a `!function` from nowhere else."""

from megatron_a2d.evaluation.code_execution import process_results

__all__ = ["process_results"]
