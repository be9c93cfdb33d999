"""Base classes of all methods: a method takes an episode and returns logits."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fewshot import optimization
from fewshot.data.episodes import EmbeddedEpisode, Episode, MetaBatch
from fewshot.data.loaders import EvaluationLoader
from fewshot.distances import Distance, l2
from fewshot.embeddings import (
    EMBEDDED_TOGETHER,
    EmbeddingCache,
    EmbeddingTable,
    LabelledEmbeddings,
    embed,
    embed_mirrored,
)
from fewshot.errors import FewShotError
from fewshot.metrics import EpisodeAccuracy, Estimate, credit
from fewshot.optimization import MakeOptimizer, MakeSchedule

# images, or embeddings in ``MetricMethod.learn``, [images, ...] to logits [images, way]
Classifier = Callable[[torch.Tensor], torch.Tensor]


class FewShotMethod(pl.LightningModule, ABC):
    """A few-shot classifier; subclasses define how to solve an episode (``forward``) and how to learn from it.

    Args:
        encoder: maps images ``[images, channels, height, width]`` to embeddings ``[images, features]``.

    Attributes:
        make_optimizer: makes the optimizer from the parameters; set it before training, as the group ``optimizer``
            does.
        make_schedule: makes the schedule, which counts training steps, from the optimizer; None: constant rate.
        estimates: the latest accuracy on "val" and on "test".
        trains_on: "episodes" if ``training_step`` takes a ``MetaBatch``; "classes" if it takes a ``ClassBatch``, in
            which case the constructor may take the number of training ``classes``; "nothing" if there is nothing to
            train. Validation and test always use episodes.
        transductive: whether the answer to a query of an episode depends on the other queries.
        assumes_balance: whether a transductive method assumes, or prefers, balanced queries: as many of every class.
        compilable: whether the encoder can be compiled: ``torch.compile`` does not support second derivatives.
        mirror: whether answers compare the mean embedding of each image and its mirror image, see ``set_mirror``.
    """

    trains_on = "episodes"
    transductive = False
    assumes_balance = False
    compilable = True
    mirror = False

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.make_optimizer: MakeOptimizer = optimization.DEFAULT
        self.make_schedule: MakeSchedule | None = None
        untrained = "bring the settings of the method (method.KEY) nearer to their defaults"
        advice = {"advice": untrained} if self.trains_on == "nothing" else {}
        self.val_accuracy, self.test_accuracy = EpisodeAccuracy(**advice), EpisodeAccuracy(**advice)
        self.estimates: dict[str, Estimate] = {}

    @property
    def needs_all_queries(self) -> bool:
        """Whether a ``classifier`` must get all images at once: it compares them with each other."""
        return self.transductive

    def before_prediction(self) -> None:
        """Optional hook: refuse to classify images without a data set, if the method has to learn from one.

        Raises:
            FewShotError: says what is missing.
        """

    @abstractmethod
    def forward(self, episode: Episode) -> torch.Tensor:
        """Classify the queries of an episode, given its support samples.

        Returns:
            Logits, ``[queries, way]``.
        """

    def classifier(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        """Learn a support set once, then classify any number of images in batches.

        Unlike in an episode, classes may differ in shot; having more samples does not make a class more likely.

        Args:
            support: ``[support samples, channels, height, width]``.
            labels: int64 ``[support samples]``, every class at least once.
            way: the number of classes.
        """
        return lambda images: self(Episode(support, labels, images, _unknown(images), way))

    def log_training(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Log the loss and the accuracy of a training step, for this process's part of the meta-batch.

        Args:
            loss: the mean loss of that part.
            logits: ``[tasks, queries, way]``.
            labels: int64 ``[tasks, queries]``.
        """
        accuracy = credit(logits.detach(), labels).mean()
        # Without prog_bar=True, for which Lightning waits for the numbers after every step; see ``fewshot.progress``.
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy})

    def evaluate(self, meta_batch: MetaBatch) -> torch.Tensor:
        """Return the logits of all episodes of a validation or test meta-batch: ``[tasks, queries, way]``."""
        # Some methods need gradients, and tensors created in the trainer's inference mode cannot take part in them.
        with torch.inference_mode(mode=False), torch.no_grad():
            episodes = meta_batch._replace(episodes=meta_batch.episodes.apply(torch.clone)).load()
            return torch.stack([self.answer(episode) for episode in episodes.tasks()])

    def answer(self, episode: Episode) -> torch.Tensor:
        """Return what ``forward`` returns, after checking its shape.

        Raises:
            FewShotError: it does not return logits ``[queries, way]``.
        """
        return self.checked_logits(self(episode), len(episode.query_labels), episode.way)

    def checked_logits(self, logits: torch.Tensor, *shape: int) -> torch.Tensor:
        """Return logits after checking their shape, ``[..., queries, way]``.

        Raises:
            FewShotError: they have a different shape, or are not floating point.
        """
        if logits.shape == shape and logits.is_floating_point():
            return logits
        kind, size = str(logits.dtype).removeprefix("torch."), list(logits.shape)
        raise FewShotError(
            f"{type(self).__name__} returned {kind} {size} for an episode; its forward and compare must return logits, "
            f"floating point [queries, way], here {list(shape)}"
        )

    def validation_step(self, meta_batch: MetaBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Update the validation accuracy."""
        self.val_accuracy.update(self.evaluate(meta_batch), meta_batch.episodes.query_labels)

    def on_validation_epoch_end(self) -> None:
        """Log the validation accuracy, which decides the best weights."""
        self._log_estimate("val", self.val_accuracy)

    def test_step(self, meta_batch: MetaBatch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Update the test accuracy; return the logits, ``[tasks, queries, way]``, for callbacks."""
        logits = self.evaluate(meta_batch)
        self.test_accuracy.update(logits, meta_batch.episodes.query_labels)
        return logits

    def on_test_epoch_end(self) -> None:
        """Log the test accuracy."""
        self._log_estimate("test", self.test_accuracy)

    def _log_estimate(self, split: str, metric: EpisodeAccuracy) -> None:
        estimate = self.estimates[split] = metric.compute()
        metric.reset()
        if estimate.tied:
            self.print(
                f"warning: for {estimate.tied:,} of the {split} queries, several classes have the same largest logit; "
                "each counts as a guess among them",
                flush=True,
            )
        self.log(f"{split}/accuracy", estimate.accuracy, prog_bar=True)
        self.log(f"{split}/ci95", estimate.ci95)

    def configure_optimizers(self) -> Any:
        """See ``fewshot.optimization.configure``."""
        return optimization.configure(self.parameters(), self.make_optimizer, self.make_schedule)


class MetricMethod(FewShotMethod):
    """A method that embeds each image independently, then compares embeddings by a distance.

    Args:
        encoder: see ``FewShotMethod``.
        distance: between embeddings, see ``fewshot.distances``.

    Attributes:
        embedding_cache: keeps embeddings for later evaluations; None: nothing is kept.
    """

    def __init__(self, encoder: nn.Module, distance: Distance = l2) -> None:
        super().__init__(encoder)
        self.distance = distance
        self.embedding_cache: EmbeddingCache | None = None
        self._embeddings: EmbeddingTable | None = None  # embeddings of the current validation or test

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images for ``compare``: ``[images, features]``.

        A method that compares regions of images returns ``fewshot.encoders.feature_maps(self.encoder, images)``.

        Raises:
            FewShotError: the encoder returns something else.
        """
        embeddings: torch.Tensor = self.encoder(images)
        if embeddings.ndim != 2:
            raise FewShotError(
                f"the encoder {type(self.encoder).__name__} returned {list(embeddings.shape)}, and "
                f"{type(self).__name__} needs [images, features]: end it with nn.Flatten()"
            )
        return embeddings

    def represent(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images for an answer: as in training, or with ``mirror``, the mean of an image and its mirror image."""
        return embed_mirrored(self.embed_images, images) if self.mirror else self.embed_images(images)

    @abstractmethod
    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Classify the queries of an episode from embeddings, whose shape is up to ``embed_images``.

        Returns:
            Logits, ``[queries, way]``.
        """

    def compare_tasks(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Classify a meta-batch, whose tensors have a leading dimension: ``[tasks, queries, way]``.

        Override it if episodes can be solved faster together.
        """
        return torch.stack([self.compare(episode) for episode in embedded.tasks()])

    def embed_episode(self, episode: Episode) -> EmbeddedEpisode:
        """Embed support and query in one batch, so that batch norm sees them together in training."""
        represent = self.embed_images if self.training else self.represent
        embeddings = represent(torch.cat([episode.support, episode.query]))
        support, query = embeddings.tensor_split([len(episode.support)])
        return EmbeddedEpisode(support, episode.support_labels, query, episode.query_labels, episode.way)

    def forward(self, episode: Episode) -> torch.Tensor:
        """Embed the episode, then compare."""
        return self.compare(self.embed_episode(episode))

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The training loss: mean cross-entropy of the queries.

        Args:
            logits: ``[queries, way]``, over all episodes of the meta-batch.
            labels: int64 ``[queries]``.
        """
        return cross_entropy(logits, labels)

    def before_evaluation(self, embed_split: Callable[[str], LabelledEmbeddings]) -> None:
        """Optional hook: learn from the embeddings of whole splits before a validation or test.

        Keep the result in a buffer: checkpoints store buffers, and predictions have no data set.

        Args:
            embed_split: returns the embeddings of all images of a split, for example "train".
        """

    def learn(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        """Learn from embeddings what ``classifier`` learns from images.

        Args:
            support: what ``represent`` returns, ``[support samples, ...]``.
            labels: int64 ``[support samples]``, every class at least once.
            way: the number of classes.

        Returns:
            A function from embeddings ``[images, ...]`` to logits ``[images, way]``.
        """
        return lambda query: self.compare(EmbeddedEpisode(support, labels, query, _unknown(query), way))

    def classifier(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        """See ``FewShotMethod``; the support is embedded once, and images are embedded a batch at a time."""
        learned = self.learn(self.represent(support), labels, way)
        return lambda images: learned(torch.cat([self.represent(batch) for batch in images.split(EMBEDDED_TOGETHER)]))

    def training_step(self, meta_batch: MetaBatch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Return the loss of the queries over all episodes of the meta-batch."""
        episodes = meta_batch.load()
        logits = torch.stack([self.answer(episode) for episode in episodes.tasks()])
        loss = self.loss(logits.flatten(0, 1), episodes.query_labels.flatten())
        self.log_training(loss, logits, episodes.query_labels)
        return loss * meta_batch.share.weight

    def on_validation_epoch_start(self) -> None:
        """Embed the images of the validation."""
        self._embed(self.trainer.val_dataloaders)

    def on_test_epoch_start(self) -> None:
        """Embed the images of the test."""
        self._embed(self.trainer.test_dataloaders)

    def _embed(self, loader: Any) -> None:
        if not isinstance(loader, EvaluationLoader):
            return  # a user-supplied loader: its episodes are embedded one by one
        strategy, images = self.trainer.strategy, partial(loader.images, device=self.device)
        if self.trainer.world_size > 1:
            # Processes that train on different episodes have different batch norm statistics; use those of rank 0, as
            # checkpoints do.
            for buffer in self.encoder.buffers():
                torch.distributed.broadcast(buffer, src=0)

        def embed_at(positions: torch.Tensor) -> torch.Tensor:
            compute = partial(embed, self.represent, images, positions, strategy)
            if self.embedding_cache is None:
                return compute()
            by_encoder = type(self).embed_images is MetricMethod.embed_images
            return self.embedding_cache(self.encoder if by_encoder else self, positions, compute).to(self.device)

        def embed_split(split: str) -> LabelledEmbeddings:
            if not len(loader.dataset.bank.classes(split)):
                raise FewShotError(f"the data set has no {split} classes, whose embeddings {type(self).__name__} needs")
            positions, labels = loader.dataset.bank.labelled(split)
            return LabelledEmbeddings(embed_at(positions), labels.to(self.device))

        with self.trainer.precision_plugin.forward_context():
            self.before_evaluation(embed_split)
            positions = loader.positions()
            embeddings = embed_at(positions)
        self._embeddings = EmbeddingTable(positions.to(self.device), embeddings, len(loader.dataset.bank.images))

    def evaluate(self, meta_batch: MetaBatch) -> torch.Tensor:
        """See ``FewShotMethod``; uses embeddings computed once per image."""
        if self._embeddings is None:
            return super().evaluate(meta_batch)
        logits = self.compare_tasks(meta_batch.episodes.embed(self._embeddings))
        labels = meta_batch.episodes.query_labels
        return self.checked_logits(logits, *labels.shape, meta_batch.episodes.way)

    def on_validation_epoch_end(self) -> None:
        """See ``FewShotMethod``; also frees the embeddings."""
        self._embeddings = None
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """See ``FewShotMethod``; also frees the embeddings."""
        self._embeddings = None
        super().on_test_epoch_end()


def set_mirror(method: FewShotMethod, mirror: bool | None) -> None:
    """Choose whether answers compare the mean embedding of each image and its mirror image: of photos, not of letters.

    Args:
        method: changed in place; its training is not affected.
        mirror: see ``FewShotMethod``; None: false.

    Raises:
        FewShotError: the method does not compare embeddings.
    """
    if mirror and not isinstance(method, MetricMethod):
        raise FewShotError(
            f"mirror=true: {type(method).__name__} has no embeddings to average; leave it out, or choose a method that "
            "compares embeddings, such as method=protonet"
        )
    method.mirror = bool(mirror)


def _unknown(images: torch.Tensor) -> torch.Tensor:
    """Placeholder labels for unlabelled queries."""
    return torch.zeros(len(images), dtype=torch.int64, device=images.device)


def require_finite(method: nn.Module, place: object) -> None:
    """Reject weights and batch norm statistics that are not finite.

    Args:
        method: the module about to be used or saved.
        place: where its weights come from, for the message.

    Raises:
        FewShotError: a tensor is not finite; names the first one.
    """
    for name, tensor in method.state_dict().items():
        if not tensor.isfinite().all():
            raise FewShotError(
                f"{name} of {place} is not finite (NaN or infinite), so every answer would be wrong; choose a "
                "different checkpoint, or train again with a lower optimizer.lr"
            )
