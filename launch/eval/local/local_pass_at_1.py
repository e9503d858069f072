"""pass@1 of generated programs. lm-eval 0.4.9 loads a `!function` only from a file next to the task's YAML."""

from megatron_a2d.evaluation.code_execution import process_results

__all__ = ["process_results"]
