"""Settings that need a newer or an optional package; found before any package is imported.

Not checked by planning and `--dry-run --settings-only`, which are for another machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from megatron_a2d.config.settings import RunConfig, flag

MEGATRON, ENGINE, MUON = "megatron-core", "transformer-engine", "emerging-optimizers"
# Setting, package, the first version that has it (by their sources; megatron-core checks Transformer Engine's itself).
_FIRST_VERSIONS = (
    ("moe_hybridep_num_sms_preprocessing", MEGATRON, (0, 19)),
    ("use_transformer_engine_op_fuser", MEGATRON, (0, 19)),  # 0.16 has it for dense layers alone
    ("use_transformer_engine_op_fuser", ENGINE, (2, 14)),
    ("moe_expert_rank_capacity_factor", MEGATRON, (0, 19)),
)


def find_version_problems(config: RunConfig) -> list[str]:
    """A line for each setting that needs a newer version of a package, or an optional package."""
    project = config.training.wandb_project
    without_wandb = (
        f"--wandb-project {project}: needs the package wandb, which is not installed; install it, or remove this"
    )
    missing = [without_wandb] if project and find_spec("wandb") is None else []
    missing += _muon_problems(config)
    return missing + [
        f"{_shown(config, name)}: needs {package} {_dotted(first)}, and {_dotted(found)} is installed; remove it, or "
        f"install {package} {_dotted(first)} or later"
        for name, package, first in _needs(config)
        if (found := installed(package)) is not None and found < first
    ]


def _muon_problems(config: RunConfig) -> list[str]:
    """What --optimizer muon lacks. megatron-core 0.16.1 would ignore it; from 0.19 on Muon is in a separate package,
    tried from 0.3 on. (PyPI's 999.9.9 is withdrawn; pip on Python 3.11 names it alone.)"""
    if config.optimization.optimizer != "muon":
        return []
    problems, found = [], installed(MEGATRON)
    if found is not None and found < (0, 19):
        problems.append(
            f"--optimizer muon: needs {MEGATRON} 0.19.2, and {_dotted(found)} is installed; pip install "
            f"{MEGATRON}==0.19.2 (Python 3.12 or later), or use adam"
        )
    if (package := installed(MUON)) is None or package < (0, 3):
        state = "it is not" if package is None else f"{_dotted(package)} is"
        problems.append(
            f"--optimizer muon: needs {MUON} 0.3.0, and {state} installed; pip install {MUON}==0.3.0 (Python 3.12 or "
            "later), or use adam"
        )
    return problems


def installed(package: str) -> tuple[int, ...] | None:
    """The installed release of a package, as (0, 16, 1); None where it is not installed."""
    try:
        release = re.match(r"\d+(\.\d+)*", version(package))
    except PackageNotFoundError:
        return None
    return tuple(int(part) for part in release[0].split(".")) if release else None


def _needs(config: RunConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    performance = config.performance
    for name, package, first in _FIRST_VERSIONS:
        if getattr(performance, name) not in (None, False):
            yield name, package, first
    if performance.delay_wgrad_compute and performance.cuda_graph_impl == "transformer_engine":
        yield "delay_wgrad_compute", ENGINE, (2, 10)  # with graphs (transformer_config.py of both megatron-cores)


def _shown(config: RunConfig, name: str) -> str:
    value = getattr(config.performance, name)
    if name == "delay_wgrad_compute":
        return f"{flag(name)} with --cuda-graph-impl transformer_engine"
    return flag(name) if value is True else f"{flag(name)} {value}"


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
