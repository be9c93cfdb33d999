"""The configuration: types, ranges, and how to compose it without the command line."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from inspect import Parameter, signature
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import hydra
from annotated_types import Ge, Gt, Le, Lt, MinLen
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigSource
from hydra.utils import get_object, instantiate
from omegaconf import MISSING, DictConfig, Node, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError

from fewshot.checks import Count, Natural, Positive, misfits, refuse
from fewshot.directories import is_taken
from fewshot.errors import FewShotError, causes, mistake, nearest, reason
from fewshot.paths import CHECKOUT, CONF, ROOT, run_directory

FOR_TRAINING = ("optimizer", "schedule", "train")  # a method chosen for another command may set these
SWEPT = "FEWSHOT_SWEPT"  # environment variable: the keys that a sweep varies, for its jobs


@dataclass
class Task:
    """The size of an episode."""

    way: Annotated[int, Ge(2)] = MISSING
    shot: Count = MISSING
    query: Count = MISSING


@dataclass
class Training(Task):
    """The ``train`` node."""

    episodes: Count = MISSING
    meta_batch: Count = MISSING
    batch_size: int | None = None
    also_on: str | None = None
    steps: int = MISSING
    on_nan: str = MISSING


@dataclass
class Validation:
    """The ``val`` node."""

    episodes: Count = MISSING
    every: Count = MISSING


@dataclass
class Test:
    """The ``test`` node."""

    episodes: Annotated[int, Ge(2)] = MISSING  # an interval needs two


@dataclass
class TrainConfig(Task):
    """The keys and types of ``conf/train.yaml``, which explains each key; groups add their own keys."""

    dataset: Any = MISSING
    method: Any = MISSING
    distance: Any = MISSING
    encoder: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = None
    transform: Any = None
    hardware: Any = MISSING
    logger: Any = None
    callbacks: Any = None
    train: Training = field(default_factory=Training)
    val: Validation = field(default_factory=Validation)
    test: Test = field(default_factory=Test)
    name: str | None = None  # checkpoints of an earlier version have none
    seed: Annotated[int, Ge(0), Lt(2**32)] = MISSING  # NumPy's limit
    eval_seed: Natural = MISSING
    mirror: bool | None = None
    data_dir: str = MISSING
    cache_dir: str = MISSING
    run_dir: str | None = None
    trust: Any = field(default_factory=list)
    resume: str | None = None
    checkpoint_every: Count = MISSING
    log_every: Count = MISSING
    pictures: bool = MISSING
    overrides: list[str] = field(default_factory=list)
    choices: dict[str, str | None] = MISSING


# Types of keys that OmegaConf has none for, or that no constructor takes; and of those that PyTorch's and Lightning's
# constructors take, but no training can use.
TYPES: dict[str, Any] = {
    "train.also_on": None | Literal["val"],
    "train.on_nan": Literal["stop", "skip"],
    "dataset.size": Count,
    "dataset.channels": Literal[1, 3],
    "dataset.normalise": Literal["range", "standardise", "plain"],
    "encoder.init": Annotated[str, MinLen(1), "the directory of a run, a checkpoint"] | None,
    "optimizer.lr": Annotated[float, Gt(0), Le(1_000_000)],  # far below the largest float32, optimizers overflow
    "schedule.gamma": Positive,
    "schedule.step_size": Count,
    "schedule.T_max": Count,
    "schedule.eta_min": Annotated[float, Ge(0)],
    "hardware.compile": bool,
    "hardware.num_nodes": Count,
    "hardware.accumulate_grad_batches": Count,
}
# What every configuration has, and Lightning's part in it.
PARTS = ("dataset.source", "method", "distance", "encoder", "optimizer")
NODES = (
    *("hardware.accelerator", "hardware.precision", "hardware.compile"),
    *("train.episodes", "val.episodes", "test.episodes"),
)
TARGETS = {"hardware": "pytorch_lightning.Trainer"}
MADE_OF = {"method": ("encoder", "distance"), "schedule": ("optimizer",)}
OURS = ("encoder.init", "hardware.compile")  # settings that no constructor takes
# Keys of earlier versions, and what to write today.
RENAMED = {
    "method.learning_rate": "optimizer.lr",
    "method.halve_every": "schedule.step_size, of schedule=halving, in training steps",
    "method.on_nan": "train.on_nan",
    "lines": "rows, of fewshot reproduce",
}
# Until version 0.2, each task had an experiment of its own: omniglot/protonet_20way_1shot.
OF_ONE_TASK = re.compile(r"((?:\w+/)?\w+)_(\d+)way_(\d+)shot")


def check(config: DictConfig) -> None:
    """Reject values of a wrong type or out of range before anything slow begins.

    Raises:
        FewShotError: names every wrong key, and what it must be.
    """
    missing = [key for key in PARTS if OmegaConf.select(config, f"{key}._target_") is None]
    missing += [key for key in NODES if OmegaConf.select(config, key) is None]
    if missing:
        raise FewShotError(f"the configuration has no {', '.join(missing)}; leave out the override that removes it")
    unset = sorted(OmegaConf.missing_keys(config))
    if unset:
        raise FewShotError(f"{' and '.join(unset)} must be set: {unset[0]}=VALUE")
    config = with_classes(config)
    refuse([*wrong_settings(config, TrainConfig), *_shadowed(config.choices)])
    refuse(_refused(config))


def wrong_settings(settings: Mapping[Any, Any], target: Any = None, prefix: str = "") -> Iterator[str]:
    """Yield a line for each setting that is not of the type that ``TYPES`` or a signature has for it.

    Args:
        settings: those of nodes with a ``_target_`` are compared with the signature of what it names.
        target: the function or class that takes the settings; None: any.
        prefix: of their keys.
    """
    parameters: Mapping[str, Parameter] = {}
    hints: Mapping[str, Any] = {}
    # Suppressed: it is written in C, or names types for type checkers alone.
    with suppress(AttributeError, NameError, TypeError, ValueError):
        parameters = signature(target).parameters
        takes: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        hints = get_type_hints(takes, include_extras=True)
    open_ended = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    open_ended |= not parameters or is_dataclass(target)  # whose users may add keys, for interpolations
    for key, value in settings.items():
        name = f"{prefix}{key}"
        hint = TYPES.get(name, hints.get(key))
        if str(key).startswith("_") or f"{name}={value}" == "hardware.precision=auto":  # ours; see fewshot.hardware
            continue
        if name in TARGETS or (OmegaConf.is_dict(value) and "_target_" in value):
            if prefix != "method.":  # it repeats the encoder and the distance
                below = import_target(name, value.get("_target_", TARGETS.get(name)))
                yield from wrong_settings(value, below, f"{name}.")
        elif not open_ended and key not in parameters and name not in OURS:
            called = getattr(target, "__name__", target)
            yield f"{name} is not a setting of {called}{nearest(str(key), parameters)}"
        elif OmegaConf.is_dict(value) and (hint in (None, Any) or is_dataclass(hint)):
            yield from wrong_settings(value, hint if is_dataclass(hint) else None, f"{name}.")
        elif hint is not None:
            yield from misfits({name: value}, {name: hint})


def _refused(config: DictConfig) -> Iterator[str]:
    """Yield what constructors refuse. They are called on the meta device, where they allocate and read no weights."""
    import torch  # noqa: PLC0415

    parts: Any = OmegaConf.to_container(config)
    parts["method"] = without_initial_weights(parts["method"])
    parts["encoder"] = without_initial_weights(parts)["encoder"]
    made: Any = [torch.nn.Parameter(torch.zeros(1))]
    failed: set[str] = set()
    for part in ("transform", "encoder", "distance", "method", "optimizer", "schedule"):
        if not failed.isdisjoint(MADE_OF.get(part, ())):
            continue
        try:
            with torch.device("meta"):
                new = instantiate(parts[part])
            if part in ("optimizer", "schedule") and new is not None:
                made = new(made)
        except Exception as error:
            known, cause = mistake(error), [*causes(error)][-1]
            if known is None and not isinstance(cause, TypeError | ValueError):
                raise
            failed.add(part)
            yield str(known or f"{part}={config.choices[part]}: {reason(cause)}")


def trains_on(config: DictConfig) -> str:
    """Return what the configured method trains on, "episodes", "classes" or "nothing"; see ``FewShotMethod``.

    Raises:
        FewShotError: the method cannot be imported, or trains on something else.
    """
    name = OmegaConf.select(config, "method._target_")
    kind = "episodes" if name is None else getattr(import_target("method", name), "trains_on", "episodes")
    if kind not in ("episodes", "classes", "nothing"):
        raise FewShotError(f"{name}.trains_on is {kind!r}, and must be 'episodes', 'classes' or 'nothing'")
    return str(kind)


def with_classes(config: DictConfig, classes: int | None = None) -> DictConfig:
    """Add the number of training classes to the configuration, if its method trains on classes and takes it.

    Args:
        config: the composed ``conf/train.yaml``.
        classes: the number in the data; None: they are not read yet, and any number serves to check the rest.

    Raises:
        FewShotError: the configuration already has a different number.
    """
    if trains_on(config) != "classes":
        return config
    if "classes" not in signature(import_target("method", config.method._target_)).parameters:
        return config
    configured = config.method.get("classes")
    if classes is None:
        classes = 2 if configured is None else configured
    if configured not in (None, classes):
        raise FewShotError(f"method.classes={configured}: the data have {classes} training classes; leave it out")
    config = config.copy()
    OmegaConf.update(config, "method.classes", classes, force_add=True)
    return config


def without_initial_weights(method: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the configuration of a method without initial weights of its encoder: a checkpoint provides them."""
    encoder = method.get("encoder")
    if not isinstance(encoder, Mapping) or "_target_" not in encoder:
        return {**method}
    encoder = {key: value for key, value in encoder.items() if key != "init"}
    settings = getattr(import_target("method.encoder", encoder["_target_"]), "WITHOUT_WEIGHTS", {})
    return {**method, "encoder": {**encoder, **settings}}


