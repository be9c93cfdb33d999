"""Pickles as data: dictionaries, lists and numpy arrays are read; nothing that a pickle names is imported or called.

``pickle.Unpickler`` can be kept from running code by its ``find_class``, but not from what a few bytes can claim:
gigabytes for a memo of one entry, or keys nested so deeply that to hash them overflows the stack.
"""

import pickletools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

CORES = ("core", "_core")  # before numpy 2 and since
BUILTINS = ("builtins", "__builtin__")  # since Python 3 and before
LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}


def unpickle(file: BinaryIO) -> Any:  # noqa: PLR0912, PLR0915
    """Read one pickle, of any protocol, that holds numbers, text, lists, dictionaries and numpy arrays.

    Text of Python 2 is read as Latin-1, since its arrays of bytes are text.

    Returns:
        What it holds; ``to_array`` and ``to_list`` give what is an array, or a list, in it.

    Raises:
        UnpicklingError: it asks for anything else.
        AttributeError, LookupError, MemoryError, OverflowError, TypeError, ValueError: it is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case name if name in LITERALS:
                if isinstance(argument, int) and argument.bit_length() > 64:
                    raise OverflowError("it has a number of more than 64 bits")
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case "MARK":
                marks.append(len(stack))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "LIST":
                stack.append(since_mark())
            case "APPEND":
                _expect(list, stack[-2]).append(stack.pop())
            case "APPENDS":
                items = since_mark()
                _expect(list, stack[-1]).extend(items)
            case "DICT":
                stack.append(_update({}, since_mark()))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _update(stack[-1], [key, value])
            case "SETITEMS":
                items = since_mark()
                _update(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_named(module, name))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD":
                state = _expect(tuple, stack.pop())
                _expect((_Array, _Dtype), stack[-1]).build(*state)
            case "PROTO" | "FRAME" | "STOP":
                pass
            case name:
                raise UnpicklingError(f"it has the instruction {name}, for which an array has no use")
    return stack.pop()


def to_array(value: Any) -> NDArray[Any]:
    """The array that ``unpickle`` read.

    Raises:
        TypeError: it is none.
    """
    return _expect(_Array, value).array


def to_list(value: Any, longest: int) -> list[Any]:
    """The entries of a list, a range or an array of one dimension.

    Raises:
        TypeError: it is none of these.
        ValueError: it has more than ``longest`` entries.
    """
    entries = value.array.tolist() if isinstance(value, _Array) and value.array.ndim == 1 else value
    _expect((list, tuple, range), entries)
    if len(entries) > longest:
        raise ValueError(f"it has a list of {len(entries):,} entries, where {longest:,} are the most there can be")
    return list(entries)


class _Array:
    """What numpy.ndarray is read as."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def build(self, _version: Any, shape: Any, dtype: Any, fortran: Any, contents: Any) -> None:
        self.array = _from_bytes(contents, dtype, shape, "F" if fortran else "C").array


class _Dtype:
    """What numpy.dtype is read as: numbers and text only, whatever else the pickle says of it.

    numpy's own takes its flags from the pickle, which can pass bytes off as pointers to objects.
    """

    def __init__(self, name: Any, *_: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d+", name):
            raise UnpicklingError(f"it has an array of {name}, which are no numbers")
        self.dtype = np.dtype(name)

    def build(self, _version: Any, order: Any, *_: Any) -> None:
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


def _from_bytes(contents: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    raw = contents.encode("latin1") if isinstance(contents, str) else _expect((bytes, bytearray), contents)
    flat = np.frombuffer(raw, _expect(_Dtype, dtype).dtype)
    return _Array(flat.reshape(_expect(tuple, shape), order=order))


def _scalar(dtype: Any, contents: Any) -> Any:
    return _from_bytes(contents, dtype, (), "C").array.item()


def _encode(text: Any, _encoding: Any) -> bytes:
    encoded: bytes = _expect(str, text).encode("latin1")
    return encoded


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    return _update({}, [item for pair in _expect((list, tuple), pairs) for item in _expect((list, tuple), pair)])


def _update(target: Any, items: Sequence[Any]) -> dict[Any, Any]:
    """Add the keys and values, which take turns, to a dictionary."""
    found: dict[Any, Any] = _expect(dict, target)
    for key, value in zip(items[::2], items[1::2], strict=True):
        found[_expect((str, bytes, int, float), key)] = value  # a nested tuple could overflow the stack that hashes it
    return found


@dataclass(frozen=True)
class _Named:
    """What a pickle names; it is called with ``make``, where it is one of those that may be called."""

    make: Callable[..., Any] | None


NAMES: Mapping[tuple[str, str], _Named] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Named(lambda *_: _Array(np.empty(0))) for core in CORES},
    **{(f"numpy.{core}.multiarray", "scalar"): _Named(_scalar) for core in CORES},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Named(_from_bytes) for core in CORES},
    ("numpy", "ndarray"): _Named(None),
    ("numpy", "dtype"): _Named(_Dtype),
    ("_codecs", "encode"): _Named(_encode),
    ("collections", "OrderedDict"): _Named(_ordered_dict),
    ("collections", "defaultdict"): _Named(lambda *_: {}),
    **{(builtins, "bytes"): _Named(lambda: b"") for builtins in BUILTINS},  # old protocols call for empty ones
    **{(builtins, "list"): _Named(None) for builtins in BUILTINS},
    **{(builtins, name): _Named(range) for builtins in BUILTINS for name in ("range", "xrange")},
}


def _named(module: Any, name: Any) -> _Named:
    names = _expect(str, module), _expect(str, name)
    if names not in NAMES:
        raise UnpicklingError(f"it asks for {module}.{name}, which is no array")
    return NAMES[names]


def _call(named: Any, arguments: Any) -> Any:
    make = _expect(_Named, named).make
    if make is None:
        raise UnpicklingError("it calls what is no array")
    return make(*_expect(tuple, arguments))


def _expect(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"it has a {type(value).__name__.lstrip('_')} in an unexpected place")
    return value
