"""Embeddings, each computed once."""

from types import SimpleNamespace

import pytest
import torch

from fewshot import embeddings
from fewshot.embeddings import EmbeddingTable, embed

IMAGES = torch.randn(200, 3, 4, 4)


def strategy(rank=0, processes=1):
    return SimpleNamespace(global_rank=rank, world_size=processes, reduce=lambda tensor, **_: tensor)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 3)])
def test_embeddings_of_any_shape_are_found_by_their_positions(shape):
    positions = torch.arange(3, 200, 3)
    values = torch.randn(200, *shape)
    found = embed(lambda images: values[images[:, 0].long()], lambda at: at[:, None], positions, strategy())
    assert torch.equal(found, values[positions])
    asked = positions[torch.randint(len(positions), (2, 5))]
    assert torch.equal(EmbeddingTable(positions, found, 200)(asked), values[asked])


@pytest.mark.parametrize("processes", [2, 15])
def test_processes_share_out_the_images_to_embed(monkeypatch, processes):
    monkeypatch.setattr(embeddings, "EMBEDDED_TOGETHER", 8)
    batches = []

    def embedded(rank, processes):
        return embed(
            lambda images: batches.append(len(images)) or images.flatten(1),
            lambda positions: IMAGES[positions],
            torch.arange(0, 140, 2),
            strategy(rank, processes),
        )

    whole = embedded(0, 1)
    pieces = batches.copy()
    assert sum(pieces) == len(whole) == 70 and len(pieces) == 9
    batches.clear()
    assert torch.equal(sum(embedded(rank, processes) for rank in range(processes)), whole)
    assert sorted(batches) == sorted(pieces + [8] * max(0, processes - len(pieces)))
