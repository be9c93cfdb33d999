"""One rule for every path in a configuration: it starts at the directory that the command was typed in, or at ``~``."""

import os
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).parent
CHECKOUT = (PACKAGE.parents[1] / "conf" / "train.yaml").is_file()  # else installed, with conf inside the package
ROOT = PACKAGE.parents[1] if CHECKOUT else Path.cwd()  # the parent of outputs and data
CONF = (ROOT if CHECKOUT else PACKAGE) / "conf"
# Keys that hold a path or a list of paths, in any of the commands.
PATHS = (
    *("data_dir", "cache_dir", "resume", "checkpoint", "against", "model", "support", "query", "out", "readme"),
    *("run", "runs", "reference", "encoder.init", "encoder.file", "dataset.source.data_dir"),
)
WORDS = ("auto", "newest")  # values of these keys that are not paths
CHECKPOINTS = ("checkpoint", "against", "encoder.init")  # those that may name a model instead


def install(extra: str) -> str:
    """Return the command that installs an extra of this package, for messages."""
    return f"pip install -e '.[{extra}]'" if CHECKOUT else f"pip install 'fewshot[{extra}]'"


def absolute(path: str) -> str:
    """Return an absolute path; links in it are kept."""
    start = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else Path.cwd()
    return str(Path(start, Path(path).expanduser()))


def make_absolute(config: DictConfig, is_model: Callable[[str], bool]) -> None:
    """Make the paths in a configuration absolute, in place: a job may run in another directory (hydra.job.chdir).

    Args:
        config: the composed configuration of a command.
        is_model: whether a checkpoint is the name of a model, which is kept.
    """
    for key in PATHS:
        try:
            value = OmegaConf.select(config, key)
        except OmegaConfBaseException:  # it depends on what is missing, which is reported later
            continue
        if isinstance(value, str) and key in CHECKPOINTS and is_model(value):
            continue
        if isinstance(value, str) and value and value not in WORDS:
            changed: str | list[str] = absolute(value)
        elif OmegaConf.is_list(value) and all(isinstance(item, str) for item in value):
            changed = [absolute(item) for item in value]
        else:
            continue
        with open_dict(config):
            OmegaConf.update(config, key, changed)


def environment(name: str, default: object) -> str:
    """Return an environment variable; an empty one counts as unset."""
    return os.environ.get(name) or str(default)


def run_directory(path: str) -> str:
    """Return the run directory that a path names: itself, its ``checkpoints``, or a file of weights in one of these."""
    named = Path(path).expanduser()
    folder = named.parent if named.suffix in (".ckpt", ".safetensors") or named.is_file() else named
    return str(folder.parent if folder.name == "checkpoints" else folder)


OmegaConf.register_new_resolver("fewshot_env", environment, replace=True)
