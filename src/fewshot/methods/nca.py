"""Neighbourhood components analysis (Goldberger et al., 2004) as a few-shot method: prototypes without episodes.

Laenen & Bertinetto, 2021, arXiv 2012.09831, train it on batches of all training classes: every pair of images in a
batch counts, not only pairs of a query and a support sample.
"""

import torch
from torch.nn.functional import softplus

from fewshot.data.classes import ClassBatch
from fewshot.errors import FewShotError
from fewshot.methods.protonet import PrototypicalNetwork


class NeighbourhoodComponents(PrototypicalNetwork):
    """Train every image to be nearest to the other images of its class; classify episodes by the nearest prototype.

    Args:
        encoder: the embedding function, f of arXiv 2012.09831.
        distance: between images in training, and from queries to prototypes; the paper's is squared Euclidean.
    """

    trains_on = "classes"

    def training_step(self, batch: ClassBatch, batch_idx: int) -> torch.Tensor:  # type: ignore[override]  # noqa: ARG002
        """The paper's NCA loss of a batch of images; see ``neighbourhood_loss``.

        Its training accuracy is the share of images whose nearest other image is of their class.

        Raises:
            FewShotError: the batch has a single image.
        """
        images, labels = batch.load()
        if len(labels) < 2:
            raise FewShotError("train.batch_size=1 must be at least 2: method=nca compares the images of a batch")
        embeddings = self.encoder(images)
        distances = self.distance(embeddings, embeddings)
        loss = neighbourhood_loss(distances, labels)
        same, other = neighbours(labels)
        nearest = torch.stack([distances.where(mask, torch.inf).amin(1) for mask in (same, other)], dim=1)
        self.log_training(loss, -nearest[None], torch.zeros_like(labels)[None])
        return loss * batch.share.weight


def neighbours(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which other images are of the class of each image, and which are not: bool ``[images, images]``."""
    of_class = labels[:, None] == labels
    return of_class.clone().fill_diagonal_(False), ~of_class


def neighbourhood_loss(distances: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the NCA loss: how improbable it is that an image picks another one of its class.

    It picks each other image with a probability proportional to exp(-distance). Images without another one of their
    class are left out.

    Args:
        distances: between the images of a batch, ``[images, images]``.
        labels: int64 ``[images]``.

    Returns:
        The mean over the images of -log of that probability; 0 if no two images share a class.
    """
    same, other = neighbours(labels)
    # In place of a sum over nothing, whose logarithm has no gradient: these images do not count, or have the loss 0.
    alone, all_same = ~same.any(1, keepdim=True), ~other.any(1, keepdim=True)
    nearness_of_same, nearness_of_other = (
        (-distances).masked_fill(~(mask | empty), -torch.inf).logsumexp(1)
        for mask, empty in ((same, alone), (other, all_same))
    )
    losses = softplus(nearness_of_other - nearness_of_same)
    counted = ~(alone | all_same)[:, 0]
    return losses.where(counted, 0).sum() / (~alone).sum().clamp_min(1)
