import numpy as np
import pytest
import torch

from benchmarks import maml, training, without
from benchmarks.without import CHANNELS_LAST, DERIVATIVES, NORM_LAST, POOL_FIRST, TOGETHER, remove
from fewshot.encoders.adaptable import make_adaptable, solves_together
from fewshot.encoders.block import Block
from fewshot.encoders.conv4 import Conv4

TASK = {"tasks": 3, "way": 3, "shot": 2, "query": 1, "channels": 1, "size": 16, "steps": 2, "rate": 0.1}
SHAPE = {"size": 16, "channels": 1, "classes": 20, "images": 6, "way": 3, "shot": 1, "query": 2, "steps": 2}


def test_steps_without_a_technique_compute_the_same(monkeypatch):
    monkeypatch.setattr(maml, "TASK", TASK)
    monkeypatch.setattr(training, "OMNIGLOT", SHAPE)
    monkeypatch.setattr(without, "MINIIMAGENET", {**SHAPE, "channels": 3})
    contests = without.contests()
    assert [len(contest.entrants) for contest in contests.values()] == [5, 5, 7, 6]
    for contest in contests.values():
        ours, *others = [entrant.build(**entrant.settings)() for entrant in contest.entrants]
        for result in others:
            assert np.linalg.norm(result - ours) < 1e-3 * np.linalg.norm(ours)


@pytest.mark.parametrize("technique", [CHANNELS_LAST, NORM_LAST, POOL_FIRST, DERIVATIVES])
def test_a_technique_is_gone(technique):
    encoder = Conv4(1, 16, filters=4)
    make_adaptable(encoder, twice=True)
    remove(technique, encoder)
    kinds = [type(module).__name__ for module in encoder[0]]
    assert (kinds == ["AdaptableConv2d", "BatchStatisticsNorm2d", "ReLU", "MaxPool2d"]) == (technique == POOL_FIRST)
    assert [encoder[0][0].twice, encoder[0][1].twice] == [technique != DERIVATIVES] * 2
    assert isinstance(encoder[0], Block) == (technique != NORM_LAST)
    images = torch.rand(2, 16, 16, 1).movedim(-1, -3)
    assert encoder.feature_maps(images).is_contiguous(memory_format=torch.channels_last) or technique == CHANNELS_LAST
    if technique == CHANNELS_LAST:
        assert encoder[0](images).is_contiguous()


def test_tasks_are_not_solved_side_by_side_without_that():
    encoder = Conv4(1, 16, filters=4)
    make_adaptable(encoder, twice=True)
    assert solves_together(encoder)
    remove(TOGETHER, encoder)
    assert not solves_together(encoder)
