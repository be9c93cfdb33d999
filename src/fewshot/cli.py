"""What every entry point shares: errors a person can act on, and help that shows each key with its comment."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewshot.errors import FewShotError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


def run(main: Callable[[], Any]) -> None:
    """Run a Hydra application; a mistake of the user's ends in one clear line and a non-zero exit status.

    Set HYDRA_FULL_ERROR=1 to see the traceback instead.
    """
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them over several lines
    try:
        main()
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except Exception as error:
        _exit(_explain(error), 1)


def _explain(error: BaseException) -> str:
    """One line for a mistake of the user's; an error that is none of these is a bug, and is raised again."""
    for cause in _causes(error):
        if isinstance(cause, FewShotError):
            return str(cause)
    for cause in _causes(error):
        if isinstance(cause, HydraException | OmegaConfBaseException) and str(cause):
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
            told = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type="))]
            return " ".join([*told, f"(see {Path(sys.argv[0]).name} --help)"])
        if isinstance(cause, OSError) and cause.filename is not None:
            return (
                f"{cause.filename}: {cause.strerror}; make it usable, or name other places with "
                "hydra.run.dir=PATH (results), cache_dir=PATH and data_dir=PATH"
            )
    raise error


def _causes(error: BaseException | None) -> list[BaseException]:
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__
    return causes


def _exit(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _help(*, _root_: DictConfig) -> str:
    """The configuration files behind this command line, with the comments that say what each key is for."""
    primary = CONF / f"{_root_.hydra.job.config_name}.yaml"
    shown = [primary.read_text()]
    for entry in yaml.safe_load(primary.read_text())["defaults"]:
        if isinstance(entry, dict):
            group = next(iter(entry)).removeprefix("optional ").removeprefix("override ")
            options = sorted(p.relative_to(CONF / group).with_suffix("").as_posix() for p in (CONF / group).rglob("*.yaml"))
            choice = OmegaConf.select(_root_, "hydra.runtime.choices").get(group)
            shown.append(f"# {group}={'|'.join(options)}; shown: {choice}")
            if choice:
                shown.append((CONF / group / f"{choice}.yaml").read_text())
    return "\n".join(shown).replace("$", "$$")  # Hydra's help is a string.Template


OmegaConf.register_new_resolver("fewshot_root", lambda path: str(ROOT / path), replace=True)
OmegaConf.register_new_resolver("fewshot_help", _help, replace=True)
