"""Evaluate a checkpoint, or a method on a trained encoder: any way and shot, per class, against another checkpoint."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from fewshot.callbacks import Predictions, TestTime
from fewshot.checks import Count, Place, Positive, misfits, refuse
from fewshot.config import FOR_TRAINING, TrainConfig, as_overrides, check
from fewshot.data.bank import SPLITS, ImageBank, ImageClass
from fewshot.data.contents import contents_of, differences, known_to_any
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import EpisodeDataset, EpisodeNumber, check_task
from fewshot.directories import last_checkpoint
from fewshot.embeddings import EmbeddingCache
from fewshot.errors import FewShotError, shortened
from fewshot.files import output_directory, read_json
from fewshot.hardware import check_hardware, keep_freed_memory, machine, precision_like, report_out_of_memory
from fewshot.methods.base import MetricMethod, set_mirror
from fewshot.metrics import Estimate, confusion_counts, count_correct, paired_difference
from fewshot.paths import run_directory
from fewshot.pictures import draw_confusion
from fewshot.results import write_episodes
from fewshot.runs import check_same_data, data_directories, overrides, trained_before, trained_on, write_json
from fewshot.text import make_table, say
from fewshot.trained import (
    FROM_CHECKPOINT,
    REPLACEABLE,
    Trained,
    choices_of,
    load_trained,
    warn_of_other_images,
    with_chosen_data,
    with_chosen_method,
    without_training,
)
from fewshot.training import check_precision, make_data, make_trainer, outcome

TASK = ("way", "shot", "query", "eval_seed", "mirror")
TYPES: dict[str, Any] = {"split": Literal[SPLITS], "concentration": Positive | None, "pictured": Count}
TYPES |= {"allow_other_classes": bool, "mirror": bool | None, "resume": Literal["auto"] | None}
TYPES |= {"data_dir": Place, "cache_dir": Place, **dict.fromkeys(("checkpoint", "against", "out"), Place | None)}
PRINTED = 5  # classes with the lowest accuracy
RARELY = 0.05  # of the episodes


class OneSplit(EpisodeDataModule):
    """Serves the episodes of one split as test episodes, and looks at no other split.

    Args:
        split: "train", "val" or "test".
        dataset: see ``EpisodeDataModule``.
        concentration: see ``EpisodeDataset``.
        settings: see ``EpisodeDataModule``.

    Attributes:
        left_out: classes that no episode may draw.
    """

    def __init__(self, split: str, dataset: DictConfig, *, concentration: float | None = None, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.concentration = concentration
        self.split, self.left_out = split, list[str]()
        if split == "val" and not self.has_validation:
            raise FewShotError(
                "split=val: the run was trained on the validation classes, too (train.also_on=val); choose split=test"
            )

    @property
    def bank(self) -> ImageBank:
        """The images of the data set without those of ``left_out``."""
        return super().bank.without(self.left_out)

    def check_classes(self, classes: Sequence[ImageClass]) -> None:
        """Refuse a split that is too small even with all its classes, see ``EpisodeDataModule``."""
        way, shot, query = (self.episode[key] for key in ("way", "shot", "query"))
        counts = {one.name: one.count for one in classes if one.split in self.parts_of(self.split)}
        if len(counts) < way or max(counts.values()) < shot + query:
            check_task(self.split, list(counts), list(counts.values()), way, shot, query)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Make the episodes."""
        dataset = EpisodeDataset(self.bank, self.split, **self.episode, concentration=self.concentration)
        if self.concentration is not None:
            _check_imbalance(dataset, self.concentration)
        self.datasets = {"test": dataset}


@dataclass(frozen=True)
class Evaluation:
    """What a method predicted in the episodes of a split.

    Attributes:
        data: the data module that served them as test episodes.
        predictions: for each episode, the classes with the largest logit of each query, bool ``[queries, way]``.
        estimate: the accuracy.
        trainer: the trainer that ran the test.
        seconds: how long the method took in total, without embedding the images, see ``TestTime``.
    """

    data: OneSplit
    predictions: dict[EpisodeNumber, NDArray[np.bool_]]
    estimate: Estimate
    trainer: pl.Trainer
    seconds: float

    @property
    def correct(self) -> NDArray[np.float64]:
        """Number of correct predictions per episode, float64 ``[episodes]``; ties as in ``fewshot.metrics.credit``."""
        return count_correct(self.data.datasets["test"], self.predictions)


