"""Test the weights of a checkpoint: at any way and shot, class by class, and against those of another."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from fewshot.callbacks import Answers
from fewshot.config import TrainConfig, check
from fewshot.data.bank import SPLITS, ImageBank, ImageClass
from fewshot.data.contents import contents_of, differences, known_to
from fewshot.data.datamodule import EpisodeDataModule
from fewshot.data.episodes import EpisodeDataset, EpisodeNumber, check_task
from fewshot.errors import FewShotError, shortened
from fewshot.files import output_directory
from fewshot.hardware import check_hardware, keep_freed_memory, memory_in_a_line
from fewshot.metrics import Estimate, meetings_of, paired_difference
from fewshot.pictures import draw_confusion
from fewshot.runs import check_same_data, last_checkpoint, overrides, places_of, trained_on, write_json
from fewshot.text import make_table, say
from fewshot.trained import Trained, load_trained
from fewshot.training import make_data, make_trainer, outcome

TASK = ("way", "shot", "query", "eval_seed")
TOLD = 5  # classes that are printed


class OneSplit(EpisodeDataModule):
    """Serves the episodes of one split as those of the test, and looks at no other.

    Args:
        split: "train", "val" or "test".
        dataset: see ``EpisodeDataModule``.
        settings: see ``EpisodeDataModule``.

    Attributes:
        left_out: classes that are not to be met.
    """

    def __init__(self, split: str, dataset: DictConfig, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.split, self.left_out = split, list[str]()

    @property
    def bank(self) -> ImageBank:
        """The images of the data set, without the classes that are left out."""
        return super().bank.without(self.left_out)

    def check_classes(self, classes: Sequence[ImageClass]) -> None:
        """Refuse what no choice of classes to leave out would allow, see ``EpisodeDataModule``."""
        way, shot, query = (self.episode[key] for key in ("way", "shot", "query"))
        counts = {one.name: one.count for one in classes if one.split == self.split}
        if len(counts) < way or max(counts.values()) < shot + query:
            check_task(self.split, list(counts), list(counts.values()), way, shot, query)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Check the split against what is asked of it."""
        self.datasets = {"test": EpisodeDataset(self.bank, self.split, **self.episode)}


@dataclass(frozen=True)
class Evaluation:
    """What a method predicted in the episodes of a split.

    Attributes:
        data: the data module that served them as test episodes.
        answers: of each episode the classes with the largest logit of each query, bool ``[queries, way]``.
        estimate: the accuracy.
        trainer: the trainer that ran the test.
    """

    data: OneSplit
    answers: dict[EpisodeNumber, NDArray[np.bool_]]
    estimate: Estimate
    trainer: pl.Trainer

    @property
    def right(self) -> NDArray[np.float64]:
        """Right answers, float64 ``[episodes]``: equal logits share one, see ``fewshot.metrics.credit``."""
        answers = np.stack(list(self.answers.values()))
        labels = self.data.datasets["test"].query_labels.numpy()
        right = answers[:, np.arange(len(labels)), labels]
        return np.asarray((right / answers.sum(2)).sum(1), dtype=np.float64)


