"""SimpleShot (Wang et al., 2019, arXiv 1911.04623): nearest class mean of centred, normalised embeddings."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import normalize

from fewshot.data.episodes import EmbeddedEpisode
from fewshot.distances import Distance
from fewshot.embeddings import LabelledEmbeddings
from fewshot.methods.base import MetricMethod
from fewshot.methods.protonet import prototypes


class Centred(MetricMethod):
    """CL2N of the paper; the mean is that of the training classes."""

    def __init__(self, encoder: nn.Module, distance: Distance, features: int) -> None:
        super().__init__(encoder, distance)
        self.register_buffer("mean", torch.zeros(features))

    def before_evaluation(self, embed_split: Callable[[str], LabelledEmbeddings]) -> None:
        """Take the mean of the training classes."""
        self.mean = embed_split("train").embeddings.mean(0)

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """Logits ``[queries, way]``."""
        support, query = (normalize(embeddings - self.mean) for embeddings in (embedded.support, embedded.query))
        return -self.distance(query, prototypes(support, embedded.support_labels, embedded.way))