def brings_weights(method: Mapping[Any, Any]) -> bool | None:
    """Whether the encoder of a method loads weights that were trained elsewhere, or could and is random.

    Returns:
        None if it cannot load weights: it has no ``WITHOUT_WEIGHTS``, see ``fewshot.encoders``.
    """
    encoder = method.get("encoder")
    if not isinstance(encoder, Mapping) or "_target_" not in encoder:
        return None
    if not hasattr(import_target("method.encoder", encoder["_target_"]), "WITHOUT_WEIGHTS"):
        return None
    choices = [encoder[key] for key in ("file", "weights", "pretrained") if key in encoder]
    return not choices or any(choices)


def command(name: str) -> str:
    """Return how to call a command, for messages."""
    return f"python {ROOT / 'src' / name}.py" if CHECKOUT else f"fewshot {name}"


def import_target(key: str, name: str) -> Any:
    """Import what a ``_target_`` names.

    Args:
        key: the node that contains it, for messages.
        name: a dotted name.

    Raises:
        FewShotError: it cannot be imported.
    """
    try:
        return get_object(name)
    except Exception as error:  # a module may raise anything
        raise FewShotError(
            f"{key}._target_={name} cannot be imported: {[*causes(error)][-1]}; correct the name, install its package, "
            "or add its directory to PYTHONPATH"
        ) from error


