"""TIM (Boudiaf et al., 2020, arXiv 2008.11297) and alpha-TIM (Veilleux et al., 2021, arXiv 2204.11181)."""

from typing import Annotated, Literal

import torch
from annotated_types import Gt
from torch import nn

from fewshot.checks import Count, Positive, checked
from fewshot.methods.finetune import cross_entropy, entropy
from fewshot.methods.training_free import Features, TrainingFree, descend, in_span, prototypes


class TIM(TrainingFree):
    """Prototypes that classify the support, make the answers to the queries certain, and use all classes equally.

    It maximises the mutual information of queries and answers. Its marginal entropy prefers as many queries of every
    class, which flatters it in balanced episodes (arXiv 2204.11181).

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        solver: "adm": the paper's alternating direction method; "gradient": Adam.
        temperature: tau of the paper, a factor of the squared distances, positive.
        support_weight: lambda, of the support's cross-entropy, positive.
        conditional_weight: alpha, of the entropy of each prediction, positive.
        marginal_weight: of the entropy of the mean prediction, with ``solver=gradient``; positive.
        steps: at least 1.
        learning_rate: of Adam, positive.

    Raises:
        FewShotError: a setting is out of range.
    """

    transductive = True
    assumes_balance = True

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "l2n",
        centre: Literal["train", "support"] = "train",
        solver: Literal["adm", "gradient"] = "adm",
        temperature: Positive = 15.0,
        support_weight: Positive = 0.1,
        conditional_weight: Positive = 0.1,
        marginal_weight: Positive = 1.0,
        steps: Count = 150,
        learning_rate: Positive = 1e-4,
    ) -> None:
        super().__init__(encoder, features, centre)
        self.solver, self.temperature, self.steps, self.learning_rate = solver, temperature, steps, learning_rate
        self.support_weight, self.conditional_weight = support_weight, conditional_weight
        self.marginal_weight = marginal_weight

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the logits of the adapted prototypes, equation 1."""
        if self.solver == "adm":
            support, query = in_span(support, query)
            centres = prototypes(support, labels)
            for _ in range(self.steps):
                centres = self.alternate(support, labels, query, centres)
            return self.logits(query, centres)

        both = torch.cat([support, query], dim=1)

        def loss(weights: torch.Tensor) -> torch.Tensor:
            known, answers = self.logits(both, weights).tensor_split([support.shape[1]], dim=1)
            return self.loss_of_prototypes(known, labels, answers)

        return self.logits(query, descend(prototypes(support, labels), loss, self.steps, self.learning_rate))

    def logits(self, embeddings: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """Return the logarithms of equation 1 without what all classes have in common: ``[tasks, images, way]``."""
        # In this order, the gradient has the layout of the centres.
        products = centres @ embeddings.mT - centres.square().sum(-1, keepdim=True) / 2
        return self.temperature * products.mT

    def loss_of_prototypes(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the loss of each task, equation 4, from logits ``[tasks, images, way]``."""
        answers = query.softmax(-1)
        information = self.marginal_weight * entropy(answers.mean(1))
        information = information - self.conditional_weight * entropy(answers).mean(1)
        return self.support_weight * cross_entropy(support, labels) - information

    def alternate(
        self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, centres: torch.Tensor
    ) -> torch.Tensor:
        """Take one step of proposition 1: auxiliary answers q of the queries, then the prototypes w."""
        known, answers = self.logits(support, centres).softmax(-1), self.logits(query, centres).softmax(-1)
        powers = answers ** (1 + self.conditional_weight)
        tiny = torch.finfo(powers.dtype).tiny  # no query may answer a class
        auxiliary = powers / powers.sum(1, keepdim=True).clamp_min(tiny).sqrt()
        auxiliary = auxiliary / auxiliary.sum(-1, keepdim=True)
        own, theirs = self.support_weight / (1 + self.conditional_weight), support.shape[1] / query.shape[1]
        moved = own * (labels - known).mT @ support + theirs * (auxiliary - answers).mT @ query
        kept = (own * known.sum(1) + theirs * answers.sum(1))[..., None] * centres
        return (moved + kept) / (own * labels.sum(1) + theirs * auxiliary.sum(1))[..., None]


class AlphaTIM(TIM):
    """TIM with Tsallis entropies, for queries that are not balanced (arXiv 2204.11181, section 4).

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``.
        centre: see ``TrainingFree``.
        alpha: order of the entropies, above 1; the paper's code takes 2 for one shot and 7 for five or more.
        temperature: see ``TIM``.
        support_weight: see ``TIM``.
        conditional_weight: see ``TIM``.
        marginal_weight: see ``TIM``.
        steps: see ``TIM``.
        learning_rate: see ``TIM``.

    Raises:
        FewShotError: a setting is out of range.
    """

    assumes_balance = False

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        features: Features = "l2n",
        centre: Literal["train", "support"] = "train",
        alpha: Annotated[float, Gt(1)] = 2.0,
        temperature: Positive = 15.0,
        support_weight: Positive = 1.0,
        conditional_weight: Positive = 1.0,
        marginal_weight: Positive = 1.0,
        steps: Count = 100,
        learning_rate: Positive = 1e-3,
    ) -> None:
        weights = support_weight, conditional_weight, marginal_weight
        super().__init__(encoder, features, centre, "gradient", temperature, *weights, steps, learning_rate)
        self.alpha = alpha

    def loss_of_prototypes(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the loss of each task, from logits ``[tasks, images, way]``."""
        answers = query.softmax(-1)
        information = self.marginal_weight * self._tsallis(answers.mean(1))
        information = information - self.conditional_weight * self._tsallis(answers).mean(1)
        return self.support_weight * cross_entropy(support, labels) - information

    def _tsallis(self, probabilities: torch.Tensor) -> torch.Tensor:
        return (1 - probabilities.pow(self.alpha).sum(-1)) / (self.alpha - 1)
