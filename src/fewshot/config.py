"""The configuration: its types, its ranges, and how to compose it without the command line."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from fewshot.errors import FewShotError, mistake, reason

PACKAGE = Path(__file__).parent
CHECKOUT = (PACKAGE.parents[1] / "conf" / "train.yaml").is_file()  # else the package is installed, conf inside it
ROOT = PACKAGE.parents[1] if CHECKOUT else Path.cwd()  # where outputs and data lie
CONF = (ROOT if CHECKOUT else PACKAGE) / "conf"


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
    steps: int = MISSING
    on_nan: str = MISSING


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
    optimizer: Any = MISSING
    schedule: Any = None
    hardware: Any = MISSING
    train: Training = field(default_factory=Training)
    val: Validation = field(default_factory=Validation)
    test: Test = field(default_factory=Test)
    seed: int = MISSING
    eval_seed: int = MISSING
    data_dir: str = MISSING
    cache_dir: str = MISSING
    run_dir: str | None = None
    trust: Any = field(default_factory=list)
    resume: str | None = None
    checkpoint_every: int = MISSING
    log_every: int = MISSING
    pictures: bool = MISSING
    choices: dict[str, str | None] = MISSING
    given: Any = field(default_factory=list)


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
    "checkpoint_every": 1,
    "log_every": 1,
    "schedule.step_size": 1,
    "schedule.T_max": 1,
    "hardware.num_nodes": 1,
    "hardware.accumulate_grad_batches": 1,
}
NODES = ("dataset", "method", "distance", "encoder", "optimizer", "hardware", "train", "val", "test")
ABOVE_ZERO = ("optimizer.lr",)
# Keys of earlier versions, and what to write today.
RENAMED = {
    "method.learning_rate": "optimizer.lr",
    "method.halve_every": "schedule.step_size, of schedule=halving, in training steps",
    "method.on_nan": "train.on_nan",
}
# What messages call a type, and what fits it.
TYPES: dict[Any, tuple[Any, ...]] = {
    int: ("a whole number", int),
    float: ("a number", int, float),
    bool: ("true or false", bool),
    str: ("a text", str),
    NoneType: ("null", NoneType),
}
ONE_OF = {
    "train.on_nan": ("stop", "skip"),
    "dataset.normalise": ("range", "standardise", "plain"),
    "dataset.channels": (1, 3),
}


def check(config: DictConfig) -> None:
    """Refuse values of a wrong type or out of range before anything slow begins.

    The keys of a group are held to the types of the function or class that its ``_target_`` names, and those of
    ``hardware`` to Lightning's trainer. What an encoder, a distance or a method refuses beyond that shows when it is
    made; where something else is wrong, it is named at once.

    Raises:
        FewShotError: names every such key, and what it must be.
    """
    absent = [key for key in NODES if not OmegaConf.is_dict(OmegaConf.select(config, key))]
    if absent:
        raise FewShotError(f"the configuration has no {', '.join(absent)}; leave out the override that takes it away")
    from pytorch_lightning import Trainer  # noqa: PLC0415

    hardware = {key: value for key, value in config.hardware.items() if key != "compile"}
    wrong = [
        line for key, node in _targets(config) for line in _wrong_types(key, node, import_target(key, node._target_))
    ]
    wrong += _wrong_types("hardware", hardware, Trainer)
    if not isinstance(config.hardware.compile, bool):
        wrong.append(f"hardware.compile={config.hardware.compile} must be true or false")
    values = {key: OmegaConf.select(config, key) for key in (*AT_LEAST, *ABOVE_ZERO, *ONE_OF)}
    for key, least in AT_LEAST.items():
        whole = _fits(values[key], int)
        if values[key] < least if whole else not key.startswith("schedule."):  # some schedules have other keys
            wrong.append(f"{key}={values[key]} must be at least {least}")
    for key in ABOVE_ZERO:
        if _fits(values[key], float) and not values[key] > 0:
            wrong.append(f"{key}={values[key]} must be positive")
    wrong += [f"{key}={values[key]} must be {_or(among)}" for key, among in ONE_OF.items() if values[key] not in among]
    wrong = wrong or [*_wrong_updates(config)]
    if wrong:
        raise FewShotError("; ".join(dict.fromkeys([*wrong, *refusals(config)])))


def refusals(config: DictConfig) -> list[str]:
    """What the encoder, the distance and the method refuse of their settings, for a message."""
    import torch  # noqa: PLC0415

    from fewshot.checkpoints import without_initial_weights  # noqa: PLC0415

    refused: list[str] = []
    encoder, method = ({**config[part]} for part in ("encoder", "method"))
    for node in (without_initial_weights({"encoder": encoder})["encoder"], config.distance, method):
        if node is method and refused:
            break  # it is made of the other two
        try:
            with torch.device("meta"):  # weights that take no time and no memory
                instantiate(without_initial_weights(node))
        except Exception as error:  # what is no refusal shows when the part is made in earnest
            refused += [str(found) for found in [mistake(error)] if found is not None]
    return refused


def outdated(config: Mapping[Any, Any]) -> str | None:
    """A key by which a configuration, of a checkpoint say, is of an earlier version; None if it has none."""
    for key in RENAMED:
        node, _, name = key.partition(".")
        section = config.get(node)
        if isinstance(section, dict) and name in section:
            return key
    return None


def check_types(key: str, node: DictConfig) -> None:
    """Hold the keys of a node to the types of the function that its ``_target_`` names.

    Raises:
        FewShotError: names every key of a wrong type, and what it must be.
    """
    wrong = list(_wrong_types(key, node, import_target(key, node._target_)))
    if wrong:
        raise FewShotError("; ".join(wrong))


def _targets(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """The nodes that Hydra makes an object from, by their keys; those that stand inside of another only once."""
    for key, value in node.items():
        if isinstance(value, DictConfig) and (prefix != "method." or "_target_" not in value):
            if "_target_" in value:
                yield f"{prefix}{key!s}", value
            yield from _targets(value, f"{prefix}{key!s}.")


def _wrong_types(prefix: str, settings: Mapping[Any, Any], target: Callable[..., Any]) -> Iterator[str]:
    """What a function has no parameter for, or one of another type; where it does not say, it is left to refuse."""
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        parameters, hints = signature(function).parameters, get_type_hints(function)
    except (NameError, TypeError, ValueError):  # of another language, or typed by names that it does not import
        return
    open_ended = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in settings.items():
        options = _options(hints.get(key, Any))
        if key not in parameters and not str(key).startswith("_") and not open_ended:
            yield f"{prefix}.{key} is not a setting of {target.__name__}"
        elif options and not OmegaConf.is_dict(value) and not any(_fits(value, option) for option in options):
            yield f"{prefix}.{key}={value} must be {_or(TYPES.get(option, [option])[0] for option in options)}"


def _or(choices: Iterable[Any]) -> str:
    return " or ".join(dict.fromkeys(map(str, choices)))


def _options(hint: Any) -> list[Any]:
    """The types, and of a ``Literal`` the values, that a hint allows a configuration; no YAML holds a tensor."""
    if get_origin(hint) in (Union, UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [*get_args(hint)] if get_origin(hint) is Literal else [hint] if hint.__module__ != "torch" else []


def _fits(value: Any, option: Any) -> bool:
    """Whether a value is of a type, or is that value; types that no YAML has are not checked."""
    if get_origin(option) is list:
        return OmegaConf.is_list(value) and all(
            any(_fits(of, to) for to in _options(*get_args(option))) for of in value
        )
    if option in TYPES:
        return type(value) in TYPES[option]
    return value == option if isinstance(option, int | str) else True


def _wrong_updates(config: DictConfig) -> Iterator[str]:
    """What PyTorch refuses of the optimizer and the schedule."""
    import torch  # noqa: PLC0415

    updated: Any = [torch.nn.Parameter(torch.zeros(1))]
    for part in ("optimizer", "schedule"):
        if config[part] is not None:
            try:
                updated = instantiate(config[part])(updated)
            except (TypeError, ValueError) as error:
                yield f"{part}={config.choices[part]}: {reason(error)}"
                return


def command(name: str) -> str:
    """How to call a command, for messages."""
    return f"python {ROOT / 'src' / name}.py" if CHECKOUT else f"fewshot {name}"


def import_target(key: str, name: str) -> Any:
    """What a ``_target_`` names.

    Args:
        key: of the node that it stands in, for messages.
        name: with dots.

    Raises:
        FewShotError: it cannot be imported.
    """
    try:
        return get_object(name)
    except Exception as error:  # whatever the module raises
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise FewShotError(
            f"{key}._target_={name} cannot be imported: {root}; correct the name, or install its package, or put the "
            "folder that holds it on PYTHONPATH"
        ) from error


def search_path(*places: str) -> list[ConfigSource]:
    """Where the configuration of this command comes from: ``conf``, ``--config-dir``, ``hydra.searchpath``, plugins.

    Args:
        places: more of them, as ``hydra.searchpath`` names them.

    Returns:
        Those that exist; of files of one name Hydra takes the first.
    """
    in_use = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    found = [source_at(f"{one.schema}://{one.path}") for one in in_use]
    found += [source_at(place) for place in (*places, str(CONF))]
    return list({source.full_path(): source for source in found if source.available()}.values())


def source_at(place: str) -> ConfigSource:
    """A place that configuration files come from: a directory, or ``pkg://PACKAGE``; it need not exist.

    Raises:
        HydraException: Hydra knows no such kind of places.
    """
    Plugins.instance()  # brings the kinds
    scheme, separator, path = place.partition("://")
    if not separator:
        scheme, path = "file", place
    path = os.path.realpath(path) if scheme == "file" else path
    return SourcesRegistry.instance().resolve(scheme)("search path", f"{scheme}://{path}")


def options(source: ConfigSource, group: str, below: str = "") -> Iterator[str]:
    """The files of a group in one place of the search path, by the names that choose them."""
    here = f"{group}/{below}".rstrip("/")
    if source.is_group(here):
        yield from (f"{below}{name}" for name in source.list(here, ObjectType.CONFIG))
        for folder in source.list(here, ObjectType.GROUP):
            yield from options(source, group, f"{below}{folder}/")


def is_group(name: str, *places: str) -> bool:
    """Whether there are files to choose from under this name; ``places`` as for ``search_path``."""
    return any(source.is_group(name) for source in search_path(*places))


def compose(*overrides: str, name: str = "train") -> DictConfig:
    """The configuration that the command line would run with, for notebooks, tests and other programs.

    A program that runs under Hydra itself keeps its own configuration.

    Args:
        overrides: as on the command line: "dataset=omniglot", "way=20". Without "run_dir=PATH", ``train`` makes a new
            directory.
        name: the file in ``conf``.
    """
    config = compose_unresolved(*overrides, name=name)
    hydra_config = HydraConfig.instance()
    outer = hydra_config.cfg
    try:
        hydra_config.set_config(config)  # for the interpolations that name it
        keys = [str(key) for key in config if key != "hydra"]
        return DictConfig(OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True))
    finally:
        hydra_config.cfg = outer


def compose_unresolved(*overrides: str, name: str = "train", places: Sequence[str] = ()) -> DictConfig:
    """The same with Hydra's own node, interpolations left as they are; ``places`` as for ``search_path``."""
    if places:
        quoted = (QuotedString(place, Quote.single).with_quotes() for place in places)
        overrides = (f"hydra.searchpath=[{','.join(quoted)}]", *overrides)
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a program may have its own
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(name, list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer


def training_steps(episodes: int, meta_batch: int) -> int:
    """The training steps that so many training episodes take, ``meta_batch`` in each; the last may have fewer."""
    return max(1, -(-episodes // max(1, meta_batch)))


def _experiment() -> str | None:
    """The file below conf/experiment, chosen as experiment=FOLDER/NAME or as +experiment/FOLDER=NAME."""
    for group, option in HydraConfig.get().runtime.choices.items():
        if option is not None and f"{group}/".startswith("experiment/"):
            return f"{group}/{option}".removeprefix("experiment/")
    return None


def _output_dir() -> str | None:
    """The directory of the run that the command line started; None where none did."""
    runtime = HydraConfig.get().runtime
    return None if OmegaConf.is_missing(runtime, "output_dir") else str(runtime.output_dir)


def _given() -> list[str]:
    """The keys and groups of the overrides."""
    parsed = OverridesParser.create().parse_overrides([*HydraConfig.get().overrides.task])
    return [override.key_or_group for override in parsed]


ConfigStore.instance().store("train_schema", TrainConfig)
RESOLVERS: dict[str, Callable[..., Any]] = {
    # What a key of an experiment is at each budget: ${by_budget:{paper:1000,cpu:10}}.
    "by_budget": lambda values, *, _root_: values[_root_.choices.budget],
    "fewshot_experiment": _experiment,
    "fewshot_given": _given,
    "fewshot_output_dir": _output_dir,
    # A resumed run keeps the record of how it was started.
    "fewshot_output_subdir": lambda resume: ".hydra" if resume in (None, "auto") else None,
    "fewshot_root": lambda path: str(ROOT / path),
    "fewshot_run_dir": lambda resume, new: new if resume in (None, "auto") else resume,
    "fewshot_steps": training_steps,
}
for name, resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(name, resolver, replace=True)  # the module may be loaded again