def evaluate(config: DictConfig) -> float:
    """Test the weights of a checkpoint, and write ``results.json`` and ``confusion.png``.

    The episodes are those of the run's own test, if nothing else is asked for: the accuracy is then the same to the
    last digit.

    Args:
        config: the composed ``conf/evaluate.yaml``.

    Returns:
        The accuracy, a fraction.

    Raises:
        FewShotError: a checkpoint is broken, a number is out of range, or the data are not there; or the other
            checkpoint was trained on another choice of classes, so that the two cannot be compared.
    """
    OmegaConf.resolve(config)
    if config.checkpoint is None:
        raise FewShotError("no checkpoint is named; name the directory of a run by checkpoint=RUN_DIR")
    if config.split not in SPLITS:
        raise FewShotError(f"split={config.split} must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    if not isinstance(config.pictured, int) or config.pictured < 1:
        raise FewShotError(f"pictured={config.pictured} must be a whole number of at least 1")
    if config.out is not None and last_checkpoint(Path(config.out).expanduser()).exists():
        raise FewShotError(f"out={config.out} holds a run, whose results would be lost; choose another directory")
    named = [place for place in (config.checkpoint, config.against) if place is not None]
    trained = [load_trained(place, trust=config.trust, places=places_of(config)) for place in named]
    asked = [_asked(of.config, config) for of in trained]
    for other in asked[1:]:
        _comparable(asked[0], other)
        for key in (*TASK, "test"):
            other[key] = asked[0][key]
    for one in asked:
        check(one)
    check_hardware(asked[0].hardware)
    keep_freed_memory()
    splits = [open_split(task, config.split) for task in asked]
    _leave_out_known_classes(trained, splits, config)
    with memory_in_a_line("lower way, shot or query, or choose hardware=cpu"):
        own, *others = map(evaluate_split, trained, asked, splits)

    out = output_directory(config.out, "evaluate")
    dataset, names = own.data.datasets["test"], own.data.bank.class_names(config.split)
    met, taken = meetings_of(dataset, own.answers)
    results = _results(trained[0], asked[0], config, own)
    seen = np.flatnonzero(met.diagonal())
    accuracies = taken.diagonal()[seen] / met.diagonal()[seen]
    results["classes"] = {names[of]: accuracy for of, accuracy in zip(seen, accuracies.tolist(), strict=True)}
    for rival, theirs in zip(trained[1:], others, strict=True):
        difference = paired_difference(own.right, theirs.right, len(dataset.query_labels))
        results |= {
            "against": {"checkpoint": str(rival.path), **theirs.estimate._asdict()},
            "difference": {"mean": difference.accuracy, "ci95": difference.ci95, "episodes": difference.episodes},
        }
    # The report counts what is called results.json as the accuracy on test classes.
    written = out / ("results.json" if config.split == "test" else f"results_{config.split}.json")
    write_json(written, results)
    worst = seen[np.argsort(accuracies, kind="stable")]
    picture = out / "confusion.png"
    draw_confusion(met, taken, names, worst[: config.pictured]).savefig(picture, dpi=120)
    _tell(results, [names[of] for of in worst[:TOLD]])
    say(written, picture)
    return own.estimate.accuracy


def open_split(config: DictConfig, split: str) -> OneSplit:
    """The data module of a run's configuration, to serve one split; see ``OneSplit``."""
    return cast(OneSplit, make_data(config, partial(OneSplit, split)))


def evaluate_split(trained: Trained, config: DictConfig, data: OneSplit | None = None) -> Evaluation:
    """Evaluate a trained method on ``test.episodes`` episodes of a split.

    Args:
        trained: the method.
        config: the configuration of its run, with any way, shot, query, ``eval_seed`` and ``test.episodes``.
        data: the split, from ``open_split``; None: the test's.

    Raises:
        FewShotError: ``config`` asks for more than one device, or the data are not there.
    """
    data = open_split(config, "test") if data is None else data
    kept = Answers()
    trainer = make_trainer(config, kept)
    if trainer.world_size > 1:
        raise FewShotError(f"hardware.devices={config.hardware.devices}: a test runs on one, hardware.devices=1")
    trainer.loggers = []
    trainer.test(trained.method, data, verbose=False)
    return Evaluation(data, kept.answers, trained.method.estimates["test"], trainer)


def _asked(run: DictConfig, config: DictConfig) -> DictConfig:
    """The configuration of a run, with what is asked for in place of what it had."""
    asked = OmegaConf.merge(OmegaConf.structured(TrainConfig), run)
    assert isinstance(asked, DictConfig)
    for key in TASK:
        if config[key] is not None:
            asked[key] = config[key]
    if config.episodes is not None:
        asked.test.episodes = config.episodes
    precision = config.hardware.precision or run.hardware.precision
    asked.hardware = OmegaConf.merge(config.hardware, {"precision": precision})
    asked.cache_dir, asked.run_dir = config.cache_dir, config.out
    return asked


def _leave_out_known_classes(trained: Sequence[Trained], splits: Sequence[OneSplit], config: DictConfig) -> None:
    """Compare the data with those of the trainings; where they may differ, leave out what was trained on."""
    if not isinstance(config.allow_other_classes, bool):
        raise FewShotError(f"allow_other_classes={config.allow_other_classes} must be true or false")
    known: list[str] = []
    for run, data in zip(trained, splits, strict=True):
        path = run.path
        then = trained_on(run.checkpoint, path.parents[1] if path.parent.name == "checkpoints" else None)
        now = contents_of(data.bank)
        if then is not None and config.allow_other_classes and differences(then, now):
            known += known_to(then, now, config.split)
        else:
            mend = "test on the classes that it was not trained on by allow_other_classes=true"
            check_same_data(then, data.bank, path, mend)
    known = list(dict.fromkeys(known))
    for data in splits:
        data.left_out = known
    if known:
        say(f"left out {len(known):,} {config.split} classes that were trained on: {shortened(known)}")


def _comparable(one: DictConfig, other: DictConfig) -> None:
    """Refuse to compare on classes that one of the two may have been trained on."""
    free = ("data_dir", "size", "channels")  # what may differ
    sources = [{key: value for key, value in of.dataset.source.items() if key not in free} for of in (one, other)]
    if sources[0] != sources[1]:
        differ = [key for key in {**sources[0], **sources[1]} if sources[0].get(key) != sources[1].get(key)]
        raise FewShotError(
            f"the two checkpoints cannot be compared: they were trained on other data or other classes "
            f"(dataset.source.{', dataset.source.'.join(map(str, differ))}), so that one may know what the other is "
            "tested on"
        )


def _results(trained: Trained, asked: DictConfig, config: DictConfig, tested: Evaluation) -> dict[str, Any]:
    """What ``fewshot.training`` writes of a run, of this test."""
    record = trained.checkpoint.get("callbacks", {}).get("Record", {})
    run_dir = trained.path.parents[1] if len(trained.path.parents) > 1 else trained.path.parent
    changes = [f"{key}={config[key]}" for key in TASK if config[key] is not None]
    changes += [f"test.episodes={config.episodes}"] if config.episodes is not None else []
    validations = record.get("validations", [])
    return outcome(asked, trained.method, tested.data.bank, tested.trainer) | {
        "split": config.split,
        "checkpoint": str(trained.path),
        "left_out_classes": tested.data.left_out,
        "precisions": record.get("precisions"),
        "encoder_init": record.get("encoder_init"),
        "weights": trained.path.stem,  # the report counts those that were best on validation classes
        "run_config": OmegaConf.to_container(trained.config),  # of the training; config is that of this test
        "val_accuracy": max((of["accuracy"] for of in validations), default=None),
        "train_seconds": record.get("seconds"),
        "validations": validations,
        "overrides": [*overrides(run_dir), *changes],
    }


def _tell(results: dict[str, Any], worst: Sequence[str]) -> None:
    task = f"{results['way']}-way {results['shot']}-shot"
    rows = [
        (of["checkpoint"], f"{of['accuracy']:.2%} ± {of['ci95']:.2%}", f"{of['episodes']:,}")
        for of in (results, results.get("against"))
        if of is not None
    ]
    title = f"{task} accuracy on {results['split']} classes, with its 95% interval"
    say(make_table(title, ["checkpoint", "accuracy", "episodes"], rows, numbers=("accuracy", "episodes")))
    if "difference" in results:
        difference = results["difference"]
        mean, ci95 = difference["mean"], difference["ci95"]
        verdict = (
            "no difference is shown" if abs(mean) <= ci95 else f"the {'first' if mean > 0 else 'second'} is better"
        )
        say(f"first - second, episode by episode: {100 * mean:+.2f} ± {100 * ci95:.2f} points: {verdict}")
    say("lowest: " + ", ".join(f"{name} {results['classes'][name]:.1%}" for name in worst))
