"""Python reads this at its start, where PYTHONPATH names this directory: faults at a chosen iteration of a training run.

A2D_TEST_FAULT is JSON: {"attempt": 0, "rank": 1, "iteration": 4, "do": "hang"}; attempt and rank may be null for all.

    hold     stand before that step until the file A2D_TEST_RELEASE is there
    hang     never come back
    raise    a RuntimeError
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time


def with_fault(train_step, fault):
    from megatron_a2d.distributed import hang_watchdog

    def step(*arguments):
        if hang_watchdog._last.iteration == fault["iteration"]:
            if fault["do"] == "raise":
                raise RuntimeError("a fault of the test")
            while fault["do"] == "hang" or not os.path.exists(os.environ["A2D_TEST_RELEASE"]):
                time.sleep(0.05)
        return train_step(*arguments)

    return step


class Finder(importlib.abc.MetaPathFinder):
    """Changes the training loop when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "megatron_a2d.training.train_loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.train_step = with_fault(module.train_step, fault)

        spec.loader.exec_module = exec_module
        return spec


fault = json.loads(os.environ.get("A2D_TEST_FAULT", "null"))
if fault:
    here = {"attempt": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "rank": int(os.environ.get("RANK", "-1"))}
    if all(fault[name] in (None, value) for name, value in here.items()):
        sys.meta_path.insert(0, Finder())
