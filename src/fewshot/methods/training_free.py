"""Base class of classifiers that need no training: everything they learn comes from one episode's embeddings."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import normalize, one_hot

from fewshot.checks import checked
from fewshot.data.episodes import EmbeddedEpisode
from fewshot.embeddings import LabelledEmbeddings
from fewshot.errors import FewShotError
from fewshot.methods.base import MetricMethod

Features = Literal["none", "l2n", "cl2n"]


class TrainingFree(MetricMethod):
    """A classifier of embeddings without weights of its own; it solves the episodes of a meta-batch together.

    Embeddings are transformed first, as in SimpleShot (Wang et al., 2019, arXiv 1911.04623, section 3.1).

    Args:
        encoder: already trained, or pretrained.
        features: normalisation of the embeddings; "none"; "l2n": divided by their norm; "cl2n": centred on a mean, then
            divided by their norm.
        centre: the mean of "cl2n": over all images of the training classes ("train"), or over the support set, each
            class with the same weight ("support").

    Raises:
        FewShotError: a setting is out of range.
    """

    trains_on = "nothing"

    @checked("method")
    def __init__(
        self, encoder: nn.Module, features: Features = "none", centre: Literal["train", "support"] = "train"
    ) -> None:
        super().__init__(encoder)
        self.features, self.centre = features, centre
        self._train_mean: torch.Tensor | None = None

    @abstractmethod
    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Solve some episodes.

        Args:
            support: transformed embeddings, ``[tasks, support samples, features]``.
            labels: one-hot, ``[tasks, support samples, way]``, in the type of the embeddings.
            query: ``[tasks, queries, features]``.

        Returns:
            Logits, ``[tasks, queries, way]``.
        """

    def compare_tasks(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """See ``MetricMethod``."""
        with torch.autocast(embedded.query.device.type, enabled=False):
            wide = torch.promote_types(embedded.query.dtype, torch.float32)
            support, query = embedded.support.to(wide), embedded.query.to(wide)
            if support.dim() != 3:
                raise FewShotError(
                    f"{type(self).__name__} takes one vector per image, but the encoder's embeddings are "
                    f"{list(support.shape[2:])}"
                )
            labels = one_hot(embedded.support_labels, embedded.way).to(wide)
            support, query = self._transform(support, labels, query)
            return self.classify(support, labels, query)

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """See ``MetricMethod``."""
        return self.compare_tasks(embedded.apply(lambda tensor: tensor[None]))[0]

    def before_evaluation(self, embed_split: Callable[[str], LabelledEmbeddings]) -> None:
        """Average the embeddings of the training images."""
        if self.features == "cl2n" and self.centre == "train":
            try:
                self._train_mean = embed_split("train").embeddings.float().mean(0)
            except FewShotError as error:  # there are no training classes
                raise self._no_mean() from error

    def before_prediction(self) -> None:
        """See ``FewShotMethod``."""
        if self.features == "cl2n" and self.centre == "train" and self._train_mean is None:
            raise self._no_mean()

    def _no_mean(self) -> FewShotError:
        return FewShotError(
            "method.features=cl2n needs the mean of the training classes, and there are none here; choose "
            "method.centre=support for that of the examples, or method.features=l2n"
        )

    def _transform(
        self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.features == "none":
            return support, query
        if self.features == "cl2n":
            if self.centre == "support":
                centre = prototypes(support, labels).mean(-2, keepdim=True)
            elif self._train_mean is not None:
                centre = self._train_mean.to(support)
            else:
                raise self._no_mean()
            support, query = support - centre, query - centre
        return normalize(support, dim=-1), normalize(query, dim=-1)


def prototypes(support: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Average the support embeddings of each class: ``[tasks, way, features]``; see ``TrainingFree.classify``."""
    return (labels / labels.sum(-2, keepdim=True)).mT @ support


def squared_distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances ``[tasks, points, centres]`` between ``[tasks, ..., features]``."""
    squares = points.square().sum(-1)[..., None] + centres.square().sum(-1)[..., None, :]
    return (squares - 2 * points @ centres.mT).clamp_min(0)


def cosines(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Cosines ``[tasks, points, centres]`` between ``[tasks, ..., features]``."""
    return normalize(points, dim=-1) @ normalize(centres, dim=-1).mT


def in_span(support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return as many coordinates as there are images, with the same distances, unless the features are fewer.

    What only adds embeddings and compares them by distances gives the same answers, faster.

    Args:
        support: ``[tasks, support samples, features]``.
        query: ``[tasks, queries, features]``.

    Returns:
        Both, with ``support samples + queries`` features.
    """
    both, images = torch.cat([support, query], dim=1), support.shape[1] + query.shape[1]
    if images >= both.shape[2]:
        return support, query
    products = (both @ both.mT).double()
    diagonal = products.diagonal(dim1=1, dim2=2)
    # An image that occurs twice, or rounding, could make them singular.
    diagonal.add_((1e-5 * diagonal.mean(1, keepdim=True)).clamp_min(1e-30))
    coordinates = torch.linalg.cholesky_ex(products).L.to(both)
    return coordinates[:, : support.shape[1]], coordinates[:, support.shape[1] :]


def descend(
    start: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor], steps: int, learning_rate: float
) -> torch.Tensor:
    """Minimise a loss per task with Adam, all tasks together: Adam treats every number by itself.

    Args:
        start: the initial weights, ``[tasks, ...]``.
        loss: from such weights to a loss for each task, ``[tasks]``.
        steps: how many.
        learning_rate: of Adam.

    Returns:
        The final weights.
    """
    with torch.enable_grad():
        weights = start.detach().clone().requires_grad_()
        adam = torch.optim.Adam([weights], lr=learning_rate, fused=True)
        for _ in range(steps):
            (weights.grad,) = torch.autograd.grad(loss(weights).sum(), weights)
            adam.step()
    return weights.detach()
