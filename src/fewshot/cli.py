"""Shared by all entry points: one-line errors that say what to do, and help that shows each key with its comment."""

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, OverrideType, Quote, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fewshot import __version__
from fewshot.arguments import prepare
from fewshot.commands import COMMANDS
from fewshot.config import (
    CHECKOUT,
    CONF,
    RENAMED,
    compose_unresolved,
    current_names,
    is_group,
    option_values,
    options,
    places_in,
    search_path,
    source_at,
)
from fewshot.errors import Interrupted, causes, mistake, nearest
from fewshot.models import is_model
from fewshot.paths import install, make_absolute
from fewshot.processes import PATIENCE, rank
from fewshot.sweeps import FAILURE, Sweep, failures
from fewshot.text import for_terminal, open_streams, say

# Commands whose first arguments may omit this key.
LEADING = {"report": "runs", "compare": "runs", "models": "names", "reproduce": "rows"}
TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"  # requested by the user
# What Hydra and OmegaConf add to messages for authors of configuration files.
ASIDES = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Config search path", "provider=")
RESOLVING = "FewShotError raised while resolving interpolation: "
# The extra that installs each Hydra plugin.
PLUGINS = {
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "ray": "ray",
    "ray_aws": "ray",
}
UNCOMPOSED = (HydraException, OmegaConfBaseException, TypeError, ValueError)  # the last two for a group set to a value
MAX_OPTIONS = 20  # of a group that a message lists one by one
# Errors of joblib, Ray and submitit about a process or a machine that is gone.
LOST = re.compile("Terminated|Died|Crashed|Broken|Lost|Unreachable|Uncompleted")
HYDRAS_OWN = ("hydra", "hydra_debug")  # groups


def name_leading(key: str, arguments: list[str]) -> None:
    """Let the first arguments omit their key: ``PROGRAM A B other=1`` means ``PROGRAM key=[A,B] other=1``.

    Args:
        key: the key of a list of paths.
        arguments: ``sys.argv``, changed in place. An argument with "=" is a path only if that path exists.
    """
    stop = 1
    while stop < len(arguments) and not arguments[stop].startswith("-"):
        if "=" in arguments[stop] and not Path(arguments[stop]).exists():
            break
        stop += 1
    if stop > 1:
        paths = (QuotedString(path, Quote.single).with_quotes() for path in arguments[1:stop])
        arguments[1:stop] = [f"{key}=[{','.join(paths)}]"]


_command = "train"  # the command that runs in this process


def main() -> None:
    """Run ``fewshot NAME KEY=VALUE ...``."""
    open_streams()
    program, *arguments = sys.argv
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        run(name, [program, *arguments[1:]])
    elif name in {"--help", "-h"}:
        say("fewshot NAME KEY=VALUE ...; fewshot NAME --help shows the keys. NAME is one of", *_usage())
    elif name == "--version":
        say(f"fewshot {__version__}")
    elif arguments[:2] == ["-sc", "query=bash"]:
        _complete(program)
    elif name in {"-sc", "--shell-completion"}:
        run("train", sys.argv)  # the script that Hydra prints is the same for all
    else:
        _exit(f"{name} is not a command{nearest(name, COMMANDS)}; choose one of {', '.join(COMMANDS)}", 1)


def _usage() -> Iterator[str]:
    for name, command in COMMANDS.items():
        yield f"  {name:9} {str(command.__doc__).splitlines()[0]}"


def _complete(program: str) -> None:
    """Complete ``fewshot NAME``; Hydra completes the arguments of ``NAME``."""
    called, name, *_ = [*os.environ["COMP_LINE"].split(), "", ""]
    if name in COMMANDS:
        os.environ["COMP_LINE"] = os.environ["COMP_LINE"].replace(f"{called} {name}", called, 1)
        run(name, [program, "-sc", "query=bash"])
    else:
        say(*COMMANDS)


def run(name: str, arguments: list[str] | None = None) -> None:
    """Run a command; a mistake on its command line ends in one clear line and a non-zero exit status.

    Set HYDRA_FULL_ERROR=1 to see the traceback instead.

    Args:
        name: the command, which is also the name of its file in ``conf``.
        arguments: the program and the overrides; None: ``sys.argv``.
    """
    global _command  # noqa: PLW0603
    open_streams()
    _command = name
    typed, sys.argv = sys.argv, sys.argv if arguments is None else arguments
    if name in LEADING:
        name_leading(LEADING[name], sys.argv)
    sys.argv[1:] = _guard(lambda: prepare(sys.argv[1:]))
    if any((*places_in(sys.argv[1:]), *option_values(sys.argv[1:], "trust"))):
        sys.path.append(str(Path.cwd()))  # the user's own modules may be here, as for python -m
    sys.argv[1:] = _guard(lambda: current_names(sys.argv[1:]))
    if {"--help", "-h"} & set(sys.argv):
        # Hydra's list of groups takes a second, and our help prints its own.
        Hydra.format_config_groups = lambda *_: ""  # type: ignore[method-assign]
    Hydra.get_mode = _mode  # type: ignore[method-assign, assignment]
    function = job(COMMANDS[name], typed)
    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(function)
    if TRACEBACK:
        main()
    else:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors instead of printing them
        _guard(main)
        _exit_if_jobs_failed()