def search_path(*places: str) -> list[ConfigSource]:
    """Return the sources of this command's configuration: ``conf``, ``--config-dir``, ``hydra.searchpath``, plugins.

    Args:
        places: additional ones, as in ``hydra.searchpath``.

    Returns:
        Those that exist; of several files with one name, Hydra uses the first.
    """
    in_use = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    sources = [source_at(f"{source.schema}://{source.path}") for source in in_use]
    sources += [source_at(place) for place in (*places, str(CONF))]
    return list({source.full_path(): source for source in sources if source.available()}.values())


def _shadowed(choices: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each choice that several sources offer, since Hydra reads the first one silently."""
    sources = search_path()
    for group, option in choices.items():
        offered = [source.full_path() for source in sources if source.is_config(f"{group}/{option}")]
        if len(offered) > 1:
            yield f"{group}={option} is in {' and in '.join(offered)}, and only the first is read; rename yours"


def places_in(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the sources that a command line adds to the search path, even if it cannot be composed."""
    yield from option_values(arguments, "--config-dir", "-cd")
    for argument in arguments:
        if argument.startswith("hydra.searchpath="):
            value = OverridesParser.create().parse_override(argument).value()
            yield from map(str, value if isinstance(value, list) else [value])


def option_values(arguments: Sequence[str], *names: str) -> Iterator[str]:
    """Yield the values of an option on a command line: ``--name VALUE`` or ``--name=VALUE``."""
    for argument, following in pairwise([*arguments, ""]):
        name, separator, value = argument.partition("=")
        if name in names:
            yield value if separator else following


def source_at(name: str) -> ConfigSource:
    """Return a source of configuration files: a directory, or ``pkg://PACKAGE``; it need not exist.

    Raises:
        HydraException: Hydra does not know the scheme.
    """
    Plugins.instance()  # registers the schemes
    scheme, separator, path = name.partition("://")
    if not separator:
        scheme, path = "file", name
    path = os.path.realpath(path) if scheme == "file" else path
    return SourcesRegistry.instance().resolve(scheme)("search path", f"{scheme}://{path}")


def options(source: ConfigSource, group: str, below: str = "") -> Iterator[str]:
    """Yield the options of a group in one source of the search path."""
    here = f"{group}/{below}".rstrip("/")
    if source.is_group(here):
        yield from (f"{below}{name}" for name in source.list(here, ObjectType.CONFIG))
        for folder in source.list(here, ObjectType.GROUP):
            yield from options(source, group, f"{below}{folder}/")


def is_group(name: str, *places: str) -> bool:
    """Whether a configuration group has this name; ``places`` as for ``search_path``."""
    return any(source.is_group(name) for source in search_path(*places))


def current_names(arguments: Sequence[str], *places: str) -> list[str]:
    """Replace experiments of one task, which earlier versions had; the task is now ``way`` and ``shot``.

    Args:
        arguments: of a command line; ``experiment=omniglot/protonet_20way_1shot`` becomes ``way=20``, ``shot=1`` and
            ``experiment=omniglot/protonet``, unless the user's configuration has one of that name. A sweep over some
            becomes one over their tasks, unless that would have more jobs.
        places: additions to the search path, see ``search_path``.
    """
    current: list[str] = []
    typed = {argument.partition("=")[0] for argument in arguments}
    for argument in arguments:
        key, _, value = argument.partition("=")
        group, names = key.lstrip("+"), value.split(",")
        tasks = [match.groups() for match in map(OF_ONE_TASK.fullmatch, names) if match]
        columns = [list(dict.fromkeys(column)) for column in zip(*tasks, strict=True)]
        if (
            group.partition("/")[0] != "experiment"
            or not len(tasks) == len(names) == prod(map(len, columns))
            or not all((CONF / group / f"{old}.yaml").is_file() for old in columns[0])
            or any(
                place.is_config(f"{group}/{name}")
                for place in search_path(*places, *places_in(arguments))
                for name in names
            )
        ):
            current.append(argument)
            continue
        rows, ways, shots = map(",".join, columns)
        current += [f"{name}={sizes}" for name, sizes in (("way", ways), ("shot", shots)) if name not in typed]
        current.append(f"{key}={rows}")
    return current


def compose(*overrides: str, name: str = "train", places: Sequence[str] = ()) -> DictConfig:
    """Compose the configuration that the command line would use, for notebooks, tests and other programs.

    Args:
        overrides: as on the command line: "dataset=omniglot", "way=20". ``run_dir`` is null unless given.
        name: the file in ``conf``.
        places: additions to the search path, see ``search_path``.

    Raises:
        FewShotError: a value depends on a missing key.
        HydraException: an override is wrong.
    """
    config = compose_unresolved(*current_names(overrides, *places), name=name, places=places)
    hydra_config = HydraConfig.instance()
    outer = hydra_config.cfg  # set if this program runs under Hydra
    try:
        hydra_config.set_config(config)  # for interpolations that refer to it
        left_out = ("hydra",) if name in ("train", "reproduce") else ("hydra", *FOR_TRAINING)
        keys = [str(key) for key in config if key not in left_out]
        try:
            resolved = DictConfig(OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True))
        except InterpolationKeyError as error:
            raise FewShotError(
                f"{error.full_key} depends on a key that {name}.yaml does not have: {reason(error)}"
            ) from error
        resolve(resolved)
        if resolved.get("run_dir", "") is None:  # these may refer to it, and train will set it
            resolved.merge_with(OmegaConf.masked_copy(config, ["logger", "callbacks"]))
        return resolved
    finally:
        hydra_config.cfg = outer


