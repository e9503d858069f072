"""Pickle reader that executes nothing: calls and objects are recorded as data.

A pickle is a small program, and an unpickler with an allow-list of names still runs it. Here its instructions produce
only numbers, strings, bytes, lists, tuples, dicts, and `Record`s in place of objects; no class is imported and no
function called, whatever the bytes are. Instructions: the standard library's pickletools.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

Allowed = Mapping[str, Collection[str]]  # module -> names


class PickleError(ValueError):
    """The bytes are not a pickle of plain data, or name something that is not allowed."""


class Name(NamedTuple):
    """A class or a function that the pickle names."""

    module: str
    name: str


class Record:
    """What would have been `name`(*arguments), with the `state` that it would have been given."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: Name, arguments: tuple[Any, ...]):
        self.name, self.arguments = name, arguments
        self.state: Any = None


PERSISTENT = Name("pickle", "persistent_load")  # of a Record with the persistent id as its only argument


def read_pickle(data: bytes, allowed: Allowed) -> Any:
    """The value of a pickle in protocol 2 to 5. PickleError unless it is complete and names only what is `allowed`."""
    machine = _Machine(data, allowed)
    try:
        return machine.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise PickleError(f"it is cut short or damaged at byte {machine.position}") from None


class _Machine:
    """The stack machine of a pickle."""

    def __init__(self, data: bytes, allowed: Allowed):
        self.data, self.allowed = data, allowed
        self.position = 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below a MARK
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, instructions = self.data, _INSTRUCTIONS
        while True:
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                return self.stack.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise PickleError(f"it has the instruction {chr(code)!r}, which plain data does not need")
            instruction(self)

    def take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.data):
            raise IndexError
        taken, self.position = self.data[self.position : end], end
        return taken

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise IndexError
        taken = self.take(end - self.position).decode()
        self.position += 1
        return taken

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def name(self, module: Any, name: Any) -> Name:
        if type(module) is not str or type(name) is not str or name not in self.allowed.get(module, ()):
            raise PickleError(f"it wants to load {module}.{name}"[:200] + ", which is not allowed")
        return Name(module, name)


_U1, _U2, _U4, _U8, _I4 = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q", "<i"))
_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {}


