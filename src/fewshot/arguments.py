"""The command line before Hydra reads it: the order of its parts, what cannot be parsed, and how to quote it."""

import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException

from fewshot.errors import FewShotError

MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
# What Hydra knows only once it runs a job, for --cfg all --resolve.
UNKNOWN = ("hydra.job.num=0", "hydra.job.id=0", "hydra.runtime.output_dir=${hydra:run.dir}")
HOME = re.compile(r"(?<=[=,\[])~(?=[/,\]]|$)")  # Hydra cannot parse ~ in a value


def prepare(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in the order that Hydra needs: options such as ``-m`` first, then overrides.

    Args:
        arguments: as typed, without the program.

    Raises:
        FewShotError: an argument cannot be parsed; the message says what to type instead.
    """
    if "-sc" in arguments or "--shell-completion" in arguments:
        return list(arguments)
    arguments = [HOME.sub(str(Path.home()), argument) for argument in arguments]
    _reject_options(arguments)
    parser = get_args_parser()
    parser.error = _fail  # type: ignore[method-assign, assignment]
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.cfg == "hydra" and parsed.resolve:
        raise FewShotError("--cfg hydra cannot be resolved by itself; type --cfg all --resolve --package hydra")
    overrides: list[str] = parsed.overrides
    for override, following in pairwise([*overrides, ""]):
        _check(override, following, multirun=any(name in arguments for name in MULTIRUN))
    rest, options = list(overrides), []
    for argument in arguments:
        if rest and argument == rest[0]:
            rest.pop(0)
        else:
            options.append(argument)
    if "--resolve" in arguments:
        overrides = overrides + [
            line for line in UNKNOWN if not any(o.startswith(line.split("=")[0]) for o in overrides)
        ]
    return options + overrides


def quoted(argument: str) -> str:
    """Return an override with its value quoted, as to type it in a shell."""
    key, _, value = argument.partition("=")
    return shlex.quote(f"{key}={QuotedString(value, Quote.double).with_quotes()}")


def _fail(message: str) -> None:
    raise FewShotError(f"{message} (see --help)")


def _options() -> Iterator[str]:
    for action in get_args_parser()._actions:
        yield from action.option_strings


def _reject_options(arguments: Sequence[str]) -> None:
    """Reject ``--way 5`` and ``--way=5``: settings have no dashes.

    Raises:
        FewShotError: says what to type instead.
    """
    known = set(_options())
    for argument, following in pairwise([*arguments, ""]):
        name, separator, value = argument.partition("=")
        # argparse accepts the beginning of a long option, and a value joined to a short one.
        is_setting = (
            argument.startswith("-")
            and name not in known
            and not (name.startswith("--") and any(option.startswith(name) for option in known))
        )
        if not is_setting or not re.fullmatch(r"--?[A-Za-z][\w.-]*", name):
            continue
        key = name.lstrip("-").replace("-", "_")
        if not separator:
            value = following if following and not following.startswith("-") and "=" not in following else "VALUE"
        raise FewShotError(f"{argument} is not an option; settings are typed without dashes: {key}={value}")


def _check(override: str, following: str, multirun: bool) -> None:
    if "=" not in override and not override.startswith("~"):
        key, colon, value = override.partition(":")
        if not colon:
            value = following if following and "=" not in following else "VALUE"
        raise FewShotError(f"{override} has no value; type {key}={value}")
    key, _, value = override.partition("=")
    if not value and following and "=" not in following:
        raise FewShotError(f"{override} and {following} are two arguments; type {key}={following}, without a space")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise _unparsable(override, error) from error
    sweep = parsed.value()
    if isinstance(sweep, ChoiceSweep) and sweep.simple_form and not multirun:
        raise FewShotError(
            f"{override} has several values: add -m to run one job for each, or quote the value if the comma is part "
            f"of it: {quoted(override)}"
        )


def _unparsable(override: str, error: Exception) -> FewShotError:
    """Return the error for what Hydra's parser cannot read, with a mark where it stopped."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "syntaxError"]
    column = frames[-1].f_locals["column"] if frames else len(override)
    why = str(error).splitlines()[0]
    suggestion = quoted(override)
    try:
        OverridesParser.create().parse_override(shlex.split(suggestion)[0])
        fix = f"; if it is one value, quote it: {suggestion}"
    except HydraException:
        fix = ""
    return FewShotError(f"{override} cannot be parsed{fix}", f"  {override}", f"  {' ' * column}^ {why}")
