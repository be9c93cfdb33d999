"""Resume runs: their checkpoints, settings and data must match."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities import rank_zero_only

from fewshot.checkpoints import check_weights, load_checkpoint, read_tensors, shapes
from fewshot.config import is_group, run_name, training_steps, without_initial_weights
from fewshot.data.bank import ImageBank
from fewshot.data.contents import Contents, contents_of, differences, read_contents, read_names
from fewshot.directories import best_checkpoint, checkpoint_at, has_run, last_checkpoint, results_file
from fewshot.errors import FewShotError, reason
from fewshot.files import read_json, read_text, write_atomically
from fewshot.paths import run_directory
from fewshot.results import is_evaluation, same, wrong
from fewshot.text import say
from fewshot.trust import CHOSEN_ON_RESUME, directory_keys, plain

# Schedule arguments that hold the total number of steps: PyTorch's names, and "steps" for ours and user-supplied ones.
HORIZONS = ("T_max", "total_steps", "total_iters", "steps")
# Settings that affect the result of a run. A resumed run must keep them, except those in MAY_DIFFER; everything else
# (hardware, directories, logging) may change.
DECISIVE = [
    "choices",
    "way",
    "shot",
    "query",
    "train",
    "val",
    "seed",
    "eval_seed",
    "dataset",
    "method",
    "optimizer",
    "schedule",
    "transform",
]
NOTHING = (None, "none")  # an empty group, or a group that an earlier version did not have
MAY_DIFFER = {
    "choices.experiment",  # a name; its settings count
    *("train.episodes", "train.steps", "train.on_nan"),
    *("method.task_batching", "method.vmap_tasks", "method.recompute"),
    *("method.encoder.file", "method.encoder.load"),  # the weights are in the checkpoint
}


def load_for_resume(config: DictConfig) -> tuple[DictConfig, dict[str, Any] | None]:
    """Load the configuration and the checkpoint that ``resume`` requests.

    Args:
        config: as composed from the command line.

    Returns:
        The configuration to run with, and the checkpoint to resume from, or None for a new run. With
        ``resume=RUN_DIR`` the configuration is the checkpoint's, with the overrides of the command line applied.

    Raises:
        FewShotError: the directory contains a run and ``resume`` is not set, or contains none and ``resume`` names it;
            or another one than the command runs in; its checkpoint is broken; or settings that affect the result
            differ.
    """
    run_dir = Path(config.run_dir)
    path = last_checkpoint(run_dir)
    named = None if config.resume in (None, "auto") else Path(run_directory(config.resume))
    if named is not None and named.resolve() != run_dir.resolve():
        raise FewShotError(
            f"resume={config.resume} is not the run in {run_dir}: resume it without hydra.run.dir and -m; a sweep "
            "resumes its runs with the same command and resume=auto"
        )
    if config.resume is None:
        # Rank 0 has checked before it starts the other ranks, and may have written something since.
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if first and has_run(run_dir):
            raise FewShotError(
                f"{run_dir} already contains a run: resume it with resume={run_dir}, or choose another directory with "
                "hydra.run.dir=PATH"
            )
        return config, None
    if not path.exists():
        if results_file(run_dir).exists() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            raise FewShotError(
                f"{run_dir} contains the results of a run, but not its {path.relative_to(run_dir)}; restore it, or "
                "choose another directory with hydra.run.dir=PATH"
            )
        if config.resume != "auto":
            raise FewShotError(
                f"there is no {path} to resume from; name the directory of a run, or start one without resume"
            )
        return config, None
    if config.resume != "auto" and Path(config.resume).suffix == ".ckpt" and Path(config.resume).name != path.name:
        rank_zero_only(say)(f"a run is resumed from {path}, not from {Path(config.resume).name}")
    _refuse_links(run_dir)
    _name_other_logs(run_dir, config)
    own = OmegaConf.to_container(config)
    checkpoint = load_checkpoint(path, trust=config.trust, places=data_directories(config), own=own)
    saved = OmegaConf.create(checkpoint["hyper_parameters"])
    if config.resume != "auto":
        config = _with_overrides(saved, config)
    if config.method.get("classes", 0) is None:  # the data decide it, and are compared later
        config.method.classes = saved.method.get("classes")
    _keep_horizon(saved, config)
    free = MAY_DIFFER | _directory_keys(config)
    differ = [line for key, line in _differences(config, saved, DECISIVE) if key not in free]
    differ += _other_start(config, checkpoint)
    if differ:
        raise FewShotError(
            f"{run_dir} contains a run with different settings: {', '.join(differ)}; resume={run_dir} resumes it "
            "unchanged, or choose another directory with hydra.run.dir=PATH"
        )
    try:
        check_weights(without_initial_weights(config.method), checkpoint["state_dict"])
    except ValueError as error:
        raise cannot_resume(path, error) from error
    return config, checkpoint


def _other_start(config: DictConfig, checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yield a description if a configuration starts from another encoder than a checkpoint records; see ``Record``."""
    place = config.encoder.get("init")
    record = checkpoint.get("callbacks", {}).get("Record", {})
    known = record.get("encoder_init") if isinstance(record, dict) else None
    known = known if isinstance(known, dict) else {}
    there = known.get("checkpoint")
    if place is None:  # resume=RUN_DIR need not name it again
        same = not known or config.resume != "auto"
    else:
        file = checkpoint_at(Path(place).expanduser())
        same = True  # it may have been deleted since, and is not read again
        with suppress(OSError), file.open("rb") as opened:
            same = hashlib.file_digest(opened, "sha256").hexdigest() == known.get("sha256")
    if not same:
        yield f"encoder.init={place} (the run has {there})"


