"""The directory of a training run: one run at a time, never overwritten, and resumed after an interruption."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities import rank_zero_only

from fewshot.checkpoints import check_weights, load_checkpoint, read_tensors, shapes, without_initial_weights
from fewshot.config import ROOT, is_group, training_steps
from fewshot.data.bank import ImageBank
from fewshot.data.contents import Contents, contents_of, differences, read_contents, read_names
from fewshot.errors import FewShotError, reason
from fewshot.files import read_json, read_text, write_atomically
from fewshot.results import is_evaluation, wrong
from fewshot.text import say
from fewshot.trust import CHOSEN_ON_RESUME, directory_keys, plain

# What PyTorch's schedules call the number of steps that they are made for; and what ours and others' should.
HORIZONS = ("T_max", "total_steps", "total_iters", "steps")
# What decides the result of a run, and of that what may differ all the same when it is resumed. The rest
# (hardware, places, logging) may differ anyway.
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
NOTHING = (None, "none")  # chosen in a group; a run of an earlier version lacks the group
MAY_DIFFER = {
    *("train.episodes", "train.steps", "train.on_nan"),
    *("method.task_batching", "method.vmap_tasks", "method.recompute"),
    *("method.encoder.file", "method.encoder.load"),  # the weights are in the checkpoint
}


def last_checkpoint(run_dir: Path) -> Path:
    """Where the checkpoint to go on from lies."""
    return run_dir / "checkpoints" / "last.ckpt"


def new_run_dir(name: str) -> Path:
    """A directory for a run that names none: ``outputs/DATE/TIME_NAME``, as on the command line."""
    now = datetime.now()  # the user's own clock
    return ROOT / "outputs" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}_{name}"


def best_checkpoint(run_dir: Path) -> Path:
    """Where the weights with the best validation accuracy lie."""
    return run_dir / "checkpoints" / "best.ckpt"


def results_file(run_dir: Path) -> Path:
    """Where the results lie once the run is complete."""
    return run_dir / "results.json"


def newest_run(folder: Path) -> Path:
    """The complete run below a folder that ended last.

    Raises:
        FewShotError: there is none.
    """
    runs = [path.parent for path in folder.rglob(results_file(Path()).name) if best_checkpoint(path.parent).is_file()]
    if not runs:
        raise FewShotError(
            f"no complete run lies below {folder}; train one first by make train, or name one: checkpoint=RUN_DIR"
        )
    return max(runs, key=lambda run: results_file(run).stat().st_mtime_ns)


@contextlib.contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of a directory, for as long as this process lives.

    Raises:
        FewShotError: another run is at work there.
    """
    lock = FileLock(run_dir / ".lock", timeout=0)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise FewShotError(
                f"another run is at work in {run_dir}; wait for its end, or choose another directory with "
                "hydra.run.dir=PATH"
            ) from None
    try:
        yield
    finally:
        lock.release()


def has_run(run_dir: Path) -> bool:
    """Whether a run has saved something in a directory."""
    return last_checkpoint(run_dir).exists() or results_file(run_dir).exists()


def is_taken(run_dir: Path) -> bool:
    """Whether a directory is that of another run: one that has saved something, or is at work there.

    Among the processes of one run it is taken for all but the first, which may be at work there.
    """
    if rank_zero_only.rank != 0 or has_run(run_dir):  # type: ignore[attr-defined]
        return True
    lock = run_dir / ".lock"
    try:
        with FileLock(lock, timeout=0) if lock.exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


def load_for_resume(config: DictConfig) -> tuple[DictConfig, dict[str, Any] | None]:
    """What ``resume`` asks for.

    Args:
        config: as composed from the command line.

    Returns:
        The configuration to run with, and the checkpoint to go on from; None for a run that begins. With
        ``resume=RUN_DIR`` the configuration is that of the checkpoint, but for the keys on the command line.

    Raises:
        FewShotError: there is a run in the directory that ``resume`` does not ask for, or none that it asks for; its
            checkpoint is broken; or what decides the result differs from the run to go on with.
    """
    run_dir = Path(config.run_dir)
    path = last_checkpoint(run_dir)
    if config.resume is None:
        # Other ranks are started by the one that looked, and by now it may have written.
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if first and has_run(run_dir):
            raise FewShotError(
                f"{run_dir} holds a run already: go on with it by resume={run_dir}, or choose another directory with "
                "hydra.run.dir=PATH"
            )
        return config, None
    if not path.exists():
        if results_file(run_dir).exists() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            raise FewShotError(
                f"{run_dir} holds the results of a run without {path.relative_to(run_dir)}, by which to know it; put "
                "it back, or choose another directory with hydra.run.dir=PATH"
            )
        if config.resume != "auto":
            raise FewShotError(
                f"there is no {path} to go on from; name the directory of a run, or start one without resume"
            )
        return config, None
    _refuse_links(run_dir)
    _name_other_logs(run_dir, config)
    own = OmegaConf.to_container(config)
    checkpoint = load_checkpoint(path, trust=config.trust, places=data_directories(config), own=own)
    saved = OmegaConf.create(checkpoint["hyper_parameters"])
    if config.resume != "auto":
        config = _with_overrides(saved, config)
    if config.method.get("classes", 0) is None:  # the data say how many, and they are compared later
        config.method.classes = saved.method.get("classes")
    _keep_horizon(saved, config)
    free = MAY_DIFFER | _places_in(config)
    differ = [line for key, line in _differences(config, saved, DECISIVE) if key not in free]
    if differ:
        raise FewShotError(
            f"{run_dir} holds a run with other settings: {', '.join(differ)}; resume={run_dir} resumes it as it is, "
            "or choose another directory with hydra.run.dir=PATH"
        )
    try:
        check_weights(without_initial_weights(config.method), checkpoint["state_dict"])
    except ValueError as error:
        raise cannot_resume(path, error) from error
    return config, checkpoint


