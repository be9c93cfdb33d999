"""Untrusted configurations: they hold plain data, and name only code that the user has chosen.

A configuration in a file is copied into new mappings and lists. The copy is what is checked and later instantiated, so
nothing can change between check and use. No string in it is ever resolved or parsed.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewshot.checks import fits
from fewshot.config import RENAMED, TYPES, TrainConfig, compose_unresolved, import_target, options, search_path
from fewshot.errors import FewShotError, reason

MAX_NODES = 10_000  # mappings, lists and values of a configuration; ours have about 100
MAX_CHARACTERS = 100_000  # in all its strings
MAX_DEPTH = 32  # mappings within mappings
# Values that could exhaust memory, disk or time although the file's tensors are small.
MAX_VALUES = {
    "dataset.size": 1024,
    "dataset.source.samples": 10_000,
    "val.episodes": 1_000_000,
    "test.episodes": 1_000_000,
    "method.inner_steps": 1000,
    "method.test_inner_steps": 1000,
    "method.unrolling_steps": 1000,
    "method.steps": 10_000,
    "transform.padding": 1024,
    "transform.crop.padding": 1024,
}
CHOSEN_ON_RESUME = ("logger", "callbacks")  # groups that the command line chooses again on resume
NO_SLOTS = (
    "hydra",
    "figure",
    "experiment",
    "budget",
    *CHOSEN_ON_RESUME,
)  # groups that a checkpoint may not use
INITIAL_WEIGHTS = ("file", "init")  # sources of the initial weights; the trained ones are in the checkpoint
# Groups, which are mappings or null; the schema leaves their content open.
GROUPS = ("dataset", "method", "distance", "encoder", "optimizer", "schedule", "transform", "hardware")
HYDRA_KEYS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})

DIRECTORIES = ("data_dir", "cache_dir")  # keys that take the user's values, wherever they are in a configuration


def plain(value: Any) -> Any:
    """Copy the content of a file: mappings, lists, numbers, strings and nulls only.

    Raises:
        ValueError: there is anything else, such as an interpolation, or it is too large or too deeply nested.
    """
    nodes, characters = 0, 0

    def copy(value: Any, depth: int) -> Any:
        nonlocal nodes, characters
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError("its configuration is too large")
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int:
            if abs(value) >= 2**63:
                raise ValueError("its configuration has a number of more than 64 bits")
            return value
        if type(value) is str:
            characters += len(value)
            if characters > MAX_CHARACTERS:
                raise ValueError("its configuration is too large")
            if "${" in value or value == "???":
                raise ValueError(f"its configuration has {value!r}, which is a placeholder and not a value")
            return value
        if isinstance(value, dict):
            if not all(type(key) in (str, int) for key in value):
                raise ValueError("its configuration has a key that is not a string")
            return {copy(key, depth): copy(inner, depth + 1) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return [copy(inner, depth + 1) for inner in value]
        raise ValueError(f"its configuration has a {type(value).__name__}, which is not plain data")

    return copy(value, 0)


def read_config(
    untrusted: Any,
    path: Path,
    *,
    trust: str | Iterable[str] | None = None,
    places: Mapping[str, Any] | None = None,
    own: Any = None,
) -> dict[str, Any]:
    """Check the configuration of a checkpoint, so that it is safe to instantiate.

    Args:
        untrusted: the configuration.
        path: the checkpoint, for messages.
        trust: packages whose code it may name, in addition to the code that this command's configuration files name.
        places: the user's ``data_dir`` and ``cache_dir``; None: the default ones.
        own: the configuration of this command if it resumes the checkpoint's run; the code that it names is trusted.

    Returns:
        A copy, with the user's directories, no ``run_dir``, and no initial weights of the encoder.

    Raises:
        ValueError: it is not a configuration of this program, see ``plain``.
        FewShotError: it names code that is not trusted or cannot be imported.
    """
    config = plain(untrusted)
    if not isinstance(config, dict):
        raise ValueError("its configuration is not a mapping")
    config |= dict.fromkeys(CHOSEN_ON_RESUME)
    config.pop("overrides", None)
    old = next((key for key in RENAMED if _select(config, key) is not None), None)
    if old is not None:
        raise FewShotError(
            f"{path} is from an earlier version of fewshot, which had {old}: train again, or use it with that version"
        )
    for key in GROUPS:
        if not isinstance(config.get(key), dict | None):
            raise ValueError(f"its {key} is not a mapping")
    for key in ("method", "dataset.source"):
        node = _select(config, key)
        if not isinstance(node, dict) or "_target_" not in node:
            raise ValueError(f"its configuration has no {key}")
    try:
        OmegaConf.merge(OmegaConf.structured(TrainConfig), config)
    except OmegaConfBaseException as error:
        raise ValueError(f"its {error.full_key or 'configuration'} is wrong: {reason(error)}") from error
    places = default_directories() if places is None else places
    _check_targets(config, path, _packages(trust), own, places)
    _check_values(config)
    _set_directories(config, places)
    return config | {"run_dir": None, "resume": None, "trust": []}


def default_directories() -> dict[str, str]:
    """Return the default directories of data sets and image banks, from ``conf/train.yaml`` and the environment."""
    config = compose_unresolved()
    return {key: str(config[key]) for key in DIRECTORIES}


class KnownTargets:
    """Every ``_target_`` in this command's configuration files, with its node.

    Args:
        own: a trusted configuration, whose targets count as well.
    """

    def __init__(self, own: Any = None) -> None:
        self._sources = search_path()
        groups = {group for source in self._sources for group in source.list("", ObjectType.GROUP)}
        self._groups = groups.difference(NO_SLOTS)
        self._unread = [*sorted(self._groups), "experiment"]  # last: it has the most files and seldom names code
        self._nodes: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
        self._own = {(slot, str(node["_target_"])): node for slot, node in self.targets(own)}

    def find(self, slot: str, name: str) -> Mapping[str, Any] | None:
        """Return the unresolved node of a target in a slot, or None if no file names it there."""
        while (slot, name) not in self._nodes and self._unread:
            self._read(self._unread.pop(0))
        return self._nodes.get((slot, name)) or self._own.get((slot, name))

    def slots(self, name: str) -> list[str]:
        """Return the slots that a target may fill."""
        return sorted({slot for slot, other in [*self._nodes, *self._own] if other == name})

    def targets(self, node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the nodes that Hydra instantiates, with their slots: the path from the innermost group down.

        The encoder within a method and the top-level one have the same slot, ``encoder``.
        """
        if isinstance(node, dict):
            if "_target_" in node:
                start = max((number for number, key in enumerate(path) if key in self._groups), default=0)
                yield ".".join(path[start:]), node
            for key, value in node.items():
                yield from self.targets(value, (*path, str(key)))
        elif isinstance(node, list):
            for value in node:
                yield from self.targets(value, path)

    def _read(self, folder: str) -> None:
        for source in self._sources:
            for option in options(source, folder):
                content = OmegaConf.to_container(source.load_config(f"{folder}/{option}").config)
                for slot, node in self.targets(content, (folder,) if folder in self._groups else ()):
                    self._nodes[slot, str(node["_target_"])] |= node