def cannot_resume(path: Path, error: Exception) -> FewShotError:
    """Return the error for a run whose last checkpoint does not fit."""
    return FewShotError(
        f"the run cannot be resumed: {path} is broken, or from a different version: {reason(error)}; train "
        "again in another directory"
    )


def data_directories(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return this command's directories of data sets and image banks."""
    return {key: config[key] for key in ("data_dir", "cache_dir")}


def complete_results(config: DictConfig) -> dict[str, Any] | None:
    """Return the results of a complete run, or None if it has none yet or was tested with other settings."""
    path = results_file(Path(config.run_dir))
    try:
        results = read_json(path)
        why = wrong(results)
        if why is not None:
            raise ValueError(why)
        if is_evaluation(results):
            raise ValueError("it is the result of an evaluation")
        theirs = OmegaConf.create({**plain(results["config"])})
        free = (MAY_DIFFER | _directory_keys(config)) - {"train.episodes", "train.steps"}
        matches = all(key in free for key, _ in _differences(config, theirs, [*DECISIVE, "test"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException) as error:
        raise FewShotError(f"{path} is broken ({reason(error)}); delete it to repeat the test") from error
    theirs_precision, ours = results.get("precision"), str(config.hardware.precision)
    if matches and theirs_precision not in (None, ours):
        say(f"warning: the run was completed with hardware.precision={theirs_precision}, not {ours}", error=True)
    return results if matches else None


def trained_on(checkpoint: Mapping[str, Any], run_dir: Path | None) -> Contents | None:
    """Return the contents of the data that a checkpoint was trained on, or None if they are not recorded.

    Args:
        checkpoint: see ``load_checkpoint``; those of earlier versions do not record the contents.
        run_dir: the run's directory, whose ``classes.json`` then names the classes.

    Raises:
        FewShotError: the record is broken.
    """
    if "data" in checkpoint:
        try:
            return read_contents(checkpoint["data"])
        except ValueError as error:
            raise FewShotError(f"the checkpoint of {run_dir} is broken: {reason(error)}; train again") from error
    if run_dir is None:
        return None
    path = run_dir / "classes.json"
    try:
        return read_names(read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FewShotError(
            f"{path} is broken ({reason(error)}); delete it if you know that the data are unchanged"
        ) from error


def trained_before(checkpoint: Mapping[str, Any], path: Path | None) -> list[tuple[str, Contents]]:
    """Return what the encoder had been trained on before the run, in the runs that ``encoder.init`` started from.

    Args:
        checkpoint: see ``load_checkpoint``.
        path: of the checkpoint, for messages.

    Returns:
        For each of those runs, the ``_target_`` of its data set and its contents.

    Raises:
        FewShotError: the record is broken.
    """
    recorded = checkpoint.get("trained_before", [])
    try:
        if not isinstance(recorded, list) or not all(
            isinstance(one, dict) and type(one.get("source")) is str for one in recorded
        ):
            raise ValueError("its record of earlier trainings is not a list of data sets")
        return [(one["source"], read_contents(one.get("data"))) for one in recorded]
    except ValueError as error:
        raise FewShotError(f"the checkpoint {path} is broken: {reason(error)}; train again") from error


def check_same_data(then: Contents | None, bank: ImageBank, path: Path, fix: str) -> None:
    """Reject data other than those a run was trained on: test classes could be among its training classes.

    Args:
        then: the contents at training, see ``trained_on``.
        bank: the current images.
        path: the run or its checkpoint, for messages.
        fix: what to do other than restore the data, for the message.

    Raises:
        FewShotError: names the differences.
    """
    if then is None:
        rank_zero_only(say)(
            f"warning: {path} does not record its training classes, so they were not compared", error=True
        )
        return
    changes = differences(then, contents_of(bank))
    if changes:
        raise FewShotError(
            f"{path} was trained on different data: {'; '.join(changes)}; restore them, or name their directory with "
            f"data_dir=PATH, or {fix}"
        )


def check_best(run_dir: Path, checkpoint: dict[str, Any]) -> None:
    """Check before training that the best weights so far exist, since they may be the ones tested in the end.

    A missing best checkpoint is restored from the last one where both hold the same weights.

    Raises:
        FewShotError: they are missing, broken or from another run.
    """
    try:
        validations = checkpoint["callbacks"]["Record"]["validations"]
        accuracies = [validation["accuracy"] for validation in validations]
        trained = checkpoint["EpisodeDataModule"]["trained"]
        since = [validation["trained_episodes"] for validation in validations]
    except (KeyError, TypeError) as error:
        raise cannot_resume(last_checkpoint(run_dir), error) from error
    path = best_checkpoint(run_dir)
    if not accuracies:
        return
    best = accuracies.index(max(accuracies))
    restorable = since[best] == trained and rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if not path.exists():
        if not restorable:
            raise FewShotError(
                f"{path} is missing, which holds the weights of the best validation (after {since[best]:,} training "
                "episodes); restore it, or train again in another directory"
            )
        write_atomically(path, last_checkpoint(run_dir).read_bytes())
        say(f"{path} was missing; the last checkpoint holds the same weights and was copied to it")
        return
    try:
        found = read_tensors(path)
        theirs = found["callbacks"]["Record"]["validations"]
        both = min(len(theirs), len(validations))  # a kill can come between the two files
        if theirs[:both] != validations[:both]:
            raise ValueError("its validations are from another run")
        if shapes(found["state_dict"]) != shapes(checkpoint["state_dict"]):
            raise ValueError("its weights do not fit the method")
        if len(theirs) > both and restorable:  # the training may not come to that validation again
            write_atomically(path, last_checkpoint(run_dir).read_bytes())
    except Exception as error:  # the type depends on how the file is broken
        raise FewShotError(
            f"{path} is broken, or from another run ({reason(error)}); restore the right one, or train again in "
            "another directory"
        ) from error


def check_tested(run_dir: Path, validations: Sequence[Mapping[str, Any]]) -> None:
    """Check after training that the best checkpoint is the one with the best validation accuracy.

    It is not if a run was killed while its checkpoints were written, and resumed with settings that ended it earlier or
    led to other weights.

    Args:
        run_dir: of the run.
        validations: of the run, in order.

    Raises:
        FewShotError: it is of another training episode.
    """
    path = best_checkpoint(run_dir)
    held = read_tensors(path)["EpisodeDataModule"]["trained"]
    best = max(validations, key=lambda validation: validation["accuracy"])["trained_episodes"]
    if held != best:
        raise FewShotError(
            f"{path} holds the weights after {held:,} training episodes, but the best validation was after {best:,}: "
            "the run was killed while it saved them, and resumed with other settings; train again in another directory"
        )


def overrides(run_dir: Path) -> list[str]:
    """Return the overrides that Hydra recorded for the run, or [] if the record is missing or unreadable."""
    path = run_dir / ".hydra" / "overrides.yaml"
    try:
        # Not with OmegaConf, which would resolve interpolations in this untrusted file.
        recorded = yaml.safe_load(read_text(path))
        if not isinstance(recorded, list) or not all(type(override) is str for override in recorded):
            raise ValueError("it is not a list of strings")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        say(f"skipped {path}: {reason(error)}", error=True)
        return []
    return recorded


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; see ``write_atomically``."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _refuse_links(run_dir: Path) -> None:
    """Reject links that would make a resumed run, or its logger, write outside its (untrusted) directory."""
    inside = run_dir.resolve()
    for path in run_dir.rglob("*"):
        # Weights & Biases links to its own cache, and writes each attempt to a new directory.
        if path.relative_to(run_dir).parts[:-1][:1] == ("wandb",):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise FewShotError(
                f"{path} is a link to {path.resolve()}, but a run writes only to its own directory: replace the link "
                "with what it points to"
            )


def chosen_on_resume(overrides: Iterable[str]) -> list[str]:
    """Return the overrides of settings that a resumed run takes from its command line, not from its checkpoint."""
    return [override for override in overrides if _is_chosen_on_resume(override.partition("=")[0])]


def _is_chosen_on_resume(key: str) -> bool:
    return key.lstrip("+~").partition(".")[0].partition("@")[0] in CHOSEN_ON_RESUME


def _name_other_logs(run_dir: Path, config: DictConfig) -> None:
    """Report the logger and callbacks that the run was started with, if this command does not choose any."""
    chosen = {override.partition("=")[0] for override in chosen_on_resume(config.overrides)}
    started = [
        override
        for override in chosen_on_resume(overrides(run_dir))
        # The file is untrusted: suggest only a plain choice for the user to type.
        if re.fullmatch(r"(logger|callbacks)=[\w/]+", override) and override.partition("=")[0] not in chosen
    ]
    if started:
        say(f"the run was started with {' '.join(started)}, but this command was not: add it to continue that log")


def _with_overrides(saved: DictConfig, config: DictConfig) -> DictConfig:
    changed = saved.copy()
    for override in OverridesParser.create().parse_overrides(list(config.overrides)):
        key = override.key_or_group
        if _is_chosen_on_resume(key):
            continue
        if is_group(key) and key != "hardware":
            raise FewShotError(f"{override.input_line}: a resumed run keeps its {key}; leave it out")
        try:
            OmegaConf.update(changed, key, OmegaConf.select(config, key), merge=False)
        except (AssertionError, LookupError, TypeError, ValueError, OmegaConfBaseException) as error:
            raise FewShotError(
                f"{override.input_line}: the run has no such setting to change: {reason(error)}"
            ) from error
    for key in ("run_dir", "resume", "trust", "overrides", *CHOSEN_ON_RESUME):
        changed[key] = config[key]
    changed.name = saved.get("name") or run_name(changed)
    if changed.logger is not None:
        _rename(changed.logger, config.name, changed.name)
    changed.train.steps = training_steps(changed.train.episodes, changed.train.meta_batch)
    return changed


def _rename(logger: DictConfig, name: str, saved: str) -> None:
    """Continue the log under the name of the run instead of the name that this command would give it."""
    for key, value in logger.items():
        if isinstance(value, DictConfig):
            _rename(value, name, saved)
        elif value == name:
            logger[key] = saved


def _keep_horizon(saved: DictConfig, config: DictConfig) -> None:
    """Reject a different number of episodes if the schedule depends on it: all steps so far would have differed."""
    key = horizon(saved)
    if key and config.train.steps != saved.train.steps:
        raise FewShotError(
            f"train.episodes={config.train.episodes}: the schedule of the run in {config.run_dir} is set up for "
            f"{saved.train.episodes} episodes ({key}={saved.train.steps} steps); leave it out, or train again in "
            "another directory"
        )


def horizon(config: DictConfig) -> str | None:
    """Return the key of the schedule's setting that is the number of training steps; None if there is none."""
    keys = [key for key in HORIZONS if config.schedule is not None and config.schedule.get(key) == config.train.steps]
    return f"schedule.{keys[0]}" if keys else None


def _directory_keys(config: DictConfig) -> set[str]:
    return {f"dataset.source.{key}" for key in directory_keys(config.dataset.source)}


def _differences(ours: DictConfig, theirs: DictConfig, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each key that differs, and a description of the difference for a message."""
    for key in keys:
        our_value, their_value = OmegaConf.select(ours, key), OmegaConf.select(theirs, key)
        if isinstance(our_value, DictConfig) and isinstance(their_value, DictConfig):
            yield from _differences(ours, theirs, (f"{key}.{name!s}" for name in {**our_value, **their_value}))
        elif not same(our_value, their_value) and not (our_value in NOTHING and their_value in NOTHING):
            yield key, f"{key}={our_value} (the run has {their_value})"
