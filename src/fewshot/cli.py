"""What every entry point shares: errors a person can act on, and help that shows each key with its comment."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from fewshot.config import CONF
from fewshot.errors import FewShotError

TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user's wish
# What Hydra and OmegaConf add to a message for those who write configuration files.
ASIDES = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Config search path", "provider=")


def run(main: Callable[[], Any]) -> None:
    """Run a Hydra application; a mistake on its command line ends in one clear line and a non-zero exit status.

    Set HYDRA_FULL_ERROR=1 to see the traceback instead.
    """
    if TRACEBACK:
        main()
    else:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them
        _guard(main)


def job(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorate the function that ``hydra.main`` runs, so that its mistakes end in the same way.

    In a sweep they are raised, since the other jobs are to go on.
    """

    @wraps(function)
    def guarded(config: DictConfig) -> Any:
        if TRACEBACK or HydraConfig.get().mode == RunMode.MULTIRUN:
            return function(config)
        os.environ.pop("HYDRA_FULL_ERROR", None)  # processes started from here decide for themselves
        return _guard(lambda: function(config))

    return guarded


def _guard(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's way to end an interrupted training
            _exit("interrupted; the checkpoints so far are kept in the run's directory", 130)
        raise
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise  # a bug, which its traceback tells best
        _exit(message, 1)


def _exit(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _explain(error: BaseException) -> str | None:
    """One line for a mistake of the user's; None for anything else."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, FewShotError):
            return str(cause)
    help_ = f"(see {Path(sys.argv[0]).name} --help)"
    for cause in causes:
        if isinstance(cause, MisconfigurationException):
            return f"{' '.join(str(cause).split())} {help_}"
        if isinstance(cause, OSError) and cause.filename is not None:
            return (
                f"{cause.filename}: {cause.strerror}; make it usable, or name other places with "
                "hydra.run.dir=PATH (results), cache_dir=PATH and data_dir=PATH"
            )
    told = [str(cause) for cause in causes if isinstance(cause, HydraException | OmegaConfBaseException)]
    told += [str(cause) or "an argument is not understood" for cause in causes if _raised_in_hydra(cause)]
    lines = [line.strip() for message in told for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(ASIDES)]
    return f"{' '.join(dict.fromkeys(lines))} {help_}" if told else None


def _raised_in_hydra(error: BaseException) -> bool:
    """Whether Hydra itself stumbled over the command line; not all that it finds has a type of its own."""
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(modules) and modules[-1].startswith(("hydra.core", "hydra._internal"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _help(*, _root_: DictConfig) -> str:
    """The configuration files behind this command line, with the comments that say what each key is for."""
    primary = CONF / f"{_root_.hydra.job.config_name}.yaml"
    shown = [primary.read_text()]
    for entry in OmegaConf.load(primary).defaults:
        group = entry if isinstance(entry, str) else next(iter(entry))
        if not (CONF / group).is_dir():
            continue
        files = {
            path.relative_to(CONF / group).with_suffix("").as_posix(): path for path in (CONF / group).rglob("*.yaml")
        }
        choice = _root_.hydra.runtime.choices[group]
        shown.append(f"# {group}={'|'.join(sorted(files))}")
        if choice in files:
            shown[-1] += f" ... {group}={choice} sets:"
            shown.append(files[choice].read_text())
    return "\n".join(shown).replace("$", "$$")  # Hydra's help is a string.Template


OmegaConf.register_new_resolver("fewshot_help", _help, replace=True)