def _packages(trust: str | Iterable[str] | None) -> tuple[str, ...]:
    if trust is None:
        return ()
    packages: tuple[Any, ...] = tuple(trust) if isinstance(trust, Iterable) and not isinstance(trust, str) else (trust,)
    for package in packages:
        if not isinstance(package, str) or not re.fullmatch(r"\w+(\.\w+)*", package):
            raise FewShotError(f"trust={package} must name a package, or a list of packages: trust=[first,second]")
        if _is_builtin(package):
            raise FewShotError(f"trust={package}: checkpoints may not name its functions; name a package of your own")
    return packages


def _is_builtin(name: str) -> bool:
    """Whether code belongs to Python or this program, which cannot contain a user's method or data set."""
    return name.partition(".")[0] in {*sys.stdlib_module_names, "__main__", "fewshot", "hydra", "omegaconf"}


def _check_targets(
    config: dict[str, Any], path: Path, packages: Sequence[str], own: Any, places: Mapping[str, Any]
) -> None:
    """Check every node that Hydra would instantiate against the known targets, and insert the user's directories."""
    known = KnownTargets(own)
    for slot, node in known.targets(config):
        name = node["_target_"]
        if type(name) is not str:
            raise ValueError(f"the _target_ of its {slot} is not a string")
        ours = known.find(slot, name)
        package = next((package for package in packages if name.startswith(f"{package}.")), None)
        if ours is None and package is None:
            raise _foreign(path, slot, name, known.slots(name))
        if ours is None:
            origin = str(getattr(import_target(f"{path}: {slot}", name), "__module__", None))
            if not f"{origin}.".startswith(f"{package}."):
                raise ValueError(f"its {slot} is {name}, which {package} has from {origin}")
        strange = {str(key) for key in node if _is_hydras(key)} - (HYDRA_KEYS if ours is None else ours.keys())
        if strange:
            raise ValueError(f"its {slot} has the key {min(strange)}")
        for key, value in (ours or {}).items():
            if key in node and _is_group(value) and not (isinstance(node[key], dict) and "_target_" in node[key]):
                raise ValueError(f"its {slot}.{key} is {node[key]!r}, which has no _target_")
        directories = {key: value for key, value in (ours or {}).items() if key in node and _names_directory(value)}
        node |= {key: _insert_directories(value, places) for key, value in directories.items()}
    stray = next(_stray_keys(config), None)
    if stray is not None:
        raise ValueError(f"it has the key {stray} in a node without _target_")


