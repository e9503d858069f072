"""The Makefile on machines with other Pythons: stand-ins for them, which say what they are asked to install and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "constraints" / "py312.txt"

PLAN = ("RECIPE=r.yaml", "CLUSTER=h100", "GPUS=8")
# A Python of the version MINOR: it answers -c as one, makes environments of its own kind, and installs nothing.
STAND_IN = """#!/bin/sh
case "$1" in
  -c) code=$2; shift 2
      exec "{python}" -S -c "import sys; sys.version_info = (3, MINOR, 1, 'final', 0); sys.executable = '$0'
$code" "$@" ;;
  --version) echo "Python 3.MINOR.1" ;;
  *) echo "$0 $*" >> "$CALLS"
     case "$2" in venv) /bin/mkdir -p "$3/bin" "$3/lib/python3.MINOR"; [ -e "$3/bin/python3" ] || /bin/cp "$0" "$3/bin/python3" ;; esac ;;
esac
"""


class Machine:
    """A fresh clone, and a PATH with nothing but a shell's tools and the Pythons that are put there."""

    def __init__(self, directory: Path):
        self.clone, self.path, self.calls = directory / "clone", directory / "bin", directory / "calls"
        self.path.mkdir()
        for tool in ("make", "bash", "env", "sed", "expand", "touch", "dirname", "grep", "cat", "mv", "rm"):
            (self.path / tool).symlink_to(str(shutil.which(tool)))
        shutil.copytree(ROOT / "launch", self.clone / "launch", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "constraints", self.clone / "constraints")
        for name in ("Makefile", "setup.py"):
            shutil.copy(ROOT / name, self.clone)

    def python(self, name: str, minor: int, where: Path | None = None) -> None:
        path = (where or self.path) / name
        path.write_text(STAND_IN.format(python=sys.executable).replace("MINOR", str(minor)))
        path.chmod(0o755)

    def make(self, *words: str, **environment: str) -> tuple[int, str, list[str]]:
        """Exit code, what was said, and what the Pythons were called for."""
        self.calls.unlink(missing_ok=True)
        given = {"PATH": str(self.path), "HOME": str(self.clone), "CALLS": str(self.calls), **environment}
        done = subprocess.run(["make", *words], cwd=self.clone, env=given, capture_output=True, text=True)
        called = self.calls.read_text().splitlines() if self.calls.exists() else []
        return done.returncode, done.stdout + done.stderr, called


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_python_keeps_bytecode(machine: Machine) -> None:
    """Else every command and every process of a test would compile torch anew, where an image forbids it."""
    show = "--eval=show: ; @echo [$$PYTHONDONTWRITEBYTECODE]"
    assert machine.make(show, "show", PYTHONDONTWRITEBYTECODE="1")[:2] == (0, "[]\n")


