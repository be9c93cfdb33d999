"""Matching networks (Vinyals et al., 2016, arXiv 1606.04080), without and with full context embeddings."""

import torch
from torch import nn
from torch.nn.functional import linear

from fewshot.data.episodes import EmbeddedEpisode
from fewshot.distances import Distance
from fewshot.encoders import features_of
from fewshot.errors import FewShotError
from fewshot.methods.base import Classifier, MetricMethod


class MatchingNetwork(MetricMethod):
    """A query's label is the sum of the support labels, weighted by attention to the support samples.

    Args:
        encoder: the embedding f' = g' of the paper.
        distance: from queries to support samples; the paper's c is minus the cosine distance.
    """

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Logits ``[queries, way]``: the logarithms of the probabilities of equation 1."""
        attention = (-self.distance(embedded.query, embedded.support)).log_softmax(dim=1)  # log a, section 2.1.1
        return sum_by_class(attention, embedded.support_labels, embedded.way)

    def learn(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        """See ``MetricMethod``; a class gets the mean of the attention on its samples.

        Equation 1 takes the sum, which would make a class with twice the samples twice as probable. With equal shots
        the two give the same result.
        """
        classify, samples = super().learn(support, labels, way), labels.bincount(minlength=way)
        return lambda query: classify(query) - samples.log()


class FullContextMatchingNetwork(MatchingNetwork):
    """Matching networks that embed every image in the context of the whole support set (section 2.1.2, appendix A).

    The support set is read as a sequence, so its order matters; episodes shuffle it.

    Args:
        encoder: the embedding f' = g' of the paper, with its number of ``features``.
        distance: see ``MatchingNetwork``.
        unrolling_steps: K of the paper: number of attention steps over the support set per query.

    Raises:
        FewShotError: ``unrolling_steps`` is less than 1.
    """

    def __init__(self, encoder: nn.Module, distance: Distance, unrolling_steps: int) -> None:
        super().__init__(encoder, distance)
        if unrolling_steps < 1:
            raise FewShotError(
                f"method.unrolling_steps={unrolling_steps} must be at least 1; for none, choose method=matching"
            )
        features = features_of(encoder)
        self.unrolling_steps = unrolling_steps
        self.support_lstm = nn.LSTM(features, features, bidirectional=True, batch_first=True)
        # The hidden state [h, r] of equation 3 is twice as wide as h. r is part of the input instead, which is
        # equivalent: the gates are linear in both.
        self.query_lstm = nn.LSTMCell(2 * features, features)

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """See ``MatchingNetwork``; uses the contextual embeddings g of the support and f of the queries."""
        return super().compare(self._in_context(embedded))

    def compare_tasks(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """See ``MetricMethod``; the LSTMs read their weights once a step for all tasks, not for each."""
        return torch.stack([*map(super().compare, self._in_context(embedded).tasks())])

    def _in_context(self, embedded: EmbeddedEpisode) -> EmbeddedEpisode:
        support = self.embed_support(embedded.support)
        return embedded._replace(support=support, query=self.embed_query(embedded.query, support))

    def embed_support(self, support: torch.Tensor) -> torch.Tensor:
        """Compute the embedding g: a bidirectional LSTM over the support set, with a skip connection (appendix A.2).

        Args:
            support: g', ``[support samples, features]``, or ``[tasks, support samples, features]``.

        Returns:
            The same shape.
        """
        forwards, backwards = self.support_lstm(support)[0].chunk(2, dim=-1)
        return support + forwards + backwards

    def embed_query(self, query: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
        """Compute the embedding f: an LSTM that attends to the support set at each step (appendix A.1).

        Args:
            query: f', ``[queries, features]``, or ``[tasks, queries, features]``.
            support: g, ``[support samples, features]``, or ``[tasks, support samples, features]``.

        Returns:
            The shape of ``query``.
        """
        # The cell's gates are linear in query, readout and hidden, and a readout is a mean of support embeddings: so
        # the products with query and support, most of the work, are the same at every step.
        cell = self.query_lstm
        weight_query, weight_support = cell.weight_ih.chunk(2, dim=1)
        query_gates = linear(query, weight_query, cell.bias_ih + cell.bias_hh)
        support_gates = linear(support, weight_support)
        hidden, state = torch.zeros_like(query), torch.zeros_like(query)
        for step in range(self.unrolling_steps):
            attention = (hidden @ support.mT).softmax(dim=-1)  # equation 6
            gates = query_gates + attention @ support_gates  # with the readout of equation 5
            if step:  # hidden is zero at first
                gates = gates + linear(hidden, cell.weight_hh)
            write, keep, new, show = gates.chunk(4, dim=-1)  # in PyTorch's order
            state = keep.sigmoid() * state + write.sigmoid() * new.tanh()
            hidden = show.sigmoid() * state.tanh() + query  # equations 3 and 4
        return hidden


def sum_by_class(attention: torch.Tensor, labels: torch.Tensor, way: int) -> torch.Tensor:
    """Sum the attention on the support samples of each class, in log space.

    Args:
        attention: the log weights, ``[queries, support samples]``.
        labels: int64 ``[support samples]``, every class at least once; classes may differ in shot.
        way: the number of classes.

    Returns:
        The log sums, ``[queries, way]``: finite however small the weights are.
    """
    others = labels != torch.arange(way, device=labels.device)[:, None]
    return attention[:, None].masked_fill(others, -torch.inf).logsumexp(dim=2)
