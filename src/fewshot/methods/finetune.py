"""Fine-tuning a new last layer on each support set: Chen et al., 2019; with queries: Dhillon et al., 2020."""

from typing import Literal

import torch
from torch import nn
from torch.nn.functional import normalize, pad

from fewshot.checks import Count, Positive, checked
from fewshot.methods.training_free import Features, TrainingFree, descend, prototypes


class FineTuning(TrainingFree):
    """Train a linear layer on the support embeddings: Baseline and Baseline++ (arXiv 1904.04232, section 3.2).

    The layer starts from the class means, as in Dhillon et al. (arXiv 1909.02729, section 3.1), and Adam trains it.

    Args:
        encoder: see ``TrainingFree``; it stays as it is.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        head: "linear": Baseline, the logits W f(x) + b; "cosine": Baseline++, the cosines of f(x) and each class's
            weight vector.
        scale: factor of the logits, positive.
        steps: of Adam, each on the whole support, at least 1.
        learning_rate: of Adam, positive.

    Raises:
        FewShotError: a setting is out of range.
    """

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "l2n",
        centre: Literal["train", "support"] = "train",
        head: Literal["linear", "cosine"] = "linear",
        scale: Positive = 10.0,
        steps: Count = 100,
        learning_rate: Positive = 0.01,
    ) -> None:
        super().__init__(encoder, features, centre)
        self.head, self.scale, self.steps, self.learning_rate = head, scale, steps, learning_rate

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the logits of the trained layer."""
        start = self.initial_layer(support, labels)
        support, query = self.inputs(support), self.inputs(query)

        def loss(weights: torch.Tensor) -> torch.Tensor:
            return self.loss_of_layer(weights, support, labels, query)

        return self.logits(query, descend(start, loss, self.steps, self.learning_rate))

    def initial_layer(self, support: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return weights and a bias of zero, ``[tasks, way, features + 1]``: the normalised class means."""
        means = normalize(prototypes(support, labels), dim=-1)
        return torch.cat([means, means.new_zeros(*means.shape[:-1], 1)], dim=-1)

    def inputs(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return what the layer multiplies, ``[tasks, images, features + 1]``; the last one is for the bias."""
        if self.head == "cosine":
            return pad(normalize(embeddings, dim=-1), (0, 1))  # no bias: it stays zero
        return pad(embeddings, (0, 1), value=1.0)

    def logits(self, inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Apply the layer: ``[tasks, images, way]``."""
        outputs = self.scale * (weights @ inputs.mT)  # in this order, the gradient has the layout of the weights
        if self.head == "cosine":
            outputs = outputs / weights.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # as in normalize
        return outputs.mT

    def loss_of_layer(
        self, weights: torch.Tensor, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each task, ``[tasks]``: the cross-entropy of the support.

        Args:
            weights: of the layer, see ``initial_layer``.
            support: the ``inputs`` of the support.
            labels: see ``TrainingFree.classify``.
            query: the ``inputs`` of the queries; this loss ignores them.
        """
        del query
        return cross_entropy(self.logits(support, weights), labels)


class TransductiveFineTuning(FineTuning):
    """Fine-tuning that also makes the answers to the queries certain (Dhillon et al., 2020, arXiv 1909.02729).

    Only the last layer is trained; the paper also changes the encoder.
    """

    transductive = True

    def loss_of_layer(
        self, weights: torch.Tensor, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each task, equation 8: the support's cross-entropy and the queries' Shannon entropy."""
        certain = entropy(self.logits(query, weights).softmax(-1)).mean(-1)
        return super().loss_of_layer(weights, support, labels, query) + certain


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean over classes of their samples' cross-entropies: ``[tasks]`` of ``[tasks, samples, way]``."""
    shares = labels / labels.sum(1, keepdim=True)
    return -(shares * logits.log_softmax(-1)).sum((1, 2)) / labels.shape[-1]


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return Shannon entropies, natural logarithm, over the last dimension."""
    # The slope at 0 is infinite.
    return torch.special.entr(probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)).sum(-1)
