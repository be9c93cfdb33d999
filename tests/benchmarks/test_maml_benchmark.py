import numpy as np
import pytest

from benchmarks import maml
from benchmarks.maml import make_tasks, ours, theirs

TASK = {"tasks": 3, "way": 3, "shot": 2, "query": 1, "channels": 1, "size": 16, "steps": 2, "rate": 0.1}


@pytest.mark.parametrize("order", [1, 2])
def test_all_implementations_compute_the_same_meta_gradient(order):
    expected = ours(order, "loop", TASK)()
    ways = [{"way": "clone"}, {"way": "clone", "dtype": "float64"}, *([{"way": "article"}] if order == 2 else [])]
    for settings in ways:
        found = theirs(order, task=TASK, **settings)()
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(ours(3 - order, "loop", TASK)() - expected) > 1e-2 * np.linalg.norm(expected)


def test_images_have_the_memory_layout_of_training():
    task = next(make_tasks(2, 3, 1, 1, 1, 8).tasks())
    assert task.support.stride() == (64, 1, 8, 1)


def test_the_contests_for_a_gpu_compute_the_same(monkeypatch):
    monkeypatch.setattr(maml, "TASK", TASK)
    contests = maml.device_contests("cpu")
    assert list(contests) == ["maml_second_order", "maml_first_order"]
    for contest in contests.values():
        first, *others = [entrant.build(**entrant.settings)() for entrant in contest.entrants]
        assert len(others) == 3
        for result in others:
            assert np.linalg.norm(result - first) < 1e-4 * np.linalg.norm(first)
