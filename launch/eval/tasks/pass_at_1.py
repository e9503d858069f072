"""pass@1 of generated programs: the tests run in a subprocess with resource limits."""

from __future__ import annotations

from typing import Any

from megatron_a2d.evaluation.code_execution import extract_program, passes


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    tests = doc["test_list"]
    lines = [doc.get("test_setup_code") or "", *(tests if isinstance(tests, list) else [tests])]
    return {"pass_at_1": float(passes(extract_program(results[0]), "\n".join(lines)))}
