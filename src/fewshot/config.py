"""The configuration: its types, its ranges, and how to compose it without the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from fewshot.errors import FewShotError

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"


@dataclass
class Task:
    """The make of an episode."""

    way: int = MISSING
    shot: int = MISSING
    query: int = MISSING


@dataclass
class Training(Task):
    """The ``train`` node."""

    episodes: int = MISSING
    meta_batch: int = MISSING


@dataclass
class Validation:
    """The ``val`` node."""

    episodes: int = MISSING
    every: int = MISSING


@dataclass
class Test:
    """The ``test`` node."""

    episodes: int = MISSING


@dataclass
class TrainConfig(Task):
    """The keys and types of ``conf/train.yaml``, where each one's meaning is told; groups bring their own keys."""

    dataset: Any = MISSING
    method: Any = MISSING
    distance: Any = MISSING
    encoder: Any = MISSING
    hardware: Any = MISSING
    train: Training = field(default_factory=Training)
    val: Validation = field(default_factory=Validation)
    test: Test = field(default_factory=Test)
    seed: int = MISSING
    eval_seed: int = MISSING
    data_dir: str = MISSING
    cache_dir: str = MISSING
    run_dir: str | None = None
    log_every: int = MISSING
    choices: dict[str, str] = MISSING


AT_LEAST = {
    "way": 2,
    "shot": 1,
    "query": 1,
    "train.way": 2,
    "train.shot": 1,
    "train.query": 1,
    "train.episodes": 1,
    "train.meta_batch": 1,
    "val.episodes": 1,
    "val.every": 1,
    "test.episodes": 2,  # an interval needs two
    "seed": 0,
    "eval_seed": 0,
    "log_every": 1,
}


def check(config: DictConfig) -> None:
    """Refuse values out of range before anything slow begins.

    Raises:
        FewShotError: names every such key, and its bound.
    """
    values = {key: OmegaConf.select(config, key) for key in AT_LEAST}
    wrong = [
        f"{key}={values[key]} must be at least {least}"
        for key, least in AT_LEAST.items()
        if not isinstance(values[key], int) or values[key] < least  # an override can take a whole node away
    ]
    if wrong:
        raise FewShotError("; ".join(wrong))


def compose(*overrides: str, name: str = "train") -> DictConfig:
    """The configuration that the command line would run with, for notebooks, tests and other programs.

    Args:
        overrides: as on the command line: "dataset=omniglot", "way=20". ``run_dir`` has no default here.
        name: the file in ``conf``.
    """
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a program may have its own
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose(name, list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
    HydraConfig.instance().set_config(config)  # for the interpolations that name it
    keys = [str(key) for key in config if key != "hydra"]
    return DictConfig(OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True))


ConfigStore.instance().store("train_schema", TrainConfig)
OmegaConf.register_new_resolver("fewshot_root", lambda path: str(ROOT / path), replace=True)