def directory_keys(source: Mapping[str, Any]) -> set[str]:
    """Return the keys of a ``dataset.source`` that say where its files are, not which files they are."""
    known = KnownTargets().find("dataset.source", str(source.get("_target_"))) or {}
    return {*DIRECTORIES, *(str(key) for key, value in known.items() if _names_directory(value))}


def _is_group(value: Any) -> bool:
    """Whether a configuration file has a group in this place, such as ``${distance}``."""
    return isinstance(value, str) and value.startswith("${") and value[2:-1] in GROUPS


def _names_directory(value: Any) -> bool:
    return isinstance(value, str) and any(f"${{{name}}}" in value for name in DIRECTORIES)


def _insert_directories(value: str, places: Mapping[str, Any]) -> str:
    """Replace the interpolations of directories in a string of a configuration file."""
    for name in DIRECTORIES:
        value = value.replace(f"${{{name}}}", str(places[name]))
    return value


def _foreign(path: Path, slot: str, name: str, other_slots: Sequence[str]) -> Exception:
    if other_slots:
        return ValueError(f"its {slot} is {name}, which can only be a {' or a '.join(other_slots)}")
    if _is_builtin(name) or "." not in name:
        return ValueError(f"its {slot} is {name}, which no configuration file names")
    return FewShotError(
        f"{path} names code that is not trusted: its {slot} is {name}; if you know this code, trust its package with "
        f"trust={name.partition('.')[0]}, or name the directory of its configuration files with --config-dir DIR"
    )


def _stray_keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (str(key) for key in node if _is_hydras(key) and "_target_" not in node)
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _stray_keys(value)


def _is_hydras(key: Any) -> bool:
    return re.fullmatch(r"_.*_", str(key), re.DOTALL) is not None


def _check_values(config: Mapping[str, Any]) -> None:
    """Check the values that are used before any other check could reject them."""
    for key, largest in MAX_VALUES.items():
        value = _select(config, key)
        if type(value) in (int, float) and not value <= largest:
            raise ValueError(f"its {key} is {value}, more than {largest:,}")
    for key in ("dataset.size", "dataset.channels", "dataset.normalise"):
        if not fits(_select(config, key), TYPES[key]):
            raise ValueError(f"its {key} is {_select(config, key)}")
    size = _select(config, "dataset.size")
    if _select(config, "dataset.source.size") not in (None, size):  # of the images in memory and on disk
        raise ValueError(f"its dataset.source.size is not its dataset.size, {size}")


def _select(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _set_directories(node: Any, places: Mapping[str, Any], in_encoder: bool = False) -> None:
    if isinstance(node, dict):
        node |= {key: None for key in INITIAL_WEIGHTS if in_encoder and key in node}
        node |= {key: directory for key, directory in places.items() if key in node}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        _set_directories(value, places, in_encoder or key == "encoder")
