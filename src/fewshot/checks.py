"""Whether settings fit their types and ranges, which pydantic decides, and what they must be, in words."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from functools import wraps
from inspect import signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from omegaconf import OmegaConf

from fewshot.errors import FewShotError

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Rate = Annotated[float, Gt(0), Lt(1)]
Port = Annotated[int, Ge(1), Le(65535)]
Place = Annotated[str, MinLen(1), "a path"]
Several = Annotated[list[str], MinLen(1), "a list of at least one string"]
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", NoneType: "null"}
WORDS |= {list[str]: "a list of strings", Sequence[str]: "a list of strings"}
Arguments = ParamSpec("Arguments")
LIMITS = {Ge: "of at least", Gt: "above", Le: "at most", Lt: "below"}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is of a type. It is compared as JSON, which has the same types."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # noqa: PLC0415
    from pydantic.errors import PydanticUserError  # noqa: PLC0415

    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    try:
        expected: Any = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
        expected.validate_json(json.dumps(plain, ensure_ascii=False).encode(errors="replace"), strict=True)
    except ValidationError:
        return False
    except (PydanticUserError, TypeError):  # a type that it does not know
        return True
    return True


def misfits(settings: Mapping[str, Any], types: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each setting that is not of its type."""
    for key, hint in types.items():
        if not fits(settings[key], hint):
            words = list(dict.fromkeys(_in_words(hint)))
            yield f"{key}={settings[key]} must be {' or '.join(filter(None, [', '.join(words[:-1]), *words[-1:]]))}"


def checked(node: str) -> Callable[[Callable[Arguments, None]], Callable[Arguments, None]]:
    """Make a constructor refuse arguments that do not fit its annotations.

    Args:
        node: of the configuration, for messages: "method".

    Returns:
        A decorator; the decorated constructor raises a ``FewShotError`` that names all of them.
    """

    def decorate(construct: Callable[Arguments, None]) -> Callable[Arguments, None]:
        @wraps(construct)
        def refusing(*values: Arguments.args, **named: Arguments.kwargs) -> None:
            given = signature(construct).bind(*values, **named).arguments
            hints = get_type_hints(construct, include_extras=True)
            types = {f"{node}.{name}": hint for name, hint in hints.items() if name in given}
            refuse(misfits({f"{node}.{name}": value for name, value in given.items()}, types))
            construct(*values, **named)

        return refusing

    return decorate


def refuse(wrong: Iterable[str]) -> None:
    """Raise what is wrong, if anything is.

    Raises:
        FewShotError: has all lines.
    """
    lines = dict.fromkeys(wrong)
    if lines:
        raise FewShotError("; ".join(lines))


def _in_words(hint: Any) -> Iterator[str]:
    """Describe the values that fit a type."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            yield from _in_words(option)
    elif get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif get_origin(hint) is Annotated:
        kind, *limits = get_args(hint)
        words = [f"{LIMITS[type(limit)]} {astuple(limit)[0]:,}" for limit in limits if type(limit) in LIMITS]
        described = [limit for limit in limits if isinstance(limit, str)]
        yield " and ".join(described) or f"{' or '.join(_in_words(kind))} {' and '.join(words)}".rstrip()
    elif getattr(hint, "__module__", None) != "torch":  # no YAML holds a tensor
        yield WORDS.get(hint, str(hint))