def _mode(hydra_: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Return the configured mode. Hydra's own method ignores errors, only to compose again and raise them then."""
    config = hydra_.compose_config(config_name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False)
    mode: RunMode | None = config.hydra.mode
    return mode


def job(function: Callable[[DictConfig], Any], typed: list[str]) -> Callable[[DictConfig], Any]:
    """Decorate the function that ``hydra.main`` runs, so that mistakes in it end in one line, too.

    In a sweep, errors are printed and recorded in the process that runs the job; other jobs continue, and the failed
    ones are listed at the end.

    Args:
        function: takes the composed configuration.
        typed: the command line, with which Lightning starts the other processes of a run.
    """

    @wraps(function)
    def guarded(config: DictConfig) -> Any:
        open_streams()  # a launcher may have started a new process for this job
        make_absolute(config, is_model)
        if TRACEBACK:
            return function(config)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return _note_failure(lambda: function(config))
        sys.argv = typed
        os.environ.pop("HYDRA_FULL_ERROR", None)  # processes started from here set it themselves
        return _guard(lambda: function(config))

    return guarded


def _note_failure(function: Callable[[], Any]) -> Any:
    """Return the value of a sweep's job, or None if it failed, because an exception would end the whole sweep."""
    try:
        return function()
    except Exception as error:
        message = _explain(error)
        if message is None:
            traceback.print_exc()
            message = repr(error)
        config = HydraConfig.get()
        line = for_terminal(f"{' '.join(config.overrides.task)}: {' '.join(message.splitlines())}")
        say(f"failed: {line}", error=True)
        try:
            (Path(config.runtime.output_dir) / FAILURE).write_text(line, encoding="utf-8")
        except OSError:
            raise error from None
        return None


def _guard(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except KeyboardInterrupt as interrupt:
        _exit_interrupted(interrupt)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt) and exit_.code == 1:  # how Lightning exits
            _exit_interrupted(exit_.__context__)
        raise
    except Exception as error:
        _exit_if_jobs_failed()  # they are the cause, for example if Optuna has no job to choose
        message = _explain(error) or _lost_jobs(error)
        if message is None:
            raise  # a bug: show its traceback
        _exit(message, 1)


def _exit_if_jobs_failed() -> None:
    failed = failures(Sweep.folder) if Sweep.folder is not None else []
    if failed:
        _exit("\n".join([f"{len(failed)} of the jobs failed", *map(for_terminal, failed)]), 1)


def _exit_interrupted(interrupt: KeyboardInterrupt) -> None:
    message, status = (str(interrupt), interrupt.status) if isinstance(interrupt, Interrupted) else ("interrupted", 130)
    if Sweep.folder is not None:
        message = f"interrupted; resume the sweep with the same command and {Sweep.again}"
    _exit(message, status)


def _exit(message: str, status: int) -> None:
    if rank() > 0:
        time.sleep(PATIENCE)  # rank 0 reports a failure of all processes, and ends this one
        message = f"process {rank()}: {message}"
    say(*f"error: {message}".split("\n"), error=True)
    sys.exit(status)


def _explain(error: BaseException) -> str | None:
    """Return one line that explains a user's mistake; None for any other error."""
    ours = mistake(error)
    if ours is not None:
        return str(ours)
    help_ = f"(see {_program()}.py --help)" if CHECKOUT else f"(see fewshot {_program()} --help)"
    for cause in causes(error):
        if type(cause).__name__ == "MisconfigurationException":  # Lightning's; importing it takes seconds
            return f"{' '.join(str(cause).split())} {help_}"
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"{cause.filename}: {cause.strerror}; fix that{_other_paths()}"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            kept = "what was saved before is kept: free some space, then resume with resume=RUN_DIR"
            return f"{cause.strerror}; {kept if _program() == 'train' else f'free some space{_other_paths()}'}"
    known = HydraException | OmegaConfBaseException
    libraries = [cause for cause in causes(error) if isinstance(cause, known) or _raised_in_hydra(cause)]
    if not libraries:
        return None
    line = "; ".join(_wrong_overrides()) or _plain(*libraries) or "an argument is not understood"
    return f"{for_terminal(line)} {help_}"


def _lost_jobs(error: BaseException) -> str | None:
    """Return one line if a sweep's launcher failed, as when a process was killed or a cluster is gone."""
    launching = any(re.match(r"hydra_plugins\..*launcher", module) for module in _modules(error))
    if Sweep.folder is None or not launching or not LOST.search(type(error).__name__):
        return None
    reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    return f"{for_terminal(reason).rstrip('.')}; resume the sweep with the same command and {Sweep.again}"


def _other_paths() -> str:
    """Return what names other paths for this command."""
    file = CONF / f"{_program()}.yaml"
    name = file.stem if file.is_file() else "train"  # a primary configuration of the user's own
    keys = ["hydra.run.dir=PATH (results)"] if name == "train" else []
    keys += [f"{key}=PATH" for key in ("out", "cache_dir", "data_dir") if key in OmegaConf.load(CONF / f"{name}.yaml")]
    return (
        f", or choose other paths with {' and '.join(filter(None, [', '.join(keys[:-1]), keys[-1]]))}" if keys else ""
    )


def _plain(*errors: BaseException) -> str:
    lines = [line.strip().removeprefix(RESOLVING) for error in errors for line in str(error).splitlines()]
    return " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(ASIDES)))


def _wrong_overrides() -> Iterator[str]:
    """Yield what is wrong with each override of the command line, with the nearest existing name."""
    name = next(option_values(sys.argv[1:], "--config-name", "-cn"), _program())
    places = list(places_in(sys.argv[1:]))
    missing = [place for place in places if not source_at(place).available()]
    if missing:
        yield f"--config-dir or hydra.searchpath names {', '.join(missing)}, which does not exist"
        return  # other names may be defined there
    instead = list(option_values(sys.argv[1:], "--config-path", "-cp"))
    if instead and not any(source_at(place).is_config(_program()) for place in (*instead, *places)):
        yield f"--config-path replaces fewshot's own configuration files; add yours with --config-dir {instead[0]}"
        return
    if not any(source.is_config(name) for source in search_path(*places)):
        return  # not one of our programs
    groups: list[Override] = []
    keys: list[Override] = []
    for argument in sys.argv[1:]:
        if argument.startswith(("-", "hydra.searchpath=")) or "=" not in argument:
            continue
        override = OverridesParser.create().parse_override(argument)
        if not isinstance(override.value(), Glob):  # it matches whatever exists
            chooses = is_group(override.key_or_group, *places) or override.key_or_group.startswith("hydra/")
            (groups if chooses else keys).append(override)
    chosen: list[str] = []
    yield from _wrong_choices(groups, chosen, name, places)
    yield from _wrong_keys(keys, chosen, {group.key_or_group: _values(group) for group in groups}, name, places)


def _values(override: Override) -> list[str]:
    """Return the values of an override: several in a sweep, and of an interval its start."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start)]
    sweep = override.is_sweep_override()
    return list(override.sweep_string_iterator()) if sweep else [str(override.input_line).partition("=")[2]]


def _first(override: Override) -> str:
    return f"{str(override.input_line).partition('=')[0]}={_values(override)[0]}"


def _wrong_choices(groups: Iterable[Override], chosen: list[str], name: str, places: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with choices from groups, and append the others to ``chosen``."""
    for override in groups:
        for option in _values(override):
            choice = f"{str(override.input_line).partition('=')[0]}={option}"
            try:
                compose_unresolved(*chosen, choice, name=name, places=places)
            except UNCOMPOSED as error:
                available = list(_options(override.key_or_group, search_path(*places)))
                if option in PLUGINS:
                    yield f"{_plain(error)} ({install(PLUGINS[option])} installs it)"
                elif option in available or not available:  # something else is wrong
                    yield _plain(error)
                else:  # Hydra's list leaves out those in folders
                    near = nearest("none" if option == "null" else option, available)
                    yield f"{choice} is not an option. Choose one of {_listed(available, option)}{near}"
                break
        else:
            chosen.append(_first(override))


def _wrong_keys(
    keys: Iterable[Override],
    chosen: Sequence[str],
    sweeps: Mapping[str, Sequence[str]],
    name: str,
    places: Sequence[str],
) -> Iterator[str]:
    try:
        composed = compose_unresolved(*chosen, name=name, places=places)
    except UNCOMPOSED:  # a configuration file is wrong, not an override
        return
    names = list(_keys(composed))
    for override in keys:
        key, tried = override.key_or_group, _first(override)
        group = key.partition(".")[0]
        if len(sweeps.get(group, ())) > 1 and override.type == OverrideType.CHANGE:
            having = [option for option in sweeps[group] if _has(key, f"{group}={option}", name, places)]
            if 0 < len(having) < len(sweeps[group]):
                only = " and ".join(f"{group}={option}" for option in having)
                yield (
                    f"{key} is a setting of {only} only; sweep over it in a command of its own: -m {group}={having[0]} "
                    f"{override.input_line}"
                )
                continue
        try:  # composing again for each key would take much longer
            parsed = OverridesParser.create().parse_override(tried)
            ConfigLoaderImpl._apply_overrides_to_config([parsed], composed.copy())
        except (HydraException, OmegaConfBaseException) as error:
            if key in RENAMED:
                yield f"{key} is now {RENAMED[key]}"
            elif isinstance(parsed.value(), list) and key in names:
                several = tried.partition("=")[2].strip("[]")
                yield f"{tried} is a list, and {key} takes one value; to run one job for each: -m {key}={several}"
            elif key.startswith("hydra.") and key not in names and override.type == OverrideType.CHANGE:
                near = nearest(key, names)
                yield f"{key} is not in Hydra's configuration{near}; to add it anyway, type +{override.input_line}"
            elif key not in names and override.type == OverrideType.CHANGE and is_group(group, *places) and _resumes():
                yield f"{key} is not a setting here; if the resumed run's {group} has it, type +{override.input_line}"
            else:
                yield _plain(error) + ("" if key in names else nearest(key, names))


def _resumes() -> bool:
    """Whether the command line resumes a run, which keeps its own groups."""
    return any(value not in ("auto", "null") for value in option_values(sys.argv[1:], "resume"))


def _has(key: str, choice: str, name: str, places: Sequence[str]) -> bool:
    with suppress(*UNCOMPOSED):
        return key in _keys(compose_unresolved(choice, name=name, places=places))
    return False


def _program() -> str:
    """Return the name of the command and its configuration; a sweep's job may run in a process that is not ours."""
    return str(HydraConfig.get().job.config_name) if HydraConfig.initialized() else _command


def _listed(available: Sequence[str], option: str) -> str:
    """Return the options of a group for a message; if there are many, folders stand for what is in them."""
    folder = option.rpartition("/")[0]
    if len(available) > MAX_OPTIONS:
        shown = [
            name if "/" not in name or name.startswith(f"{folder}/") else f"{name.split('/')[0]}/..."
            for name in available
        ]
        available = list(dict.fromkeys(shown))
    return ", ".join(available)


def _options(group: str, sources: Iterable[ConfigSource]) -> dict[str, ConfigSource]:
    """Return the options of a group, each with the source that Hydra reads it from."""
    found: dict[str, ConfigSource] = {}
    for source in sources:
        for name in options(source, group):
            if not f"/{name}".rpartition("/")[0].endswith("/base"):  # shared by several options
                found.setdefault(name, source)
    return dict(sorted(found.items()))


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        yield f"{prefix}{key!s}"
        value = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            yield from _keys(value, f"{prefix}{key!s}.")


def _raised_in_hydra(error: BaseException) -> bool:
    """Whether Hydra itself failed on the command line; not all of its errors have their own type."""
    modules = _modules(error)
    return bool(modules) and modules[-1].startswith(("hydra.core", "hydra._internal"))


def _modules(error: BaseException) -> list[str]:
    """Return the names of the modules that an error passed, the one that raised it last."""
    return [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]


def _help(*, _root_: DictConfig) -> str:
    """Return the configuration files behind this command line, with the comments that explain each key."""
    sources = [source_at(f"{source.schema}://{source.path}") for source in _root_.hydra.runtime.config_sources]
    name = str(_root_.hydra.job.config_name)
    primary = next(source for source in sources if source.is_config(name))
    shown = [_text(primary, name)]
    if not CHECKOUT:
        shown = [re.sub(r"python src/(\w+)\.py", r"fewshot \1", shown[0])]
    entries = OmegaConf.select(primary.load_config(name).config, "defaults", default=[])
    groups = [entry if isinstance(entry, str) else str(next(iter(entry))) for entry in entries]
    own = {group for source in sources for group in source.list("", ObjectType.GROUP)}
    # In addition to the groups that this command chooses from, those that only the user has.
    groups += sorted(own.difference(groups, (path.name for path in CONF.iterdir()), HYDRAS_OWN))
    for group in groups:
        available = _options(group, sources)
        choice = _root_.hydra.runtime.choices.get(group)
        if available:
            shown.append(f"# {group}={'|'.join(available)}")
        if choice in available:
            shown[-1] += f" ... {group}={choice} sets:"
            shown.append(_text(available[choice], f"{group}/{choice}"))
    return "\n".join(shown).replace("$", "$$")  # Hydra's help is a string.Template


def _text(source: ConfigSource, name: str) -> str:
    """Return a configuration file with its comments."""
    if source.scheme() == "file":
        return Path(source.path, f"{name}.yaml").read_text(encoding="utf-8")
    if source.scheme() == "pkg":
        return resources.files(source.path).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return OmegaConf.to_yaml(source.load_config(name).config)  # defined in Python


OmegaConf.register_new_resolver("fewshot_help", _help, replace=True)
