"""What every method shares: it takes an episode and returns logits; all else follows from that."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fewshot import optimization
from fewshot.data.episodes import Episode
from fewshot.distances import Distance
from fewshot.metrics import EpisodeAccuracy, Estimate
from fewshot.optimization import MakeOptimizer, MakeSchedule

Classifier = Callable[[torch.Tensor], torch.Tensor]  # [images, channels, height, width] to logits [images, way]


class FewShotMethod(pl.LightningModule, ABC):
    """A few-shot classifier; a subclass says how an episode is solved (``forward``) and learnt from.

    Args:
        encoder: images ``[images, channels, height, width]`` to embeddings ``[images, features]``.

    Attributes:
        make_optimizer: from the parameters; set it, as the group ``optimizer`` does, before training starts.
        make_schedule: from the optimizer, counting training steps; None: the learning rate stays.
        estimates: the accuracy last measured on "val" and on "test".
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.make_optimizer: MakeOptimizer = optimization.DEFAULT
        self.make_schedule: MakeSchedule | None = None
        self.val_accuracy, self.test_accuracy = EpisodeAccuracy(), EpisodeAccuracy()
        self.estimates: dict[str, Estimate] = {}

    @abstractmethod
    def forward(self, episode: Episode) -> torch.Tensor:
        """Classify the queries of an episode by its support samples.

        Returns:
            Logits, ``[queries, way]``.
        """

    def weight(self, batch_idx: int) -> float:
        """Of a training batch's mean loss: the mean over all processes is then that over all their episodes."""
        return self.trainer.datamodule.weights[batch_idx]  # type: ignore[attr-defined]

    def classifier(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        """Learn a support set once, to classify any number of images by it afterwards, a batch at a time.

        Other than in an episode, classes may differ in shot; none is thought the likelier for having more samples.

        Args:
            support: ``[support samples, channels, height, width]``.
            labels: int64 ``[support samples]``, every class at least once.
            way: the number of classes.
        """
        return lambda images: self(_unlabelled(support, labels, images, way))

    def log_training(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Log the loss and the accuracy of a training step, of this process's part of the meta-batch.

        Args:
            loss: the mean over that.
            logits: ``[tasks, queries, way]``.
            labels: int64 ``[tasks, queries]``.
        """
        accuracy = (logits.detach().argmax(-1) == labels).float().mean()
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, prog_bar=True)

    def evaluate(self, meta_batch: Episode) -> torch.Tensor:
        """The logits of every episode of a meta-batch in validation or test: ``[tasks, queries, way]``."""
        return torch.stack([self(episode) for episode in meta_batch.tasks()])

    def validation_step(self, meta_batch: Episode, batch_idx: int) -> None:  # noqa: ARG002
        """Count the accuracy of validation episodes."""
        self.val_accuracy.update(self.evaluate(meta_batch), meta_batch.query_labels)

    def on_validation_epoch_end(self) -> None:
        """Log the validation accuracy, by which the best weights are chosen."""
        self._log_estimate("val", self.val_accuracy)

    def test_step(self, meta_batch: Episode, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Count the accuracy of test episodes; their logits, ``[tasks, queries, way]``, are for callbacks to see."""
        logits = self.evaluate(meta_batch)
        self.test_accuracy.update(logits, meta_batch.query_labels)
        return logits

    def on_test_epoch_end(self) -> None:
        """Log the test accuracy."""
        self._log_estimate("test", self.test_accuracy)

    def _log_estimate(self, split: str, metric: EpisodeAccuracy) -> None:
        estimate = self.estimates[split] = metric.compute()
        metric.reset()
        self.log(f"{split}/accuracy", estimate.accuracy, prog_bar=True)
        self.log(f"{split}/ci95", estimate.ci95)

    def configure_optimizers(self) -> Any:
        """See ``fewshot.optimization.configure``."""
        return optimization.configure(self.parameters(), self.make_optimizer, self.make_schedule)


class MetricMethod(FewShotMethod):
    """A method that embeds every image by itself, then compares embeddings by a distance.

    Args:
        encoder: see ``FewShotMethod``.
        distance: between embeddings, see ``fewshot.distances``.
    """

    def __init__(self, encoder: nn.Module, distance: Distance) -> None:
        super().__init__(encoder)
        self.distance = distance

    @abstractmethod
    def compare(self, embedded: Episode) -> torch.Tensor:
        """Classify the queries of an episode that has embeddings, ``[..., features]``, in place of images.

        Returns:
            Logits, ``[queries, way]``.
        """

    def forward(self, episode: Episode) -> torch.Tensor:
        """Embed and compare; support and query in one batch, so that batch norm sees them together while it trains."""
        embeddings = self.encoder(torch.cat([episode.support, episode.query]))
        support, query = embeddings.tensor_split([len(episode.support)])
        return self.compare(episode._replace(support=support, query=query))

    def classifier(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        """See ``FewShotMethod``; the support is embedded once."""
        embedded = self.encoder(support)
        return lambda images: self.compare(_unlabelled(embedded, labels, self.encoder(images), way))

    def training_step(self, meta_batch: Episode, batch_idx: int) -> torch.Tensor:
        """The cross-entropy of the queries, over all episodes of the meta-batch: both papers' loss."""
        logits = torch.stack([self(episode) for episode in meta_batch.tasks()])
        loss = cross_entropy(logits.flatten(0, 1), meta_batch.query_labels.flatten())
        self.log_training(loss, logits, meta_batch.query_labels)
        return loss * self.weight(batch_idx)

    # In validation and test an embedding depends on nothing but its image, so each image is embedded once.
    def on_validation_epoch_start(self) -> None:
        """Embed the images of validation."""
        self._embed("val")

    def on_test_epoch_start(self) -> None:
        """Embed the images of the test."""
        self._embed("test")

    def _embed(self, split: str) -> None:
        if self.trainer.world_size > 1:
            # What batch norm remembers differs between processes that train on different episodes. The first one's is
            # what a checkpoint holds.
            for remembered in self.encoder.buffers():
                torch.distributed.broadcast(remembered, src=0)
        with self.trainer.precision_plugin.forward_context():
            self.trainer.datamodule.embed(split, self.encoder)  # type: ignore[attr-defined]

    def evaluate(self, meta_batch: Episode) -> torch.Tensor:
        """See ``FewShotMethod``; the episodes hold embeddings already."""
        return torch.stack([self.compare(episode) for episode in meta_batch.tasks()])


def _unlabelled(support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, way: int) -> Episode:
    return Episode(support, labels, query, labels.new_zeros(len(query)), way)
