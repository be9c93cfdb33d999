"""What every method shares: it takes an episode and returns logits; all else follows from that."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fewshot.data.episodes import Episode
from fewshot.distances import Distance
from fewshot.errors import FewShotError
from fewshot.metrics import EpisodeAccuracy, Estimate, credit

Classifier = Callable[[torch.Tensor], torch.Tensor]  # [images, channels, height, width] to logits [images, way]


class Optimization(TypedDict):
    """What every method is told of its training.

    Attributes:
        learning_rate: of Adam.
        halve_every: training steps after which the learning rate is halved, over and over; None: never.
        on_nan: what to do about a gradient that is not finite: "stop" the run, or "skip" the step and count it.
    """

    learning_rate: float
    halve_every: int | None
    on_nan: str


class FewShotMethod(pl.LightningModule, ABC):
    """A few-shot classifier; a subclass says how an episode is solved (``forward``) and learnt from.

    Args:
        encoder: images ``[images, channels, height, width]`` to embeddings ``[images, features]``.
        training: see ``Optimization``.

    Attributes:
        estimates: the accuracy last measured on "val" and on "test".
    """

    def __init__(self, encoder: nn.Module, **training: Unpack[Optimization]) -> None:
        super().__init__()
        self.encoder = encoder
        self.learning_rate, self.halve_every = training["learning_rate"], training["halve_every"]
        self.on_nan = training["on_nan"]
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
        accuracy = credit(logits.detach(), labels).mean()
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
        if estimate.tied:
            self.print(
                f"warning: several classes have the largest logit of {estimate.tied:,} {split} queries; each of these "
                "queries counts as a guess among its classes",
                flush=True,
            )
        self.log(f"{split}/accuracy", estimate.accuracy, prog_bar=True)
        self.log(f"{split}/ci95", estimate.ci95)

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate halved every ``halve_every`` steps.

        Raises:
            FewShotError: there is nothing to train.
        """
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise FewShotError(
                "there is nothing to train: the encoder is frozen, and what follows it has no weights; set "
                "encoder.frozen=false, or leave training out: python src/predict.py works without"
            )
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        if self.halve_every is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.halve_every, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MetricMethod(FewShotMethod):
    """A method that embeds every image by itself, then compares embeddings by a distance.

    Args:
        encoder: see ``FewShotMethod``.
        distance: between embeddings, see ``fewshot.distances``.
        training: see ``Optimization``.
    """

    def __init__(self, encoder: nn.Module, distance: Distance, **training: Unpack[Optimization]) -> None:
        super().__init__(encoder, **training)
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


def require_finite(method: nn.Module, place: object) -> None:
    """Refuse weights, or statistics of batch norm, that are not finite.

    Args:
        method: what is about to be used or saved.
        place: where its weights come from, for the message.

    Raises:
        FewShotError: names the first tensor that is not finite.
    """
    for name, tensor in method.state_dict().items():
        if not tensor.isfinite().all():
            raise FewShotError(
                f"{name} of {place} is not finite (NaN or infinite), so every answer would be wrong; choose another "
                "checkpoint, or train anew with a lower method.learning_rate"
            )


def _unlabelled(support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, way: int) -> Episode:
    return Episode(support, labels, query, labels.new_zeros(len(query)), way)