@pytest.mark.parametrize(
    ("pythons", "chosen", "pins"),
    [
        ({"python3.11": 11}, "python3.11", "py311"),
        ({"python3.12": 12}, "python3.12", "py312"),
        ({"python3": 13}, "python3", "py312"),
        ({"python3": 11, "python": 12}, "python3", "py311"),
        ({"python": 12}, "python", "py312"),
        ({"python3": 9, "python3.14": 14}, "python3.14", "py312"),
    ],
)
def test_any_python_makes_the_environment(pythons: dict[str, int], chosen: str, pins: str, machine: Machine) -> None:
    for name, minor in pythons.items():
        machine.python(name, minor)
    if "python3.11" not in pythons:  # pyenv puts names there for Pythons that are not active
        (machine.path / "python3.11").write_text("#!/bin/sh\nexit 127\n")
        (machine.path / "python3.11").chmod(0o755)
    code, said, called = machine.make("setup")
    assert code == 0, said
    venv, *installs = called
    assert venv.endswith(f"{chosen} -m venv .venv")
    own, beside = ([line for line in installs if ("--target" in line) == beside] for beside in (False, True))
    assert [line.split()[-1] for line in own] == ["torch", ".[data,plot]", ".[dev,plot]"], "torch first"
    assert all(f"--constraint constraints/{pins}.txt" in line for line in own)
    # Older or other packages, which tests put in front of the environment; at the same time. TE goes with the
    # environment's megatron-core.
    assert [line.split()[-1] for line in beside] == [
        "constraints/transformers4.txt", f"constraints/transformer_engine_{pins}.txt",
    ]  # fmt: skip
    assert machine.make("setup")[2] == [], "it is made once"
    assert not any(" pip " in line for line in machine.make("plan", *PLAN)[2])
    # What is there is kept when its pins change, also where an earlier name appears on PATH.
    machine.python("python3.11", 11)
    os.utime(machine.clone / ".venv" / "installed", (1e9, 1e9))
    assert f"--constraint constraints/{pins}.txt" in "".join(machine.make("setup")[2])
    # Under 3.12 and later the tests of the newest megatron-core need no environment of their own.
    _, said, called = machine.make("test-latest", PYTHON312="")
    assert (".venv/bin/python3 -m pytest" in "".join(called)) == (pins == "py312"), said
    # Under 3.11 both are put in front of what is there.
    _, _, called = machine.make("test-latest-cpu", ARGS="some")
    *installs, tests = called
    newest = [
        name for line in installs for name in line.split() if "newest" in name or "==" in name or name.endswith(".txt")
    ]
    versions = [line for line in PINS.read_text().splitlines() if line.startswith(("emerging-opt", "megatron-core=="))]
    assert len(versions) == 2 and newest == ([
        ".venv/newest/megatron_core", *versions, ".venv/newest/transformer_engine", "constraints/transformer_engine_py312.txt",
    ] if pins == "py311" else [])  # fmt: skip
    assert tests.endswith(".venv/bin/python3 -m pytest some")


def test_commands_install_no_tests_packages(machine: Machine) -> None:
    machine.python("python3.11", 11)
    code, said, called = machine.make("plan", *PLAN)
    assert code == 0, said
    assert [line.split()[-1] for line in called if " pip " in line] == ["torch", ".[data,plot]"]
    assert "-m megatron_a2d.plan" in called[-1]
    # Tests add theirs to the same environment.
    assert " -m venv " not in "".join(called := machine.make("test")[2])
    assert ".[dev,plot]" in "".join(called) and " -m pytest " in called[-1]


@pytest.mark.parametrize("refused", ["torch", "data,plot", "dev,plot", "transformers4", "transformer_engine"])
def test_an_installation_that_fails_is_no_environment(refused: str, machine: Machine) -> None:
    machine.python("python3", 11)
    python = machine.path / "python3"
    python.write_text(python.read_text().replace("  *) echo", f'  *) case "$*" in *{refused}*) exit 1 ;; esac; echo'))
    code, said, _ = machine.make("setup")
    assert code and not (machine.clone / ".venv" / "installed").exists(), said


# git without a network, and one that has it.
NO_NETWORK = """#!/bin/sh
echo "fatal: unable to access '$3/': Could not resolve host: github.com" >&2
exit 128
"""
CLONES = """#!/bin/sh
echo "git $*" >> "$CALLS"
[ "$1" != clone ] || /bin/mkdir -p "$4"
"""


def test_engines_without_github(machine: Machine) -> None:
    """One line says what is not tested and why; the rest is tested. A later run clones what is missing."""
    machine.python("python3.11", 11)
    (machine.path / "git").write_text(NO_NETWORK)
    (machine.path / "git").chmod(0o755)
    code, said, called = machine.make("test-engines")
    assert code == 0 and called[-1].endswith(" -m pytest tests/engines"), said
    (line,) = [line for line in said.splitlines() if "SDAR" in line]
    assert "SDAR's own code is not tested (unable to access" in line and "Could not resolve host: github.com)" in line
    folders = [line.split(" --target ")[1].split()[0] for line in called if " --target .venv/engines/" in line]
    assert folders == [
        f".venv/engines/{name}" for name in ("lmdeploy", "sglang", "transformers5", "transformers_sglang")
    ]
    (machine.path / "git").write_text(CLONES)
    code, said, called = machine.make("test-engines")
    assert code == 0 and "SDAR" not in said and not any(" -m pip " in line for line in called), said
    assert [line.split()[1] for line in called if line.startswith("git ")] == ["clone", "-C"]
    assert (machine.clone / ".venv" / "engines" / "sdar").is_dir()
    assert not any(line.startswith("git ") for line in machine.make("test-engines")[2]), "it is cloned once"


