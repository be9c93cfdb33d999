"""Embed each image once: in validation and test, an embedding depends on nothing but its image."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pytorch_lightning.strategies import Strategy

from fewshot.data.episodes import Gather
from fewshot.hardware import send

EMBEDDED_TOGETHER = 256  # images
Encoder = Callable[[torch.Tensor], torch.Tensor]  # [images, channels, height, width] to [images, ...]


class LabelledEmbeddings(NamedTuple):
    """The embeddings of all images of some classes.

    Attributes:
        embeddings: ``[images, ...]``.
        labels: the class of each image, int64 ``[images]`` of ``0..classes-1``.
    """

    embeddings: torch.Tensor
    labels: torch.Tensor


class EmbeddingTable:
    """Embeddings of images of a bank, by the positions of the images.

    Args:
        positions: the positions of the images, int64 ``[images]``, without repeats.
        embeddings: ``[images, ...]``, on the same device.
        size: the number of images in the bank.
    """

    def __init__(self, positions: torch.Tensor, embeddings: torch.Tensor, size: int) -> None:
        self.embeddings = embeddings
        self._rows = torch.zeros(size, dtype=torch.int64, device=positions.device)
        self._rows[positions] = torch.arange(len(positions), device=positions.device)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the embeddings ``[..., shape of an embedding]`` at the positions, int64 ``[...]``."""
        return self.embeddings[self._rows[send(positions, self._rows.device)]]


def embed(encoder: Encoder, images: Gather, positions: torch.Tensor, strategy: Strategy) -> torch.Tensor:
    """Embed images, a batch at a time.

    The processes share the work. The last bit of an embedding may depend on its batch, so the batches are those of a
    single process.

    Args:
        encoder: embeds each image independently of the others.
        images: loads images by position, on the device of the encoder.
        positions: the images to embed, int64 ``[images]``.
        strategy: the strategy of the trainer, which knows the processes.

    Returns:
        ``[images, ...]``; an embedding can have any shape.
    """
    rank, processes = strategy.global_rank, strategy.world_size  # type: ignore[attr-defined]
    pieces = positions.split(EMBEDDED_TOGETHER)
    # A process without a piece embeds the first one to get the shape of an embedding.
    own = [encoder(images(piece)) for piece in pieces[rank::processes] or pieces[:1]]
    embeddings = own[0].new_zeros(len(positions), *own[0].shape[1:])
    for target, values in zip(embeddings.split(EMBEDDED_TOGETHER)[rank::processes], own, strict=False):
        target.copy_(values)
    return strategy.reduce(embeddings, reduce_op="sum")
