"""A pickle read as data: classes and functions it names stay names, nothing is imported or called.

torch's own reader for untrusted files calls a list of functions that are believed to be harmless.
Here a state dict needs only the numbers those calls would get. What a state dict does not hold is
refused, and sizes are limited, so that no file can take long or much memory.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

# Steps of one pickle: a tensor takes about 40.
MOST_STEPS = 2_000_000
ORDERED_DICT = ("collections", "OrderedDict")
MARK = object()


@dataclass(frozen=True)
class Named:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Call:
    """What a function or class that a pickle names would make of its arguments."""

    function: Named
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class External:
    """Something that lies outside of the pickle: torch's storages do."""

    key: Any


def read_pickle(stream: BinaryIO) -> Any:
    """The value of one pickle: None, bools, numbers, texts, lists, tuples, dicts, Named, Call and
    External. The stream is left behind it.

    Raises ValueError for a pickle that is damaged, too long, or holds anything else.
    """
    machine = _Machine()
    try:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if steps > MOST_STEPS:
                raise ValueError(f"it takes more than {MOST_STEPS} steps to read")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None
    raise ValueError("its pickle has no end")


class _Machine:
    """The stack and the memory of pickle's instructions."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}
        self.steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("PROTO", "FRAME"), lambda argument: None),
            **dict.fromkeys(VALUES, self.stack.append),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._store),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), self._recall),
            **{name: self._constant(value) for name, value in CONSTANTS.items()},
            "MEMOIZE": lambda argument: self._store(len(self.memory)),
            "MARK": lambda argument: self.stack.append(MARK),
            "EMPTY_DICT": lambda argument: self.stack.append({}),
            "EMPTY_LIST": lambda argument: self.stack.append([]),
            "TUPLE": lambda argument: self.stack.append(tuple(self._above_mark())),
            "TUPLE1": lambda argument: self._tuple(1),
            "TUPLE2": lambda argument: self._tuple(2),
            "TUPLE3": lambda argument: self._tuple(3),
            "APPEND": lambda argument: self._extend([self.pop()]),
            "APPENDS": lambda argument: self._extend(self._above_mark()),
            "SETITEM": lambda argument: self._set_items(self._popped(2)),
            "SETITEMS": lambda argument: self._set_items(self._above_mark()),
            "GLOBAL": self._global,
            "STACK_GLOBAL": lambda argument: self._name(*self._popped(2)),
            "BINPERSID": lambda argument: self.stack.append(External(self.pop())),
            "REDUCE": lambda argument: self._call(*self._popped(2)),
            "BUILD": lambda argument: self._set_state(self.pop()),
        }

    def step(self, name: str, argument: Any) -> None:
        """One instruction. Raises ValueError for one that no state dict needs."""
        if name not in self.steps:
            raise ValueError(f"it holds what no state dict holds (pickle's {name})")
        self.steps[name](argument)

    def pop(self) -> Any:
        """The value on top of the stack. Raises IndexError where there is none."""
        value = self.stack.pop()
        if value is MARK:
            raise IndexError("a mark in place of a value")
        return value

    def _popped(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def _above_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def _constant(self, value: Any) -> Callable[[Any], None]:
        return lambda argument: self.stack.append(value)

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple(self._popped(count)))

    def _store(self, place: int) -> None:
        self.memory[place] = self.stack[-1]

    def _recall(self, place: int) -> None:
        self.stack.append(self.memory[place])

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError("only a list can be extended")
        target += values

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError("only a dict has items")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Texts and numbers only: hashing a tuple of tuples of ... may take forever.
            if not isinstance(key, (str, int)):
                raise ValueError("a key of one of its dicts is neither a text nor a number")
            target[key] = value

    def _global(self, argument: str) -> None:
        # pickletools gives both words in one text, parted by a blank.
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name is a text")
        self.stack.append(Named(module, name))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise TypeError("only a name can be called")
        if (function.module, function.name) != ORDERED_DICT:
            self.stack.append(Call(function, arguments))
            return
        self.stack.append({})
        for pair in arguments[0] if arguments else ():
            key, value = pair
            self._set_items([key, value])

    def _set_state(self, state: Any) -> None:
        # A module's state dict carries the versions of its layers as an attribute.
        if not isinstance(self.stack[-1], dict) or not isinstance(state, dict):
            raise ValueError("it holds an object with a state of its own")


# Instructions whose argument is the value itself.
VALUES = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"),
    *("BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("SHORT_BINSTRING", "BINSTRING"),
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
