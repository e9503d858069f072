"""Small changes to a source file, by mutmut's operators: numbers, comparisons, operators, names, arguments, constants.

mutmut's own `run` leaves out properties and module-level tables, so the operators are applied here to every place of a file
except where a change cannot alter behaviour or alters a message alone: annotations, imports, decorators, docstrings, prose.
"""

from __future__ import annotations

import ast
import difflib
import random
from pathlib import Path
from typing import Any, NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

# An error's text is prose, and a class, a cast or a type variable is for the type checker.
_LEFT_ALONE = (cst.Annotation, cst.Import, cst.ImportFrom, cst.Decorator, cst.Raise)


class Place(NamedTuple):
    """A node of a file that at least one operator changes."""

    path: Path
    line: int
    node: cst.CSTNode
    changed: list[cst.CSTNode]


class Mutant(NamedTuple):
    """One change: the lines that differ, and the whole file with the change."""

    file: str  # relative to the repository
    line: int
    was: str
    now: str
    source: str


class _Places(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, path: Path):
        self._path = path
        self.places: list[Place] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, _LEFT_ALONE) or (isinstance(node, cst.SimpleString) and " " in node.value):
            return False
        if isinstance(node, cst.Expr) and isinstance(node.value, cst.SimpleString):
            return False  # a docstring
        changed: list[Any] = []
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changed += operator(node)
        if changed:
            line = self.get_metadata(PositionProvider, node).start.line
            self.places.append(Place(self._path, line, node, changed))
        return True


def sample(root: Path, targets: list[Path], seed: int, size: int) -> list[Mutant]:
    """`size` mutants of the targets: places drawn evenly, then one of the changes at each."""
    modules = {}
    places: list[Place] = []
    for path in targets:
        wrapper = MetadataWrapper(cst.parse_module(path.read_text()), unsafe_skip_copy=True)
        modules[path] = wrapper.module
        visitor = _Places(path)
        wrapper.visit(visitor)
        places += visitor.places
    chance = random.Random(seed)
    chance.shuffle(places)
    mutants: list[Mutant] = []
    for place in places:
        mutant = _mutant(root, modules[place.path], place, chance.choice(place.changed))
        if mutant is not None and len(mutants) < size:
            mutants.append(mutant)
        if len(mutants) == size:
            break
    return mutants


def _mutant(root: Path, module: cst.Module, place: Place, changed: cst.CSTNode) -> Mutant | None:
    """None for a change that does not compile or leaves the program as it was."""
    before = module.code
    replaced = module.deep_replace(place.node, changed)
    assert isinstance(replaced, cst.Module)
    try:
        if _behaviour(replaced.code) == _behaviour(before):
            return None
    except SyntaxError:
        return None
    lines = list(difflib.ndiff(before.splitlines(), replaced.code.splitlines()))
    was, now = ("\n".join(line[2:].strip() for line in lines if line.startswith(sign)) for sign in ("- ", "+ "))
    return Mutant(str(place.path.relative_to(root)), place.line, was, now, replaced.code)


def _behaviour(source: str) -> str:
    """The program without zip's `strict`: an assertion of what holds anyway."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
    return ast.dump(tree)
