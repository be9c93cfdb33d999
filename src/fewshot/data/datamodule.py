"""The Lightning data module: from a data set's configuration to the episodes of each split."""

from collections.abc import Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from fewshot.config import as_overrides, compose
from fewshot.data.bank import ImageBank, ImageClass, open_bank
from fewshot.data.classes import ClassBatch, ClassBatches
from fewshot.data.episodes import (
    EpisodeDataset,
    EpisodeNumber,
    Gather,
    MetaBatch,
    Share,
    check_task,
    share_out,
    stack,
)
from fewshot.data.images import ImageTable
from fewshot.data.loaders import EvaluationLoader, TrainingLoader
from fewshot.data.transforms import Transform, seeded
from fewshot.errors import FewShotError
from fewshot.text import say

PREFIXES = {"train": "train.", "val": "", "test": ""}  # of way, shot and query in the configuration
AnyBatch = TypeVar("AnyBatch", MetaBatch, ClassBatch)


class EpisodeDataModule(pl.LightningDataModule):
    """Serves n-way k-shot episodes of the three splits of a data set, by the meta-batch.

    For a method that trains on classes, a training episode is a batch of images of all training classes instead.

    Args:
        dataset: an option of the configuration group ``dataset``, by name or composed. Omitted arguments default to
            ``conf/train.yaml``, with training episodes like those of validation and test.
        way: classes per episode of validation and test.
        shot: support samples per class there.
        query: queries per class there.
        train: the same for training, with ``episodes`` in total and per ``meta_batch``; and ``batch_size``, the images
            per batch for methods that train on classes, None for others.
        val: ``episodes`` per validation, and training episodes between validations (``every``, rounded up to whole
            meta-batches).
        test: ``episodes`` of the test.
        seed: seed of the training episodes.
        eval_seed: seed of the validation and test episodes, which do not depend on ``seed``.
        checkpoint_every: training episodes between checkpoints; each validation saves one, too.
        cache_dir: the directory of image banks.
        transform: changes training images at random, see ``fewshot.data.transforms``; None for no change.
        trains_on: "episodes" or "classes", see ``FewShotMethod``.

    Attributes:
        has_validation: False if the validation classes are trained on (``train.also_on=val``).
        trained: training episodes so far, over all processes.
        stage: the training episodes from the last checkpoint to the next, over all processes.
        step: the training episodes of the current step.
    """

    def __init__(
        self,
        dataset: DictConfig | str,
        *,
        way: int = 5,
        shot: int = 1,
        query: int = 15,
        train: Mapping[str, int] | None = None,
        val: Mapping[str, int] | None = None,
        test: Mapping[str, int] | None = None,
        seed: int = 0,
        eval_seed: int = 0,
        checkpoint_every: int | None = None,
        cache_dir: str | None = None,
        transform: Transform | None = None,
        trains_on: str = "episodes",
    ) -> None:
        super().__init__()
        task = {"way": way, "shot": shot, "query": query}
        given: dict[str, Any] = {"dataset": dataset, "train": train, "val": val, "test": test}
        given |= {"checkpoint_every": checkpoint_every, "cache_dir": cache_dir}
        if not all(OmegaConf.is_config(given[node]) for node in ("dataset", "train", "val", "test")):
            given = _complete(given, task)
        self.dataset, self.cache_dir, self.transform = given["dataset"], given["cache_dir"], transform
        self.episode: dict[str, Any] = {**task, "seed": eval_seed}
        self.train_episode = {**{key: given["train"][key] for key in task}, "seed": seed}
        self.train_episodes, self._meta_batch = given["train"]["episodes"], given["train"]["meta_batch"]
        self._every, self._checkpoint_every = given["val"]["every"], given["checkpoint_every"]
        self.has_validation = given["train"].get("also_on") != "val"
        self.trains_on, self._batch_size = trains_on, given["train"].get("batch_size")
        self.episodes = {split: given[split]["episodes"] for split in ("val", "test")}
        self.trained = 0
        self.stage = self.step = range(0)
        self._bank: ImageBank | None = None

    @property
    def bank(self) -> ImageBank:
        """The images of the data set; opened or built on first use."""
        if self._bank is None:
            source = self.dataset.source
            name = source._target_.rpartition(".")[2]
            settings = OmegaConf.to_container(source, resolve=True)
            self._bank = open_bank(name, instantiate(source), settings, self.cache_dir, self.check_classes)
            found, configured = (
                self._bank.images.shape[1:],
                (self.dataset.size, self.dataset.size, self.dataset.channels),
            )
            if tuple(found) != configured:
                self._bank = None
                raise FewShotError(
                    f"the images of {name} are {list(found)}, and dataset.size and dataset.channels say "
                    f"{list(configured)} [height, width, channels]; correct them, or resize the images"
                )
            if not self.has_validation:
                self._bank = self._bank.with_validation_in_training()
            _warn(name, self._bank.findings)
        return self._bank

    def check_classes(self, classes: Sequence[ImageClass]) -> None:
        """Reject episodes that need more classes or images than a data set has, before its images are read.

        Raises:
            FewShotError: see ``check_task``.
        """
        for split, task in self._tasks().items():
            members = [image_class for image_class in classes if image_class.split in self.parts_of(split)]
            shape = {key: value for key, value in task.items() if key != "seed"}
            names, counts = [member.name for member in members], [member.count for member in members]
            check_task(split, names, counts, **shape, prefix=PREFIXES[split])

    def parts_of(self, split: str) -> tuple[str, ...]:
        """Return the splits of the data set whose classes are in ``split`` of this module."""
        return (split, "val") if split == "train" and not self.has_validation else (split,)

    def _tasks(self) -> dict[str, dict[str, int]]:
        """Return way, shot, query and seed for each split that episodes are drawn from."""
        tasks = {"train": self.train_episode, "val": self.episode, "test": self.episode}
        unused = {"train"} if self.trains_on == "classes" else set()
        unused |= set() if self.has_validation else {"val"}
        return {split: task for split, task in tasks.items() if split not in unused}

    @cached_property
    def images(self) -> ImageTable:
        """The normalised images, by their positions in the bank."""
        return ImageTable(self.bank.images, self.dataset.normalise)

    def prepare_data(self) -> None:
        """Download and build in one process per machine; the others open what it built."""
        self.bank  # noqa: B018

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Check that the splits suffice for the requested episodes, before anything slow begins.

        Raises:
            FewShotError: there are too few classes, images of a class, or episodes for all processes; or
                ``train.batch_size`` does not fit what the method trains on.
        """
        for split, episodes in self.episodes.items():
            if episodes < self.processes:
                raise FewShotError(
                    f"{split}.episodes={episodes} cannot be shared out to {self.processes} processes; request at least "
                    "as many, or fewer processes with hardware.devices"
                )
        if self.trains_on == "classes":
            self.batches = ClassBatches(self.bank, self._batch_size, self.train_episode["seed"])
        elif self._batch_size is not None:
            raise FewShotError(
                f"train.batch_size={self._batch_size}: this method trains on episodes, of train.way, train.shot and "
                "train.query; omit it"
            )
        self.datasets = {
            split: EpisodeDataset(self.bank, split, **task, prefix=PREFIXES[split])
            for split, task in self._tasks().items()
        }

    @property
    def processes(self) -> int:
        """The number of processes that share the episodes."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def pieces(self) -> int:
        """Batches per process and meta-batch, over which the gradient is accumulated."""
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    @property
    def meta_batch(self) -> int:
        """Episodes per training step: as configured, but at least one for each piece of each process."""
        return max(self._meta_batch, self.processes * self.pieces)

    @property
    def every(self) -> int:
        """Training episodes from one validation to the next."""
        return self._in_whole_steps(self._every)

    @property
    def validates(self) -> bool:
        """Whether a validation follows the current stage."""
        return self.has_validation and (self.stage.stop % self.every == 0 or self.stage.stop == self.train_episodes)

    def train_dataloader(self) -> TrainingLoader[MetaBatch] | TrainingLoader[ClassBatch]:
        """The meta-batches from the episodes trained so far to the next checkpoint or validation."""
        if self.trainer is not None:
            # Each epoch of the trainer is a new stage; without this, all would have the length of the first.
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        self.stage = self._stage(self.trained)
        plan = self.trained, self._stage, self._shares
        if self.trains_on == "classes":
            return TrainingLoader(*plan, self._class_batch_of)
        return TrainingLoader(*plan, self._meta_batch_of)

    def _stage(self, trained: int) -> range:
        """Return the training episodes after ``trained`` up to the next checkpoint or validation."""
        epoch, first = divmod(trained, self.every)
        checkpoint_every = self._in_whole_steps(self._checkpoint_every)
        checkpoint = (first // checkpoint_every + 1) * checkpoint_every
        return range(trained, min(epoch * self.every + min(checkpoint, self.every), self.train_episodes))

    def _shares(self, stage: range) -> list[Share]:
        """Return the shares of this process in a stage, one for each batch."""
        shares = []
        epoch, first = divmod(stage.start, self.every)
        for start in range(stage.start, stage.stop, self.meta_batch):
            step = range(start, min(start + self.meta_batch, stage.stop))
            numbers = range(first + step.start - stage.start, first + step.stop - stage.start)
            pieces = list(share_out(numbers, self._rank, self.processes, self.pieces))
            for position, (own, weight) in enumerate(pieces, 1):
                names = [EpisodeNumber(epoch, number) for number in own]
                shares.append(Share(names, weight, step.start, step.stop, completes=position == len(pieces)))
        return shares

    def _meta_batch_of(self, share: Share) -> MetaBatch:
        dataset = self.datasets["train"]
        return MetaBatch(stack([dataset[number] for number in share.numbers]), share, self._training_images(share))

    def _class_batch_of(self, share: Share) -> ClassBatch:
        drawn = [self.batches[epoch * self.every + number] for epoch, number in share.numbers]
        positions, labels = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
        return ClassBatch(positions, labels, share, self._training_images(share))

    def _training_images(self, share: Share) -> Gather:
        """Return the images of a share, transformed with random numbers that depend on the episode."""
        if self.transform is None:
            return self.images
        seeds = [(self.train_episode["seed"], *number) for number in share.numbers]
        return partial(self.images, transform=seeded(self.transform, seeds))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves."""
        return {"trained": self.trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the episodes that a checkpoint was trained on."""
        self.trained = state_dict["trained"]

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """The validation episodes, the same at every epoch; none without validation classes."""
        return self._evaluation_loader("val") if self.has_validation else []

    def test_dataloader(self) -> EvaluationLoader:
        """The test episodes."""
        return self._evaluation_loader("test")

    def on_after_batch_transfer(self, batch: AnyBatch, dataloader_idx: int) -> AnyBatch:  # noqa: ARG002
        """Count the episodes that a trainer trains on."""
        if self.trainer is not None and self.trainer.training:
            self.step = range(batch.share.start, batch.share.stop)
            if batch.share.completes:
                self.trained = batch.share.stop
                self.trainer.should_stop |= self.trained == self.train_episodes  # after this step
        return batch

    def _in_whole_steps(self, episodes: int) -> int:
        return -(-episodes // self.meta_batch) * self.meta_batch

    def _evaluation_loader(self, split: str) -> EvaluationLoader:
        return EvaluationLoader(self.datasets[split], self.episodes[split], self.images, self._rank, self.processes)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0


def _complete(given: Mapping[str, Any], task: Mapping[str, int]) -> dict[str, Any]:
    """Return the arguments of a data module, with the defaults of ``conf/train.yaml``."""
    chosen = {key: value for key, value in given.items() if value is not None and not OmegaConf.is_config(value)}
    config = compose(*as_overrides({**task, **chosen, "train": {**task, **(given["train"] or {})}}))
    composed = {"dataset": given["dataset"]} if OmegaConf.is_config(given["dataset"]) else {}
    return {key: config[key] for key in given} | composed


@cache
def _warn(name: str, findings: tuple[str, ...]) -> None:
    """Say what is odd about a data set, once in a process, which may use it many times."""
    for finding in findings:
        rank_zero_only(say)(f"warning: {name}: {finding}", error=True)
