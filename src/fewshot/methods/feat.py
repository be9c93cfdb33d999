"""FEAT: prototypes that look at each other (Ye et al., 2020, arXiv 1812.03664)."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import nn
from torch.nn.functional import cross_entropy

from fewshot.checks import Share, checked
from fewshot.data.episodes import EmbeddedEpisode, MetaBatch
from fewshot.distances import Distance
from fewshot.encoders import features_of
from fewshot.methods.protonet import PrototypicalNetwork, prototypes


class FEAT(PrototypicalNetwork):
    """Adapt the prototypes to the episode by self-attention over all of them; assign queries to the nearest.

    Start from a trained encoder (``encoder.init``), as the paper does. Attention has one head, a skip connection and
    layer norm, and 4 x features² weights: choose an encoder with short embeddings, such as ``encoder.pool=max``.

    Args:
        encoder: the embedding function E of the paper, with its number of ``features``.
        distance: from queries to adapted prototypes; the paper's is squared and divided by a temperature.
        balance: weight of the contrastive term of the loss, lambda of equation 7, at least 0.
        dropout: share of the attention's output dropped in training, at least 0 and below 1.

    Raises:
        FewShotError: a setting is out of range.
    """

    @checked("method")
    def __init__(
        self, encoder: nn.Module, distance: Distance, balance: Annotated[float, Ge(0)] = 0.1, dropout: Share = 0.5
    ) -> None:
        super().__init__(encoder, distance)
        features = features_of(encoder)
        self.balance = balance
        self.attention = nn.MultiheadAttention(features, num_heads=1, batch_first=True)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(features)

    def adapt(self, members: torch.Tensor) -> torch.Tensor:
        """Apply the set-to-set function T of equation 4: ``[sets, members, features]`` to the same shape."""
        context, _ = self.attention(members, members, members, need_weights=False)
        adapted: torch.Tensor = self.norm(members + self.dropout(context))
        return adapted

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Return logits ``[queries, way]``: minus the distances to the adapted prototypes."""
        means = prototypes(embedded.support, embedded.support_labels, embedded.way)
        return -self.distance(embedded.query, self.adapt(means[None])[0])

    def contrast(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Return the contrastive term of equation 7 for an episode: a loss.

        Support and query of each class are adapted among themselves; each image must be nearest to the centre of its
        class, so adapted embeddings of a class stay together.
        """
        images = torch.cat([embedded.support, embedded.query])
        labels = torch.cat([embedded.support_labels, embedded.query_labels])
        by_class = labels.argsort(stable=True).view(embedded.way, -1)  # every class has the same number in training
        centres = self.adapt(images[by_class]).mean(1)
        return cross_entropy(-self.distance(images, centres), labels)

    def training_step(self, meta_batch: MetaBatch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Return the mean loss over the episodes of the meta-batch, equation 7."""
        episodes = meta_batch.load()
        embedded = [self.embed_episode(episode) for episode in episodes.tasks()]
        logits = torch.stack([self.compare(one) for one in embedded])
        loss = self.loss(logits.flatten(0, 1), episodes.query_labels.flatten())
        if self.balance:
            loss = loss + self.balance * torch.stack([self.contrast(one) for one in embedded]).mean()
        self.log_training(loss, logits, episodes.query_labels)
        return loss * meta_batch.share.weight
