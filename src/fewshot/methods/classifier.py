"""A classifier of all training classes: Baseline and Baseline++ of Chen et al., 2019, arXiv 1904.04232.

New classes use only the trained encoder, with the nearest class mean as in SimpleShot (Wang et al., 2019, arXiv
1911.04623, section 3.1); Chen et al. train a new linear layer on each support set instead.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fewshot.checks import Count, Positive, Share, checked
from fewshot.data.classes import ClassBatch
from fewshot.distances import Distance, cosine
from fewshot.encoders import features_of
from fewshot.methods.protonet import PrototypicalNetwork


class Baseline(PrototypicalNetwork):
    """Train a classification layer for all training classes; classify episodes by the nearest prototype.

    Args:
        encoder: the feature extractor f of the paper, with its number of ``features``.
        distance: from queries to prototypes, in validation and test.
        classes: the number of training classes.
        head: "linear": Baseline, the logits W f(x) + b; "cosine": Baseline++, the cosines of f(x) and each class's
            weight vector, times ``scale``.
        scale: a factor of the cosines, positive: without it, the softmax over numbers in [-1, 1] is almost uniform.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al., 2016, arXiv 1512.00567,
            section 7), at least 0 and below 1.

    Raises:
        FewShotError: a setting is out of range.
    """

    trains_on = "classes"

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        distance: Distance,
        classes: Count,
        head: Literal["linear", "cosine"] = "linear",
        scale: Positive = 10.0,
        label_smoothing: Share = 0.0,
    ) -> None:
        super().__init__(encoder, distance)
        self.scale, self.label_smoothing, self.by_cosine = scale, label_smoothing, head == "cosine"
        self.head = nn.Linear(features_of(encoder), classes, bias=not self.by_cosine)

    def class_logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Compute training-class logits ``[images, classes]`` from embeddings ``[images, features]``."""
        if self.by_cosine:
            return self.scale * (1 - cosine(embeddings, self.head.weight))
        logits: torch.Tensor = self.head(embeddings)
        return logits

    def training_step(self, batch: ClassBatch, batch_idx: int) -> torch.Tensor:  # type: ignore[override]  # noqa: ARG002
        """The mean cross-entropy of a batch of images, equation 1 of the paper's training stage."""
        images, labels = batch.load()
        logits = self.class_logits(self.encoder(images))
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.log_training(loss, logits[None], labels[None])
        return loss * batch.share.weight
