"""Read pickles of dictionaries, lists and numpy arrays as data, without importing or calling what they name.

Overriding ``find_class`` keeps ``pickle.Unpickler`` from running code, but a few bytes can still make it allocate
gigabytes for a memo of one entry, or hash keys nested so deeply that the stack overflows.
"""

import pickletools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

CORES = ("core", "_core")  # since numpy 2, and before
BUILTINS = ("builtins", "__builtin__")  # since Python 3, and before
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
    """Read one pickle, of any protocol, of numbers, strings, lists, dictionaries and numpy arrays.

    Strings of Python 2 are decoded as Latin-1, because its byte arrays are strings.

    Returns:
        The contents; ``to_array`` and ``to_list`` convert arrays and lists in it.

    Raises:
        UnpicklingError: the pickle names or contains anything else.
        AttributeError, LookupError, MemoryError, OverflowError, TypeError, ValueError: the pickle is broken.
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
                raise UnpicklingError(f"it has the instruction {name}, which arrays do not need")
    return stack.pop()


def to_array(value: Any) -> NDArray[Any]:
    """Return an array that ``unpickle`` read.

    Raises:
        TypeError: the value is not an array.
    """
    return _expect(_Array, value).array


def to_list(value: Any, longest: int) -> list[Any]:
    """Return the entries of a list, a range or a one-dimensional array.

    Raises:
        TypeError: the value is none of these.
        ValueError: the value has more than ``longest`` entries.
    """
    entries = value.array.tolist() if isinstance(value, _Array) and value.array.ndim == 1 else value
    _expect((list, tuple, range), entries)
    if len(entries) > longest:
        raise ValueError(f"it has a list of {len(entries):,} entries, more than {longest:,}")
    return list(entries)


class _Array:
    """Stands for numpy.ndarray."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def build(self, _version: Any, shape: Any, dtype: Any, fortran: Any, contents: Any) -> None:
        self.array = _from_bytes(contents, dtype, shape, "F" if fortran else "C").array


class _Dtype:
    """Stands for numpy.dtype: numbers and strings only, whatever else the pickle specifies.

    numpy.dtype takes its flags from the pickle, which could pass off bytes as pointers to objects.
    """

    def __init__(self, name: Any, *_: Any) -> None:
        if not re.fullmatch(r"[biufSU]\d+", name):
            raise UnpicklingError(f"it has an array of {name}, which are not numbers")
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
    """Add alternating keys and values to a dictionary."""
    found: dict[Any, Any] = _expect(dict, target)
    for key, value in zip(items[::2], items[1::2], strict=True):
        found[_expect((str, bytes, int, float), key)] = value  # hashing a nested tuple could overflow the stack
    return found


@dataclass(frozen=True)
class _Named:
    """A name in a pickle; ``make`` replaces the function, or is None if it may not be called."""

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
    **{(builtins, "bytes"): _Named(lambda: b"") for builtins in BUILTINS},  # old protocols call it for b""
    **{(builtins, "list"): _Named(None) for builtins in BUILTINS},
    **{(builtins, name): _Named(range) for builtins in BUILTINS for name in ("range", "xrange")},
}


def _named(module: Any, name: Any) -> _Named:
    names = _expect(str, module), _expect(str, name)
    if names not in NAMES:
        raise UnpicklingError(f"it names {module}.{name}, which is not an array")
    return NAMES[names]


def _call(named: Any, arguments: Any) -> Any:
    make = _expect(_Named, named).make
    if make is None:
        raise UnpicklingError("it calls something that is not an array")
    return make(*_expect(tuple, arguments))


def _expect(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"it has a {type(value).__name__.lstrip('_')} in an unexpected place")
    return value
