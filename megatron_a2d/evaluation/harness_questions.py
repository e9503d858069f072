"""Requests of the lm-evaluation-harness that are choices of one question, where only the best choice counts.

The harness passes a flat list of requests. `Instance.task_name` and `doc_id` say which belong together, and the task
what it makes of their log-likelihoods (`ConfigurableTask.process_results`, lm-eval 0.4.13).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_a2d.diffusion.choice_decision import CONTROL_MASKS, looks
from megatron_a2d.evaluation.loglikelihood import Pair
from megatron_a2d.evaluation.multiple_choice import Question

# What metrics make of the choices: they rank them by log-likelihood, per character or per byte, and read no values.
_BY_SUM, _BY_CHARACTERS, _BY_BYTES = ("acc", "f1", "mcc", "exact_match"), ("acc_norm",), ("acc_bytes",)


def questions_of(
    instances: Sequence[Any], tasks: Mapping[str, Any], pairs: Sequence[Pair], mc_num: int
) -> dict[tuple[int, ...], Question]:
    """Multiple-choice questions, each as the numbers of its requests; other requests are not included.

    instances: lm-eval's `Instance`s. tasks: its tasks by name. pairs: the requests' tokens.
    """
    documents: dict[tuple[Any, Any], list[int]] = {}
    for number, instance in enumerate(instances):
        documents.setdefault((instance.task_name, instance.doc_id), []).append(number)
    # With fewer passes, nothing can be saved: the first look takes as many.
    shortest = 1 + CONTROL_MASKS + looks(mc_num)[0]
    questions = {}
    for (task_name, _), numbers in documents.items():
        scales = _scales(tasks.get(task_name), [instances[number] for number in numbers])
        choices = tuple(pairs[number] for number in numbers)
        if scales and mc_num > shortest and any(2 ** len(choice[1]) - 1 > shortest for choice in choices):
            questions[tuple(numbers)] = Question(choices, scales)
    return questions


def _scales(task: Any, instances: Sequence[Any]) -> tuple[tuple[float, ...], ...]:
    """For each way in which a document's choices are ranked, their factors; none if more than ranks is read."""
    metrics = set(getattr(task, "_metric_fn_list", ()))
    is_choice = getattr(task, "OUTPUT_TYPE", None) == "multiple_choice" and len(instances) > 1
    if not is_choice or not metrics <= {*_BY_SUM, *_BY_CHARACTERS, *_BY_BYTES} or callable(task.config.process_results):
        return ()
    choices = task.doc_to_choice(instances[0].doc)
    if [instance.idx for instance in instances] != list(range(len(choices))) or not all(choices):
        return ()  # repeated, or more than one request for each choice
    ranked = [
        (_BY_SUM, [1.0] * len(choices)),
        (_BY_CHARACTERS, [1 / len(choice) for choice in choices]),
        (_BY_BYTES, [1 / len(choice.encode("utf-8")) for choice in choices]),
    ]
    return tuple(dict.fromkeys(tuple(scale) for names, scale in ranked if metrics & set(names)))