def test_engines_without_a_package_index(machine: Machine) -> None:
    machine.python("python3.11", 11)
    assert machine.make("setup")[0] == 0
    python = machine.clone / ".venv" / "bin" / "python3"
    refusing = '; case "$*" in *engines*) exit 1 ;; esac'
    python.write_text(python.read_text().replace('>> "$CALLS"', '>> "$CALLS"' + refusing, 1))
    code, said, called = machine.make("test-engines")
    assert code and "error: test-engines: pip could not install the engines" in said and "nothing was tested" in said
    assert not any("pytest" in line for line in called) and not (machine.clone / ".venv" / "installed_engines").exists()


def test_no_python_is_new_enough(machine: Machine) -> None:
    machine.python("python3", 10)
    code, said, called = machine.make("setup")
    assert code and "no Python 3.11 or later is found; name one with PYTHON=" in said and not called
    code, said, called = machine.make("setup", "PYTHON=python3")
    assert code and "PYTHON=python3: is Python 3.10" in said and not called
    assert machine.make("help")[0] == 0


@pytest.mark.parametrize("how", ["container", "VENV=none", "BIN"])
@pytest.mark.parametrize("target", ["plan", "train"])
def test_nothing_is_built_where_the_pythons_own_packages_are_wanted(how: str, target: str, machine: Machine) -> None:
    where = machine.path
    if how == "BIN":
        (where := machine.clone.parent / "own").mkdir()
    machine.python("python3", 12, where)
    for name in ("torch", "megatron", "transformers", "yaml", "rich"):
        (machine.clone / f"{name}.py").touch()
    (machine.clone / ".venv" / "bin").mkdir(parents=True)  # of the machine that the directory is mounted from
    machine.python("python", 11, machine.clone / ".venv" / "bin")
    variables = {"container": {"NVIDIA_PYTORCH_VERSION": "25.12"}, "BIN": {"BIN": str(where)}}.get(how, {})
    words = [*PLAN, *(["VENV=none"] if how == "VENV=none" else [])]
    code, said, called = machine.make(target, *words, **variables)
    assert code == 0 and f"using {where}/python3, and building nothing" in said, said
    assert called and all(line.startswith(f"{where}/python3 -m ") for line in called), called
    assert not [line for line in called if " -m venv " in line or " -m pip " in line]
    assert " -m megatron_a2d.plan " in called[0] or " -m megatron_a2d.preflight " in called[0]
    (machine.clone / "rich.py").unlink()
    code, said, called = machine.make(target, *words, **variables)
    assert code and "has no rich; " in said and "-m pip install --editable . adds them" in said and not called


@pytest.mark.parametrize("script", ["train.sh", "node.sh"])
def test_scripts_take_the_containers_python(script: str, machine: Machine) -> None:
    machine.python("python3", 12)
    (machine.clone / ".venv" / "bin").mkdir(parents=True)
    machine.python("python", 11, machine.clone / ".venv" / "bin")
    for container, python in (("", ".venv/bin/python "), ("25.12", f"{machine.path}/python3 ")):
        machine.calls.unlink(missing_ok=True)
        environment = {"PATH": str(machine.path), "CALLS": str(machine.calls), "NPROC": "1", "SLURM_JOB_ID": "1",
                       "SLURM_STEP_NUM_NODES": "1", "NVIDIA_PYTORCH_VERSION": container}  # fmt: skip
        subprocess.run(["bash", f"launch/{script}"], cwd=machine.clone, env=environment, check=True)
        assert all(python in f"{line} " for line in machine.calls.read_text().splitlines())
    (machine.path / "python3").unlink()
    done = subprocess.run(
        ["bash", f"launch/{script}"], cwd=machine.clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: PATH has no python3; ")
    assert len(done.stderr.splitlines()) == 1