def evaluate(config: DictConfig) -> float:
    """Evaluate a method, and write ``results.json`` and ``confusion.png``.

    By default the episodes are those of the run's own test, and so is the accuracy, to the last digit.

    Args:
        config: the composed ``conf/evaluate.yaml``.

    Returns:
        The accuracy, a fraction.

    Raises:
        FewShotError: a checkpoint is broken, a number is out of range, or the data are missing; or the two checkpoints
            were trained on different classes, so that they cannot be compared.
    """
    # What the groups choose is composed with the keys of a training, which it may depend on.
    left_out = (*FROM_CHECKPOINT, *REPLACEABLE, *FOR_TRAINING)
    config = OmegaConf.masked_copy(config, [str(key) for key in config if key not in left_out])
    # Not in place: Hydra's record of the command line is read-only, and may have an interpolation.
    config = DictConfig(OmegaConf.to_container(config, resolve=True))
    if config.checkpoint is None and not choices_of(config.overrides, ["encoder"]):
        raise FewShotError(
            "there is nothing to evaluate: name a run with checkpoint=RUN_DIR, or choose an encoder that needs no "
            "training, a method and a data set: encoder=pretrained method=protonet dataset=miniimagenet"
        )
    refuse(misfits(config, TYPES))
    if config.out is not None and last_checkpoint(Path(config.out).expanduser()).exists():
        raise FewShotError(f"out={config.out} contains a run; choose a different directory, to keep its results")
    settings = [override for override in config.overrides if not override.startswith("resume=")]
    if config.resume == "auto" and (finished := _finished(output_directory(config.out, "evaluate"), settings)):
        say(f"{finished[0]}: kept, because it is finished")
        return finished[1]
    trained = [_first(config)]
    if config.against is not None:
        trained.append(_load(config.against, config))
    tasks = [task_of(run.config, config) for run in trained]
    for other in tasks[1:]:
        _check_comparable(tasks[0], other)
        for key in (*TASK, "test"):
            other[key] = tasks[0][key]
    for task in tasks:
        check(task)
    check_hardware(tasks[0].hardware)
    keep_freed_memory()
    splits = [open_split(task, config.split, config.concentration) for task in tasks]
    _leave_out_known_classes(trained, splits, config)
    with report_out_of_memory("lower way, shot or query, or choose hardware=cpu"):
        own, *others = map(evaluate_split, trained, tasks, splits)

    out = output_directory(config.out, "evaluate")
    dataset, names = own.data.datasets["test"], own.data.bank.class_names(config.split)
    together, predicted = confusion_counts(dataset, own.predictions)
    results = _results(trained[0], tasks[0], config, own)
    seen = np.flatnonzero(together.diagonal())
    accuracies = predicted.diagonal()[seen] / together.diagonal()[seen]
    results["command"] = settings
    results["classes"] = {names[number]: accuracy for number, accuracy in zip(seen, accuracies.tolist(), strict=True)}
    for rival, theirs in zip(trained[1:], others, strict=True):
        difference = paired_difference(own.correct, theirs.correct, len(dataset.query_labels))
        results |= {
            "against": {"checkpoint": rival.name, "method": rival.config.choices.method, **theirs.estimate._asdict()},
            "difference": {"mean": difference.accuracy, "ci95": difference.ci95, "episodes": difference.episodes},
        }
    # The report takes the accuracy in a results.json for that on test classes.
    written = out / ("results.json" if config.split == "test" else f"results_{config.split}.json")
    if config.split == "test":
        write_episodes(written, own.correct)
    write_json(written, results)
    worst = seen[np.argsort(accuracies, kind="stable")]
    picture = out / "confusion.png"
    draw_confusion(together, predicted, names, worst[: config.pictured]).savefig(picture, dpi=120)
    _print(results, [names[number] for number in worst[:PRINTED]], trained[0].method.assumes_balance)
    say(written, picture)
    return own.estimate.accuracy


def _finished(folder: Path, settings: Sequence[str]) -> tuple[Path, float] | None:
    """The results in a directory and their accuracy, if the same command wrote them."""
    for path in (folder / "results.json", *folder.glob("results_*.json")):
        with contextlib.suppress(OSError, ValueError):
            results = read_json(path)
            if isinstance(results, dict) and results.get("command") == settings:
                return path, float(results["accuracy"])
    return None


def open_split(config: DictConfig, split: str, concentration: float | None = None) -> OneSplit:
    """Make the data module of a run's configuration that serves one split; see ``OneSplit``."""
    return cast(OneSplit, make_data(config, partial(OneSplit, split, concentration=concentration)))


