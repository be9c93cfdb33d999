"""PT-MAP (Hu, Gripon & Pateux, 2021, arXiv 2006.03806)."""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import nn
from torch.nn.functional import normalize

from fewshot.checks import Count, Positive, checked
from fewshot.methods.training_free import TrainingFree, in_span, prototypes, squared_distances

SINKHORN_STEPS = 100  # at most, for each movement of the centres: the next one continues from there
TOLERANCE = 1e-4  # of the sum over the classes of a query, which is 1
MIN_LOG_KERNEL = -300.0  # smallest logarithm of the kernel: the square of exp(-300) is still a normal float64


class PTMAP(TrainingFree):
    """Assign the queries to the classes by optimal transport, with as many to each class, and move the class centres.

    It assumes equally many queries of every class, which flatters it in balanced episodes (Veilleux et al., 2021,
    arXiv 2204.11181).

    Args:
        encoder: its embeddings must not be negative; negative numbers count as 0.
        power: beta of the power transform, positive.
        regularisation: lambda of the Sinkhorn algorithm, positive.
        inertia: alpha, the share of a step in the movement of a centre, positive and at most 1.
        steps: movements of the centres, at least 1.

    Raises:
        FewShotError: a setting is out of range.
    """

    transductive = True
    assumes_balance = True

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        power: Positive = 0.5,
        regularisation: Positive = 10.0,
        inertia: Annotated[float, Gt(0), Le(1)] = 0.2,
        steps: Count = 20,
    ) -> None:
        super().__init__(encoder)
        self.power, self.regularisation, self.inertia, self.steps = power, regularisation, inertia, steps

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the last transport plan: algorithm 1 of the paper."""
        support, query = in_span(self.preprocess(support), self.preprocess(query))
        centres = prototypes(support, labels)
        log_plan, classes = sinkhorn(squared_distances(query, centres), self.regularisation)  # equation 3
        for _ in range(self.steps):
            plan = log_plan.exp()
            total = (labels.sum(1) + plan.sum(1))[..., None]
            means = (labels.mT @ support + plan.mT @ query) / total  # equation 5
            centres = centres + self.inertia * (means - centres)  # equation 6
            log_plan, classes = sinkhorn(squared_distances(query, centres), self.regularisation, classes)
        return log_plan

    def preprocess(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Apply the power transform (equation 1), and centre support and queries each by themselves."""
        embeddings = normalize((embeddings.clamp_min(0) + 1e-6) ** self.power, dim=-1)
        return normalize(embeddings - embeddings.mean(1, keepdim=True), dim=-1)


def sinkhorn(
    cost: torch.Tensor, regularisation: float, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan the transport of queries to classes, each class receiving the same (Cuturi, 2013, arXiv 1306.0895).

    Args:
        cost: of each query and class, ``[tasks, queries, way]``.
        regularisation: the larger, the more certain is the plan.
        start: the factors of the classes from a similar problem, from which it converges faster.

    Returns:
        The logarithm of the plan, whose sum is 1 over the classes of a query and queries / way over the queries of a
        class; and the factors of the classes, ``[tasks, way, 1]``.
    """
    log_kernel = -regularisation * cost.double()
    log_kernel = log_kernel - log_kernel.amax(2, keepdim=True)  # a factor of each row changes nothing
    # Otherwise, no query may reach a class that is far from all of them.
    log_kernel = log_kernel.clamp_min(MIN_LOG_KERNEL)
    kernel, share = log_kernel.exp(), cost.shape[1] / cost.shape[2]
    classes = torch.ones_like(kernel[:, :1].mT) if start is None else start
    rows = 1 / (kernel @ classes)
    done = torch.zeros_like(rows[:, :1], dtype=torch.bool)  # by task, so that none depends on the others
    for _ in range(SINKHORN_STEPS):
        classes = torch.where(done, classes, share / (kernel.mT @ rows))
        sums = kernel @ classes
        converged = (rows * sums - 1).abs().amax((1, 2), keepdim=True) < TOLERANCE
        rows = torch.where(done, rows, 1 / sums)
        done = done | converged
        if done.all():
            break
    return (log_kernel + rows.log() + classes.mT.log()).to(cost), classes
