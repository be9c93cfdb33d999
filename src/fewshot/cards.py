"""Cards of trained models: what was trained, on what, how, how well it does, and the digests of the file."""

import re
import shlex
from collections.abc import Mapping
from operator import eq
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fewshot.checkpoints import load_checkpoint
from fewshot.config import OF_ONE_TASK, as_overrides, compose
from fewshot.data.bank import has_bright_ink
from fewshot.errors import FewShotError
from fewshot.models import CARD, FORMAT, MODELS, WEIGHTS, all_models, digests
from fewshot.results import Result, best_validation, find_results, flat, run_config, seed_of, training_settings
from fewshot.runs import write_json

CHOICES = ("dataset", "method", "distance", "encoder", "optimizer", "schedule", "transform", "budget")
# What the command omits: chosen above, repeated elsewhere, or of no effect on the accuracy.
OMITTED = {"choices", "name", "run_dir", "data_dir", "cache_dir", "resume", "trust", "logger", "pictures", "callbacks"}
OMITTED |= {"overrides", "checkpoint_every", "log_every"}
OMITTED |= {"train.steps", "method.classes", "dataset.source.data_dir", "encoder.init"}
REPEATED = ("method.encoder.", "method.distance.")


def write_cards(licences: Mapping[str, str], below: Path = MODELS) -> list[Path]:
    """Write the card of each row of the tables that has weights, and remove those of rows that no longer have any.

    Args:
        licences: of the data, by the name of the data set.
        below: the directory of the rows, ``DATASET/CELL/SEED``.

    Returns:
        The files written.

    Raises:
        FewShotError: the results next to weights are missing or broken, a licence is missing, or there are no rows.
    """
    found = find_results([below])
    rows = {path.parent.relative_to(below.resolve()).as_posix(): result for path, result in found.items()}
    owners = sorted(path.parent.relative_to(below).as_posix() for path in below.rglob(WEIGHTS))
    for owner in owners:
        if owner not in rows:
            raise FewShotError(f"{below / owner / WEIGHTS} has no valid results.json next to it; copy that of its run")
    written = []
    for name, result in rows.items():
        same = [other for other in owners if _is_same_training(rows[other], result)]
        if same:
            card = make_card(name, result, name if name in same else same[0], rows, licences, below)
            write_json(below / name / CARD, card)
            written.append(below / name / CARD)
        else:
            (below / name / CARD).unlink(missing_ok=True)
    if not written:
        raise FewShotError(
            f"no row below {below} has weights; write them with fewshot export checkpoint=RUN_DIR "
            "out=weights.safetensors"
        )
    all_models.cache_clear()
    return written


def make_card(
    name: str, result: Result, owner: str, rows: Mapping[str, Result], licences: Mapping[str, str], below: Path
) -> dict[str, Any]:
    """Make the card of a row of the tables.

    Args:
        name: of the row, ``DATASET/CELL/SEED``.
        result: its results.
        owner: the row next to whose results the weights are.
        rows: the results of all rows, by name.
        licences: see ``write_cards``.
        below: see ``write_cards``.

    Raises:
        FewShotError: the file of the weights is broken, or the data set has no licence.
    """
    file = below / owner / WEIGHTS
    config = OmegaConf.create(load_checkpoint(file)["hyper_parameters"])
    dataset = str(result["dataset"])
    if dataset not in licences:
        raise FewShotError(f"conf/models.yaml names no licence of the data set {dataset}; add it below licences")
    ink = has_bright_ink(get_object(config.dataset.source._target_))
    kind = f"{'grey' if config.dataset.channels == 1 else 'colour'} {'letters' if ink else 'photos'}"
    config_of_test = {key: result["config"].get(key) for key in ("eval_seed", "mirror")}
    best = best_validation(result)
    run = run_config(result)
    cell = name.rpartition("/")[0]
    return {
        "format": FORMAT,
        **{key: result.get(key) for key in ("method", "distance", "encoder", "encoder_parameters", "precision")},
        "expects": {"kind": kind, "size": config.dataset.size, "channels": config.dataset.channels, "ink": ink},
        "dataset": dataset,
        "data": result["data"],
        "licence": licences[dataset],
        "command": training_command(run, rows, (result.get("encoder_init") or {}).get("checkpoint")),
        "settings": {key: run.get(key) for key in ("train", "val", "optimizer", "schedule", "transform")},
        "seed": seed_of(result),
        "seeds": sorted(seed_of(rows[other]) for other in rows if other.rpartition("/")[0] == cell),
        "commit": result.get("commit"),
        "versions": result.get("versions"),
        "machine": result.get("machine"),
        "hours": round(rows[owner]["train_seconds"] / 3600, 2),
        "validation": None if best is None else {key: best.get(key) for key in ("accuracy", "ci95", "episodes")},
        "test": {key: result[key] for key in ("way", "shot", "query", "accuracy", "ci95", "episodes")}
        | {key: value for key, value in config_of_test.items() if value is not None},
        "weights": owner,
        "bytes": file.stat().st_size,
        "sha256": digests(file),
    }