def resolve(config: DictConfig) -> None:
    """Resolve all interpolations in place.

    ``encoder.init`` then remains in ``encoder`` only: the encoder in ``method`` takes no such argument.
    """
    OmegaConf.resolve(config)
    encoder = OmegaConf.select(config, "method.encoder")
    if isinstance(encoder, DictConfig):
        with open_dict(encoder):
            encoder.pop("init", None)


def as_overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Turn settings into overrides: ``{"way": 5, "train": {"episodes": 9}}`` is way=5 and train.episodes=9."""
    overrides = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            overrides += as_overrides(value, f"{prefix}{key}.")
        else:
            overrides.append(f"{prefix}{key}={_as_value(value)}")
    return overrides


def _as_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_as_value, value))}]"
    if isinstance(value, str | os.PathLike):
        return QuotedString(os.fspath(value), Quote.single).with_quotes()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def compose_unresolved(*overrides: str, name: str = "train", places: Sequence[str] = ()) -> DictConfig:
    """Compose without resolving interpolations, including Hydra's own node; ``places`` as for ``search_path``."""
    sources = create_config_search_path(str(CONF))
    for place in places:
        source = source_at(place)
        sources.prepend("command-line", f"{source.scheme()}://{source.path}", anchor="schema")
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a program may use Hydra itself
    try:
        version.setbase("1.3")
        Hydra.create_main_hydra2("fewshot", sources)
        return hydra.compose(name, list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer


def run_name(config: DictConfig) -> str:
    """Return a name for a run in dashboards: method, distance, way, shot and seed, and what else a sweep varies.

    TensorBoard wraps names at hyphens only.
    """
    method = config.get("method")
    distance = config.choices.distance if OmegaConf.is_dict(method) and "distance" in method else None
    shown = {"method": config.choices.method, "distance": distance}
    shown |= {"way": f"{config.way}way", "shot": f"{config.shot}shot", "seed": f"seed{config.seed}"}
    swept = os.environ.get(SWEPT, "").split(",")
    for override in config.overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if key in swept:
            shown.setdefault(key, f"{key.rpartition('.')[2]}={value}".replace("/", "-"))
    return "-".join(str(part) for part in shown.values() if part is not None)


def training_steps(episodes: int, meta_batch: int) -> int:
    """Return the number of training steps for ``episodes``, ``meta_batch`` in each; the last may have fewer."""
    return max(1, -(-episodes // max(1, meta_batch)))


def _experiment() -> str | None:
    """Return the file below conf/experiment, chosen as experiment=FOLDER/NAME or as +experiment/FOLDER=NAME."""
    for group, option in HydraConfig.get().runtime.choices.items():
        if option is not None and f"{group}/".startswith("experiment/"):
            return f"{group}/{option}".removeprefix("experiment/")
    return None


def _by(values: Mapping[str, Any], *, _node_: Node, _root_: DictConfig) -> Any:
    """Return a setting that depends on the budget, the task or the method: the last value whose conditions hold.

    ``${by:{5way:1,20way:5,cpu 20way:3}}`` is 5 in 20-way, and 3 if the budget is cpu as well.
    """
    choices = HydraConfig.get().runtime.choices
    budget, method = choices.get("budget"), choices.get("method")
    holding = {str(budget), str(method), f"{_root_.way}way", f"{_root_.shot}shot"}
    fitting = [value for conditions, value in values.items() if holding.issuperset(str(conditions).split())]
    if not fitting:
        key = _node_._get_full_key(None)
        chosen = {"way": _root_.way, "shot": _root_.shot, "budget": budget, "method": method}
        here = " ".join(f"{name}={value}" for name, value in chosen.items() if value is not None)
        raise FewShotError(f"{key} has a value for {', '.join(map(str, values))}, not for {here}; set {key}=VALUE")
    return fitting[-1]


def _run_dir(resume: str | None, new: str) -> str:
    if resume in (None, "auto"):
        return new
    directory = run_directory(resume)
    if not Path(directory).is_dir():  # Hydra would create it
        raise FewShotError(
            f"there is no {directory} to resume; name the directory of a run, or start one without resume"
        )
    return directory


def _output_subdir(resume: str | None, output_dir: str) -> str | None:
    """Return where Hydra records how a run was started; None keeps the record of an existing run."""
    return None if resume not in (None, "auto") or is_taken(Path(output_dir)) else ".hydra"


ConfigStore.instance().store("train_schema", TrainConfig)
OmegaConf.register_new_resolver("fewshot_name", lambda *, _root_: run_name(_root_), replace=True)
OmegaConf.register_new_resolver("fewshot_steps", training_steps, replace=True)
OmegaConf.register_new_resolver("fewshot_experiment", _experiment, replace=True)
OmegaConf.register_new_resolver("by", _by, replace=True)
OmegaConf.register_new_resolver("fewshot_root", lambda path: str(ROOT / path), replace=True)
OmegaConf.register_new_resolver("fewshot_run_dir", _run_dir, replace=True)
OmegaConf.register_new_resolver("fewshot_output_subdir", _output_subdir, replace=True)