def cannot_resume(path: Path, error: Exception) -> FewShotError:
    """What a last checkpoint does not fit."""
    return FewShotError(
        f"the run cannot be gone on with: {path} is broken, or of another version: {reason(error)}; train anew into "
        "another directory"
    )


def data_directories(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where this command has data sets and image banks lie."""
    return {key: config[key] for key in ("data_dir", "cache_dir")}


def complete_results(config: DictConfig) -> dict[str, Any] | None:
    """The results of a run that is complete; None if there are none yet, or they are of fewer episodes."""
    path = results_file(Path(config.run_dir))
    try:
        results = read_json(path)
        why = wrong(results)
        if why is not None:
            raise ValueError(why)
        if is_evaluation(results):
            raise ValueError("it is that of an evaluation")
        theirs = OmegaConf.create({**plain(results["config"])})
        free = (MAY_DIFFER | _places_in(config)) - {"train.episodes", "train.steps"}
        as_asked = all(key in free for key, _ in _differences(config, theirs, [*DECISIVE, "test"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException) as error:
        raise FewShotError(f"{path} is broken ({reason(error)}); delete it, and the test is done again") from error
    theirs_precision, ours = results.get("precision"), str(config.hardware.precision)
    if as_asked and theirs_precision not in (None, ours):
        say(f"warning: the run is complete, with hardware.precision={theirs_precision}, and not {ours}")
    return results if as_asked else None


def trained_on(checkpoint: Mapping[str, Any], run_dir: Path | None) -> Contents | None:
    """What the data held that a checkpoint was trained on; None where nothing says so.

    Args:
        checkpoint: see ``load_checkpoint``; older ones do not know.
        run_dir: of its run, whose ``classes.json`` and ``results.json`` say it, too.

    Raises:
        FewShotError: what says so is broken.
    """
    if "data" in checkpoint:
        try:
            return read_contents(checkpoint["data"])
        except ValueError as error:
            raise FewShotError(f"the checkpoint of {run_dir} is broken: {reason(error)}; train anew") from error
    if run_dir is None:
        return None
    path = run_dir / "classes.json"
    try:
        return read_names(read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FewShotError(
            f"{path} is broken ({reason(error)}); delete it, if you know the data to be the same"
        ) from error


def check_same_data(then: Contents | None, bank: ImageBank, place: Path, mend: str) -> None:
    """Refuse data that are not those a run was trained on: what it knows could be what it is tested on.

    Args:
        then: what they held, see ``trained_on``.
        bank: what they hold now.
        place: of the run or of its checkpoint.
        mend: what to do about it, beside putting the data back.

    Raises:
        FewShotError: names the differences.
    """
    if then is None:
        rank_zero_only(say)(f"warning: nothing in {place} says which classes it was trained on; they were not compared")
        return
    changes = differences(then, contents_of(bank))
    if changes:
        raise FewShotError(
            f"the data are not those that {place} was trained on: {'; '.join(changes)}; put them back as they were, or "
            f"name where they lie by data_dir=PATH, or {mend}"
        )


def check_best(run_dir: Path, checkpoint: dict[str, Any]) -> None:
    """See to it that the best weights so far are there, before more is trained: they may be what is tested.

    Where the last checkpoint has them, too, they are written anew.

    Raises:
        FewShotError: they are lost, or of another run.
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
    if not path.exists():
        if since[best] != trained or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            raise FewShotError(
                f"{path} is not there, which holds the weights of the best validation (after {since[best]:,} training "
                "episodes); put it back, or train anew into another directory"
            )
        write_atomically(path, last_checkpoint(run_dir).read_bytes())
        say(f"{path} was not there; the last checkpoint holds the same weights, and it was written anew")
        return
    try:
        found = read_tensors(path)
        theirs = found["callbacks"]["Record"]["validations"]
        both = min(len(theirs), len(validations))  # a kill can come between the two files
        if theirs[:both] != validations[:both]:
            raise ValueError("its validations are those of another run")
        if shapes(found["state_dict"]) != shapes(checkpoint["state_dict"]):
            raise ValueError("its weights are not those of the method")
    except Exception as error:  # of what kind depends on how the file is broken
        raise FewShotError(
            f"{path} is broken, or of another run ({reason(error)}); put the right one back, or train anew into "
            "another directory"
        ) from error


def overrides(run_dir: Path) -> list[str]:
    """Those that the run was started with, as Hydra has written them down; of a file that is broken, none."""
    path = run_dir / ".hydra" / "overrides.yaml"
    try:
        # Not by OmegaConf, which would resolve what stands in them.
        found = yaml.safe_load(read_text(path))
        if not isinstance(found, list) or not all(type(one) is str for one in found):
            raise ValueError("it is no list of texts")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        say(f"skipped {path}: {reason(error)}", error=True)
        return []
    return found


def write_json(path: Path, content: Any) -> None:
    """Write a file whole, or not at all; see ``write_atomically``."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _refuse_links(run_dir: Path) -> None:
    """What is written to a run that is resumed, by its logger too, stays in its directory, whoever made that."""
    inside = run_dir.resolve()
    for path in run_dir.rglob("*"):
        # Weights & Biases links to its own cache from there, and writes each attempt to a new folder.
        if path.relative_to(run_dir).parts[:-1][:1] == ("wandb",):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise FewShotError(
                f"{path} is a link to {path.resolve()}, and a run writes to its own directory only: put there what the "
                "link names"
            )


def chosen_on_resume(given: Iterable[str]) -> list[str]:
    """Those overrides that choose what a checkpoint does not: a resumed run takes them from its command line."""
    return [override for override in given if _is_readers_own(override.partition("=")[0])]


def _is_readers_own(key: str) -> bool:
    return key.lstrip("+~").partition(".")[0].partition("@")[0] in CHOSEN_ON_RESUME


def _name_other_logs(run_dir: Path, config: DictConfig) -> None:
    """Say which logger and callbacks the run was started with, where this command has not chosen any."""
    chosen = {override.partition("=")[0] for override in chosen_on_resume(config.overrides)}
    started = [
        override
        for override in chosen_on_resume(overrides(run_dir))
        # The file may be anyone's: what a reader is asked to type is a choice and nothing else.
        if re.fullmatch(r"(logger|callbacks)=[\w/]+", override) and override.partition("=")[0] not in chosen
    ]
    if started:
        say(f"the run was started with {' '.join(started)}, and this command is not: add it to keep that log")


def _with_overrides(saved: DictConfig, config: DictConfig) -> DictConfig:
    changed = saved.copy()
    for override in OverridesParser.create().parse_overrides(list(config.overrides)):
        key = override.key_or_group
        if _is_readers_own(key):
            continue
        if is_group(key) and key != "hardware":
            raise FewShotError(f"{override.input_line}: a run that is resumed keeps its {key}; leave it out")
        try:
            OmegaConf.update(changed, key, OmegaConf.select(config, key), merge=False)
        except (AssertionError, LookupError, TypeError, ValueError, OmegaConfBaseException) as error:
            raise FewShotError(
                f"{override.input_line}: the run has nothing of that name to change: {reason(error)}"
            ) from error
    for key in ("run_dir", "resume", "trust", "overrides", *CHOSEN_ON_RESUME):
        changed[key] = config[key]
    changed.train.steps = training_steps(changed.train.episodes, changed.train.meta_batch)
    return changed


def _keep_horizon(saved: DictConfig, config: DictConfig) -> None:
    """Refuse another number of episodes where the schedule depends on it: every step so far would have been another."""
    horizons = [key for key in HORIZONS if saved.schedule is not None and saved.schedule.get(key) == saved.train.steps]
    if horizons and config.train.steps != saved.train.steps:
        raise FewShotError(
            f"train.episodes={config.train.episodes}: the schedule of the run in {config.run_dir} is made for "
            f"{saved.train.episodes} episodes (schedule.{horizons[0]}={saved.train.steps} steps); leave it out, or "
            "train anew into another directory"
        )


def _places_in(config: DictConfig) -> set[str]:
    return {f"dataset.source.{key}" for key in directory_keys(config.dataset.source)}


def _differences(ours: DictConfig, theirs: DictConfig, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The keys that differ, and how, for a message."""
    for key in keys:
        one, other = OmegaConf.select(ours, key), OmegaConf.select(theirs, key)
        if isinstance(one, DictConfig) and isinstance(other, DictConfig):
            yield from _differences(ours, theirs, (f"{key}.{name!s}" for name in {**one, **other}))
        elif one != other and not (one in NOTHING and other in NOTHING):
            yield key, f"{key}={one} (there {other})"