def evaluate_split(trained: Trained, config: DictConfig, data: OneSplit | None = None) -> Evaluation:
    """Evaluate a trained method on ``test.episodes`` episodes of a split.

    Args:
        trained: the method.
        config: the configuration of its run, with any way, shot, query, ``eval_seed`` and ``test.episodes``.
        data: the split, from ``open_split``; None: the test split.

    Raises:
        FewShotError: ``config`` requests more than one device, or the data are missing.
    """
    data = open_split(config, "test") if data is None else data
    set_mirror(trained.method, config.mirror)
    kept, time = Predictions(), TestTime()
    trainer = make_trainer(config, kept, time)
    check_precision(config, trainer)
    if trainer.world_size > 1:
        raise FewShotError(
            f"hardware.devices={config.hardware.devices}: evaluation uses one device; set hardware.devices=1"
        )
    trainer.loggers = []
    if isinstance(trained.method, MetricMethod):
        # Methods that only embed with the same encoder share its embeddings.
        own = type(trained.method).embed_images is not MetricMethod.embed_images
        described = {
            "encoder": OmegaConf.to_container(config.method if own else config.method.get("encoder", config.method)),
            "data": {key: config.dataset[key] for key in ("size", "channels", "normalise")},
            "images": data.bank.images_sha256,
            "mirror": config.mirror,
            "precision": str(trainer.precision),
            "machine": machine(trainer.strategy.root_device),
            "torch": torch.__version__,
        }
        trained.method.embedding_cache = EmbeddingCache(Path(config.cache_dir).expanduser() / "embeddings", described)
    trainer.test(trained.method, data, verbose=False)
    return Evaluation(data, kept.predictions, trained.method.estimates["test"], trainer, time.seconds)


def _first(config: DictConfig) -> Trained:
    """What this command evaluates first, or alone; see ``conf/evaluate.yaml``."""
    if config.checkpoint is None:
        return without_training(config.overrides, data_directories(config))
    others = [override for override in config.overrides if override not in choices_of(config.overrides, ["dataset"])]
    return with_chosen_method(_load(config.checkpoint, config), others)


def _load(checkpoint: str, config: DictConfig) -> Trained:
    """Load a checkpoint, for its own data set or the one that this command chooses."""
    places = data_directories(config)
    return with_chosen_data(load_trained(checkpoint, trust=config.trust, places=places), config.overrides, places)


def task_of(run: DictConfig, config: DictConfig) -> DictConfig:
    """The configuration of a run with the task and the hardware of this command, see ``conf/evaluate.yaml``."""
    task = OmegaConf.merge(OmegaConf.structured(TrainConfig), run)
    assert isinstance(task, DictConfig)
    for key in TASK:
        if config[key] is not None:
            task[key] = config[key]
    if config.episodes is not None:
        task.test.episodes = config.episodes
    precision = config.hardware.precision or precision_like(str(run.hardware.precision), config.hardware)
    task.hardware = OmegaConf.merge(config.hardware, {"precision": precision})
    task.cache_dir, task.run_dir = config.cache_dir, config.out
    return task


def _leave_out_known_classes(trained: Sequence[Trained], splits: Sequence[OneSplit], config: DictConfig) -> None:
    """Compare the data with those of each training; if they may differ, leave out classes that were trained on."""
    known: list[str] = []
    for run, data in zip(trained, splits, strict=True):
        path = run.path
        warn_of_other_images(run.checkpoint.get("hyper_parameters", run.config)["method"], run.name, config.split)
        if path is None:
            continue
        then = trained_on(run.checkpoint, Path(run_directory(str(path))))
        now = contents_of(data.bank)
        chosen = bool(choices_of(config.overrides, ["dataset"]))
        if then is not None and (chosen or (config.allow_other_classes and differences(then, now))):
            source = run.checkpoint["hyper_parameters"]["dataset"]["source"]["_target_"]
            seen = [(source, then), *trained_before(run.checkpoint, path)]
            known += known_to_any(seen, now, run.config.dataset.source._target_, config.split)
        elif then is None and chosen:
            say(f"warning: {path} does not record its training classes, so they were not compared", error=True)
        else:
            fix = "test on the classes that it was not trained on with allow_other_classes=true"
            check_same_data(then, data.bank, path, fix)
    known = list(dict.fromkeys(known))
    for data in splits:
        data.left_out = known
    if known:
        say(f"left out {len(known):,} {config.split} classes that were trained on: {shortened(known)}")