def _instruction(code: bytes) -> Callable[[Callable[[_Machine], None]], Callable[[_Machine], None]]:
    def register(function: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
        _INSTRUCTIONS[code[0]] = function
        return function

    return register


def _push(code: bytes, value: Callable[[_Machine], Any]) -> None:
    def instruction(machine: _Machine) -> None:
        item = value(machine)  # first: it may change the stack
        machine.stack.append(item)

    _INSTRUCTIONS[code[0]] = instruction


# Values.
_push(b"N", lambda machine: None)
_push(b"\x88", lambda machine: True)
_push(b"\x89", lambda machine: False)
_push(b"K", lambda machine: machine.number(_U1))
_push(b"M", lambda machine: machine.number(_U2))
_push(b"J", lambda machine: machine.number(_I4))
_push(b"\x8a", lambda machine: int.from_bytes(machine.take(machine.number(_U1)), "little", signed=True))
_push(b"G", lambda machine: machine.number(struct.Struct(">d")))
for _code, _length in ((b"\x8c", _U1), (b"X", _U4), (b"\x8d", _U8)):
    _push(_code, lambda machine, length=_length: machine.take(machine.number(length)).decode("utf-8", "surrogatepass"))  # type: ignore[misc]
for _code, _length in ((b"C", _U1), (b"B", _U4), (b"\x8e", _U8), (b"\x96", _U8)):
    _push(_code, lambda machine, length=_length: machine.take(machine.number(length)))  # type: ignore[misc]
# Containers, tuples of the values before them or of those since the mark.
_push(b"]", lambda machine: [])
_push(b"}", lambda machine: {})
_push(b")", lambda machine: ())
_push(b"\x8f", lambda machine: [])  # a set, whose items are kept as they come
_push(b"t", lambda machine: tuple(machine.since_mark()))
_push(b"\x91", lambda machine: machine.since_mark())  # a frozenset
# What was seen before; the names of classes and functions.
_push(b"h", lambda machine: machine.memo[machine.number(_U1)])
_push(b"j", lambda machine: machine.memo[machine.number(_U4)])
_push(b"c", lambda machine: machine.name(machine.line(), machine.line()))
_push(b"Q", lambda machine: Record(PERSISTENT, (machine.stack.pop(),)))


def _tuple_of(length: int) -> Callable[[_Machine], None]:
    def instruction(machine: _Machine) -> None:
        if len(machine.stack) < length:
            raise IndexError
        machine.stack[-length:] = [tuple(machine.stack[-length:])]

    return instruction


_INSTRUCTIONS |= {0x84 + length: _tuple_of(length) for length in (1, 2, 3)}


@_instruction(b"\x80")
def _protocol(machine: _Machine) -> None:
    machine.number(_U1)


@_instruction(b"\x95")
def _frame(machine: _Machine) -> None:
    machine.number(_U8)  # a hint of how much to read at once


@_instruction(b"(")
def _mark(machine: _Machine) -> None:
    machine.outer.append(machine.stack)
    machine.stack = []


@_instruction(b"\x94")
def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


@_instruction(b"q")
def _put(machine: _Machine) -> None:
    machine.memo[machine.number(_U1)] = machine.stack[-1]


@_instruction(b"r")
def _long_put(machine: _Machine) -> None:
    machine.memo[machine.number(_U4)] = machine.stack[-1]


@_instruction(b"\x93")
def _stack_name(machine: _Machine) -> None:
    name = machine.stack.pop()
    machine.stack.append(machine.name(machine.stack.pop(), name))


@_instruction(b"a")
def _append(machine: _Machine) -> None:
    _extend(machine, [machine.stack.pop()])


@_instruction(b"e")
@_instruction(b"\x90")
def _appends(machine: _Machine) -> None:
    _extend(machine, machine.since_mark())


def _extend(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise PickleError(f"it appends to a {type(target).__name__}")
    target += items


@_instruction(b"s")
def _set_item(machine: _Machine) -> None:
    value = machine.stack.pop()
    _set_all(machine, [machine.stack.pop(), value])


@_instruction(b"u")
def _set_items(machine: _Machine) -> None:
    _set_all(machine, machine.since_mark())


def _set_all(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is Record:  # an OrderedDict is called first and filled then
        target.state = {} if target.state is None else target.state
        target = target.state
    if type(target) is not dict:
        raise PickleError(f"it sets items of a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing nested tuples could take forever.
        if type(key) not in _KEYS:
            raise PickleError(f"it has a {type(key).__name__} as the key of a dict")
        target[key] = value


_KEYS = (str, int, float, bool, bytes, type(None), Record, Name)


@_instruction(b"R")
@_instruction(b"\x81")
def _call(machine: _Machine) -> None:
    arguments = machine.stack.pop()
    _record(machine, machine.stack.pop(), arguments)


@_instruction(b"\x92")
def _call_with_keywords(machine: _Machine) -> None:
    keywords = machine.stack.pop()
    arguments = machine.stack.pop()
    _record(machine, machine.stack.pop(), arguments)
    machine.stack[-1].state = keywords


def _record(machine: _Machine, name: Any, arguments: Any) -> None:
    if type(name) is not Name or type(arguments) is not tuple:
        raise PickleError("it calls something that is not a function")
    machine.stack.append(Record(name, arguments))


@_instruction(b"b")
def _build(machine: _Machine) -> None:
    state, target = machine.stack.pop(), machine.stack[-1]
    if type(target) is not Record or target.state is not None:
        raise PickleError("it sets the state of something that is not a new object")
    target.state = state
