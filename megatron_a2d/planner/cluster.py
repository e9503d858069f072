"""Hardware of a cluster, read from launch/clusters/NAME.yaml."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_a2d.config.cli import Parser
from megatron_a2d.config.gpus import rates_of
from megatron_a2d.utils.atomic_write import read_yaml
from megatron_a2d.utils.errors import UserError, nearest

DIRECTORY = Path(__file__).resolve().parents[2] / "launch" / "clusters"


@dataclass(frozen=True)
class Cluster:
    """A GPU type and its interconnect; bandwidths are per GPU and direction.

    The dense peak rates and the compute capability are taken from gpus.py unless the file overrides them.
    """

    gpu: str
    gpus_per_node: int
    memory_gib: float
    bf16_tflops: float
    fp8_tflops: float
    compute_capability: float
    memory_gb_per_s: float
    nvlink_domain: int
    nvlink_gb_per_s: float
    network_gb_per_s: float
    price_per_gpu_hour: float
    fp4_tflops: float | None = None  # None: no FP4, or a rate that the file does not give
    storage_gb_per_s: float | None = None  # of a node to the shared file system; None: not given (run_forecast.py)

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * 2**30

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, (9, 0) for Hopper."""
        major, minor = divmod(round(10 * self.compute_capability), 10)
        return major, minor

    @property
    def is_blackwell(self) -> bool:
        return self.capability >= (10, 0)


def add_cluster(parser: Parser) -> None:
    parser.add_argument(
        "--cluster", metavar="NAME", help="refuse a run that does not fit into these GPUs (launch/clusters)"
    )


def cluster_names() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def read_cluster(name: str) -> Cluster:
    """The cluster of launch/clusters with this name, or of the YAML file at this path. UserError with every problem."""
    path = DIRECTORY / f"{name}.yaml"
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
    elif name not in cluster_names():
        known = ", ".join(cluster_names())
        raise UserError(
            f"--cluster {name}: is none of {known}{nearest(name, cluster_names())}; choose one, or give a file"
        )
    content = read_yaml(path, f"--cluster {name}")
    return _check(name, content)


def _check(name: str, content: dict[str, Any]) -> Cluster:
    fields = {item.name: str(item.type) for item in dataclasses.fields(Cluster)}
    optional = {item.name for item in dataclasses.fields(Cluster) if item.default is not dataclasses.MISSING}
    if rates := rates_of(str(content.get("gpu"))):
        content = {name: rate for name, rate in rates._asdict().items() if rate is not None} | content
    problems = [f"--cluster {name}: unknown value {key}{nearest(key, fields)}" for key in content if key not in fields]
    for field, kind in fields.items():
        value = content.get(field)
        if value is None:
            if field in optional:
                continue
            problems.append(f"--cluster {name}: {field} is missing; launch/clusters/h100.yaml has an example")
        elif kind == "str":
            if not isinstance(value, str):
                problems.append(f"--cluster {name}: {field} is {value!r}, not a string; quote it")
        elif isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float) or value <= 0:
            whole = "whole " if kind == "int" else ""
            problems.append(f"--cluster {name}: {field} is {value!r}, not a positive {whole}number; correct it")
    if problems:
        raise UserError(problems)
    return Cluster(**content)