def _check_imbalance(dataset: EpisodeDataset, concentration: float) -> None:
    """Refuse to call episodes unbalanced whose classes have too few images for that; warn if some have.

    Raises:
        FewShotError: every class has exactly ``query`` images besides its support.
    """
    most, query = int(dataset.counts.max()) - dataset.shot, dataset.query
    if most == query:
        raise FewShotError(
            f"concentration={concentration}: classes have {most + dataset.shot} images, so with shot={dataset.shot} "
            f"and query={query} each has as many queries; lower query"
        )
    shares = np.random.default_rng(0).dirichlet(np.full(dataset.way, concentration), 10_000)
    cut = float((shares.max(1) * dataset.way * query > most).mean())
    if cut >= RARELY:
        say(
            f"warning: concentration={concentration}: classes have at most {most} queries, too few in {cut:.0%} of the "
            "episodes, which are therefore more balanced; lower query",
            error=True,
        )


def _check_comparable(*tasks: DictConfig) -> None:
    """Refuse to compare on classes that one of the two may have been trained on."""
    free = ("data_dir", "size", "channels")  # may differ
    first, second = ({key: value for key, value in task.dataset.source.items() if key not in free} for task in tasks)
    if first != second:
        differ = [key for key in {**first, **second} if first.get(key) != second.get(key)]
        raise FewShotError(
            "the two cannot be compared: their data or classes differ "
            f"(dataset.source.{', dataset.source.'.join(map(str, differ))}), so one may have been trained on classes "
            "that the other is tested on; name two runs on the same data and split"
        )


def _results(trained: Trained, task: DictConfig, config: DictConfig, tested: Evaluation) -> dict[str, Any]:
    """The same fields that training writes, for this evaluation."""
    record = trained.checkpoint.get("callbacks", {}).get("Record", {})
    path = trained.path
    started = [] if path is None else overrides(Path(run_directory(str(path))))
    changes = as_overrides({key: config[key] for key in TASK if config[key] is not None})
    changes += [f"concentration={config.concentration}"] if config.concentration is not None else []
    changes += [f"test.episodes={config.episodes}"] if config.episodes is not None else []
    validations = record.get("validations", [])
    run_config: Any = trained.checkpoint.get(
        "hyper_parameters", OmegaConf.to_container(trained.config)
    )  # of the training
    other = path is not None and bool(choices_of(config.overrides, ["dataset"]))
    changes += choices_of(config.overrides, (*FROM_CHECKPOINT, *REPLACEABLE))
    return outcome(task, trained.method, tested.data.bank, tested.trainer) | {
        "split": config.split,
        "concentration": config.concentration,
        "trained_on": run_config["choices"]["dataset"] if other else None,
        "test_seconds_per_episode": tested.seconds / tested.estimate.episodes,
        "checkpoint": trained.name,
        "left_out_classes": tested.data.left_out,
        "precisions": record.get("precisions"),
        "encoder_init": record.get("encoder_init"),
        "weights": "untrained" if path is None else path.stem,  # the report counts the best on validation classes
        "run_config": run_config,
        "val_accuracy": max((point["accuracy"] for point in validations), default=None),
        "train_seconds": record.get("seconds"),
        "validations": validations,
        "overrides": [*started, *changes],
    }


def _print(results: dict[str, Any], worst: Sequence[str], assumes_balance: bool) -> None:
    task = f"{results['way']}-way {results['shot']}-shot"
    rows = [
        (
            result["checkpoint"],
            result["method"],
            f"{result['accuracy']:.2%} ± {result['ci95']:.2%}",
            f"{result['episodes']:,}",
        )
        for result in (results, results.get("against"))
        if result is not None
    ]
    title = f"{task} accuracy on {results['split']} classes, with 95% interval"
    say(make_table(title, ["checkpoint", "method", "accuracy", "episodes"], rows, numbers=("accuracy", "episodes")))
    if "difference" in results:
        difference = results["difference"]
        mean, ci95 = difference["mean"], difference["ci95"]
        verdict = (
            "no significant difference" if abs(mean) <= ci95 else f"the {'first' if mean > 0 else 'second'} is better"
        )
        say(f"first - second, episode by episode: {100 * mean:+.2f} ± {100 * ci95:.2f} points: {verdict}")
    if results["transductive"]:
        say(
            f"method={results['method']} is transductive: it uses all queries of an episode together"
            + (
                ", and assumes balanced ones; concentration=2 tests it on unbalanced ones"
                if assumes_balance and results["concentration"] is None
                else ""
            )
        )
    say("lowest: " + ", ".join(f"{name} {results['classes'][name]:.1%}" for name in worst))
