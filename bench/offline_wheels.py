"""Offline packages of `make gpu` for a GPU machine without a network, in one folder to copy with the checkout.

    python -m bench.offline_wheels --out .gpu --python 3.12 [--torch 2.11.0] [--te 2.12.0] [--sm 90] [--megatron 0.16.1]

    on that machine:  bash .gpu/use.sh python3 -m bench.gpu --out result.json

The folder then holds megatron-core (both releases by default), the packages that this project, its tests and
Transformer Engine import and that such an image may lack (all but torch and numpy), and Transformer Engine itself: its
Python part, its core library, and its torch extension, which is published only as source and is built here, for the
Python and torch that run this command; these must be the GPU machine's. `--sm 90` keeps the core library's
machine code only for that architecture: the rest is zeroed, which compresses well (0: keep all).
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from megatron_a2d.config.cli import Parser
from megatron_a2d.terminal.console import entry_point
from megatron_a2d.utils.errors import UserError

MEGATRON = ("0.16.1", "0.19.2")
# Imported by this project, its tests and benchmarks (transformers, pytest, ...), with their dependencies, or by
# Transformer Engine (einops, pydantic, ...). torch and numpy are those of the GPU machine.
SMALL = (
    "transformers", "tokenizers", "safetensors", "huggingface_hub", "hf-xet", "httpx2", "httpcore2", "truststore",
    "anyio", "idna", "h11", "click", "typer", "shellingham", "annotated-doc", "filelock", "fsspec", "tqdm", "regex",
    "pytest", "iniconfig", "pluggy",
    "rich", "markdown-it-py", "mdurl", "pygments", "PyYAML", "psutil", "orjson", "xxhash", "einops", "pydantic",
    "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "nvdlfw-inspect", "packaging",
)  # fmt: skip
_USE = """#!/usr/bin/env bash
# Unpack the packages into one directory and run the given command with them.
#   bash .gpu/use.sh python3 -m bench.gpu --out result.json        (MEGATRON=0.19.2 for the newest lane)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
packages=$(mktemp -d)
for archive in "$here"/te-*.tar.xz; do [ -e "$archive" ] && tar -xJf "$archive" -C "$packages"; done
small=$(ls "$here"/*.whl | grep -v /megatron_core-)
megatron=$(ls "$here"/megatron_core-"${MEGATRON:-0.16.1}"-*.whl)
python3 -m pip install -q --no-index --no-deps --target "$packages" $small $megatron
export PYTHONPATH="$packages:$PWD"
"$@"
"""


def main() -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="output folder; new or empty")
    parser.add_argument(
        "--python",
        default=f"{sys.version_info.major}.{sys.version_info.minor}",
        help="the GPU machine's Python version",
    )
    parser.add_argument(
        "--torch", default=None, help="torch version of the GPU machine; default: the one installed here"
    )
    parser.add_argument("--te", default="2.12.0", help="release of Transformer Engine; empty: omit it")
    parser.add_argument("--cuda", type=int, default=13, help="major version of CUDA")
    parser.add_argument("--sm", type=int, default=90, help="architecture whose machine code is kept; 0: all")
    parser.add_argument("--megatron", nargs="+", default=list(MEGATRON), help="releases of megatron-core")
    options = parser.parse_args()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise UserError(
            f"--out {options.out}: exists and is not an empty folder; packages of other versions in it would be "
            "installed too. Remove it, or choose another"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    for release in options.megatron:
        download(options.out, options.python, f"megatron-core=={release}")
    download(options.out, options.python, *SMALL)
    if options.te:
        engine(options.out, options.python, options.torch, options.te, options.cuda, options.sm)
    script = options.out / "use.sh"
    script.write_text(_USE)
    for path in sorted(options.out.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path.name}")


def download(out: Path, python: str, *packages: str) -> None:
    """Download wheels for that Python on x86-64 Linux, without dependencies."""
    tag = python.replace(".", "")
    pins = Path(__file__).resolve().parents[1] / "constraints" / f"py{tag}.txt"
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 24, 17)] + [
        "--platform=manylinux2014_x86_64"
    ]
    _pip(
        "download", "--no-deps", "--only-binary=:all:", "--dest", str(out), "--python-version", python,
        "--implementation", "cp", "--abi", f"cp{tag}", "--abi", "abi3", "--abi", "none", *platforms,
        *(["--constraint", str(pins)] if pins.exists() else []), *packages,
    )  # fmt: skip


def engine(out: Path, python: str, torch_version: str | None, release: str, cuda: int, sm: int) -> None:
    """Transformer Engine as one archive: te-RELEASE-cpXY-torchX.Y-cuZ-smNN.tar.xz."""
    import torch

    installed = torch.__version__.partition("+")[0]
    if python != f"{sys.version_info.major}.{sys.version_info.minor}" or torch_version not in (None, installed):
        here = f"Python {sys.version_info.major}.{sys.version_info.minor} and torch {installed}"
        raise UserError(
            f"--python {python} --torch {torch_version}: the torch extension is built for {here}, which run this; "
            "run it with the GPU machine's versions, or omit Transformer Engine: --te ''"
        )
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory, "packages")
        parts = ("transformer-engine", f"transformer-engine-cu{cuda}")
        _pip("install", "--no-deps", "--target", str(place), *(f"{part}=={release}" for part in parts))
        _pip(
            "install", "--no-deps", "--no-build-isolation", "--target", str(place),
            f"transformer-engine-torch=={release}", extra={"PYTHONPATH": str(place), "NVTE_FRAMEWORK": "pytorch"},
        )  # fmt: skip
        if sm:
            for library in place.rglob("libtransformer_engine*.so"):
                removed = prune(library, sm)
                print(f"{library.name}: {removed / 1e6:.0f} MB of machine code for other architectures zeroed")
        name = f"te-{release}-cp{python.replace('.', '')}-torch{installed.rpartition('.')[0]}-cu{cuda}0-sm{sm}.tar.xz"
        with tarfile.open(out / name, "w:xz", preset=6) as archive:
            for path in sorted(place.iterdir()):
                archive.add(path, path.name)


_FATBIN = struct.pack("<I", 0xBA55ED50)
_MACHINE_CODE = 2


def prune(library: Path, sm: int) -> int:
    """Zero the machine code (cubins) of other architectures inside a library's fat binaries; returns the bytes zeroed.

    A fat binary starts with magic, version, header size and length; each entry with kind (1: PTX, 2: machine
    code), version, header size, length, and, at byte 28, the architecture as a number. Headers are not changed.
    """
    content = bytearray(library.read_bytes())
    zeroed, at = 0, content.find(_FATBIN)
    while at >= 0:
        _, _, header, length = struct.unpack_from("<IHHQ", content, at)
        entry, end = at + header, at + header + length
        while entry + 32 <= min(end, len(content)):
            kind, _, entry_header, size = struct.unpack_from("<HHIQ", content, entry)
            (model_config,) = struct.unpack_from("<I", content, entry + 28)
            if not entry_header or entry + entry_header + size > len(content):
                break
            if kind == _MACHINE_CODE and model_config != sm:
                start = entry + entry_header
                content[start : start + size] = bytes(size)
                zeroed += size
            entry += entry_header + size
        at = content.find(_FATBIN, max(end, at + 16))
    library.write_bytes(content)
    return zeroed


def _pip(*arguments: str, extra: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env={**os.environ, **(extra or {})}).returncode:
        raise UserError(
            f"pip {' '.join(arguments[:2])} ...: failed, see its output above; check the network and the versions"
        )


if __name__ == "__main__":
    entry_point(main)