def training_command(config: Mapping[str, Any], rows: Mapping[str, Any], initial: str | None = None) -> str:
    """Return a command that trains with a configuration, from the defaults of today.

    Args:
        config: of the run.
        rows: names of rows: the encoder may have started from one of them.
        initial: the file that the encoder started from.
    """
    return shlex.join(["fewshot", "train", *training_overrides(config, rows, initial)])


def training_overrides(config: Mapping[str, Any], rows: Mapping[str, Any], initial: str | None = None) -> list[str]:
    """Return the overrides of ``training_command``."""
    choices = config["choices"]
    task = [f"{key}={config[key]}" for key in ("way", "shot", "seed")]
    experiment = choices.get("experiment")
    of_one_task = OF_ONE_TASK.fullmatch(experiment or "")
    overrides = [f"experiment={of_one_task[1] if of_one_task else experiment}"] if experiment else []
    composed = compose(*overrides, *task)
    overrides += [
        f"{key}={choices[key]}" for key in CHOICES if choices.get(key) not in (None, composed.choices.get(key))
    ]
    if initial:
        parts = Path(initial.partition("/checkpoints")[0].removesuffix(f"/{WEIGHTS}")).parts
        overrides.append(
            f"encoder.init={next((name for name in rows if parts[-3:] == tuple(name.split('/'))), 'RUN_DIR')}"
        )
    today = compose(*overrides, *task)
    differing = _differing(config, today)
    episodes = {key: value for key, value in differing.items() if key == "train.episodes"}
    if episodes:  # a schedule may follow them
        differing = episodes | _differing(config, compose(*overrides, *task, *as_overrides(episodes)))
    if differing.get("hardware.precision") == "32-true" and today.hardware.precision == "auto":
        del differing["hardware.precision"]  # what auto is, on a processor
    plain = {key: value for key, value in differing.items() if _is_needed(key, value)}
    task += [
        f"{key}={value}" if isinstance(value, str) and re.fullmatch(r"[\w-]+", value) else as_overrides({key: value})[0]
        for key, value in plain.items()
    ]
    return [*overrides, *task]


def _differing(config: Mapping[str, Any], today: DictConfig) -> dict[str, Any]:
    values = dict(flat(OmegaConf.to_container(today)))
    return {key: value for key, value in flat(config) if values.get(key) != value}


def _is_needed(key: str, value: Any) -> bool:
    first = key.partition(".")[0]
    if value is None or OMITTED & {first, key} or key.startswith(REPEATED):
        return False
    return key not in ("way", "shot", "seed") and (first != "hardware" or key == "hardware.precision")


def _is_same_training(one: Result, other: Result) -> bool:
    """Whether two results are of one training: an evaluation records the validations up to the chosen weights only."""
    if (seed_of(one), training_settings(one)) != (seed_of(other), training_settings(other)):
        return False
    curves = [
        [(point["trained_episodes"], point["accuracy"]) for point in result["validations"]] for result in (one, other)
    ]
    return all(map(eq, *curves)) and (all(curves) or one["train_seconds"] == other["train_seconds"])
