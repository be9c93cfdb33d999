import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_bank
from fewshot.data.episodes import (
    EpisodeDataset,
    EpisodeNumber,
    draw_episode,
    share_out,
    stack,
)
from fewshot.errors import FewShotError

COUNTS = st.lists(st.integers(4, 30), min_size=3, max_size=40)


@given(COUNTS, st.integers(0, 2**32), st.sampled_from(["train", "val", "test"]), st.integers(0, 99), st.data())
@settings(max_examples=300, deadline=None)
def test_classes_and_images_are_in_range_and_never_repeat(counts, seed, split, epoch, data):
    way = data.draw(st.integers(1, len(counts)))
    shot = data.draw(st.integers(1, min(counts) - 1))
    query = data.draw(st.integers(1, min(counts) - shot))
    per_class = shot + query
    number = data.draw(st.integers(0, 10**6))
    of_class = np.array(counts)
    classes, images, order = draw_episode(
        of_class, way, shot, query, seed=seed, split=split, epoch=epoch, number=number
    )
    assert sorted(order.tolist()) == list(range(way * shot))
    assert classes.shape == (way,) and images.shape == (way, per_class)
    assert len(set(classes.tolist())) == way
    assert set(classes.tolist()) <= set(range(len(counts)))
    for image_class, positions in zip(classes, images, strict=True):
        assert len(set(positions.tolist())) == per_class
        assert positions.min() >= 0 and positions.max() < of_class[image_class]


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_episode_is_rebuilt_from_its_number_and_differs_from_its_neighbours(seed, epoch, number):
    def draw(**changes):
        names = {"seed": seed, "split": "train", "epoch": epoch, "number": number} | changes
        return [drawn.tolist() for drawn in draw_episode(np.full(500, 20), 20, 5, 15, **names)]

    assert draw() == draw()
    for changes in ({"seed": seed + 1}, {"split": "val"}, {"epoch": epoch + 1}, {"number": number + 1}):
        assert draw() != draw(**changes)


def test_every_class_and_every_image_of_it_is_drawn_equally_often():
    counts = np.array([6, 3, 4, 5])
    drawn = np.zeros((4, 6))
    episodes = 6000
    for number in range(episodes):
        classes, images, _ = draw_episode(counts, 2, 1, 1, seed=0, split="test", epoch=0, number=number)
        drawn[classes[:, None], images] += 1
    expected = np.where(np.arange(6) < counts[:, None], episodes * 0.5 * 2 / counts[:, None], 0)
    assert np.abs(drawn - expected).max() < 5 * np.sqrt(episodes * 0.25)
    assert (drawn[expected == 0] == 0).all()


def test_support_and_query_are_the_images_of_the_labelled_classes():
    bank = make_bank({"train": [5] * 3, "val": [7] * 6, "test": [5]})
    dataset = EpisodeDataset(bank, "val", way=4, shot=2, query=3, seed=1)
    number = EpisodeNumber(0, 17)
    episode = dataset[number]
    positions = torch.cat([episode.support, episode.query])
    assert len(positions.unique()) == len(positions) == 20
    assert episode.way == 4
    assert sorted(episode.support_labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert episode.query_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    classes = np.searchsorted(bank.offsets, positions.numpy(), side="right") - 1
    labels = torch.cat([episode.support_labels, episode.query_labels])
    of_label = [set(classes[(labels == label).numpy()].tolist()) for label in range(4)]
    assert all(len(found) == 1 for found in of_label) and len(set.union(*of_label)) == 4
    assert all(bank.splits[found.pop()] == "val" for found in of_label)


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_processes_and_pieces_share_a_step_and_their_mean_is_that_of_all_of_it(count, processes, pieces, first):
    together = range(first, first + count)
    shares = [list(share_out(together, rank, processes, pieces)) for rank in range(processes)]
    assert len({len(of_process) for of_process in shares}) == 1  # as many for every process
    assert all(weight > 0 for _, weight in shares[0])  # its batch norm is kept
    counted = [number for of_process in shares for own, weight in of_process if weight for number in own]
    assert sorted(counted) == list(together)
    assert all(own and set(own) <= set(together) for of_process in shares for own, _ in of_process)
    mean = sum(weight * np.mean(own) for of_process in shares for own, weight in of_process) / (processes * pieces)
    assert mean == pytest.approx(np.mean(together))


def test_one_process_takes_all_episodes_of_a_step():
    assert list(share_out(range(3, 8))) == [(range(3, 8), 1.0)]


def test_a_meta_batch_can_be_taken_apart():
    bank = make_bank({"train": [9], "test": [6] * 8})
    dataset = EpisodeDataset(bank, "test", way=5, shot=2, query=1, seed=0)
    episodes = [dataset[EpisodeNumber(0, number)] for number in range(5)]
    together = stack(episodes)
    assert together.support.shape == (5, 10) and together.query_labels.shape == (5, 5)
    pieces = list(together.split(2))
    assert [len(piece.query) for piece in pieces] == [2, 2, 1]
    for apart in (together.tasks(), (task for piece in pieces for task in piece.tasks())):
        for task, episode in zip(apart, episodes, strict=True):
            assert task.way == 5
            assert all(torch.equal(a, b) for a, b in zip(task[:-1], episode[:-1], strict=True))


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        ({"way": 5}, "way=5 is more than the 4 classes of the test split"),
        ({"shot": 2, "query": 3}, "class 3 of the test split has 4"),
    ],
)
def test_an_episode_that_cannot_be_drawn_is_refused(changes, reported):
    bank = make_bank({"train": [9], "test": [6, 6, 4, 6]})
    with pytest.raises(FewShotError, match=reported):
        EpisodeDataset(bank, "test", **{"way": 2, "shot": 1, "query": 1, "seed": 0} | changes)


@pytest.mark.parametrize(("counts", "reported"), [([5], "only the class class 1"), ([], "no class")])
def test_a_split_with_nothing_to_tell_apart_is_refused(counts, reported):
    bank = make_bank({"train": [9], "val": counts, "test": [6] * 8})
    with pytest.raises(FewShotError, match=f"the val split has {reported}; an episode needs at least 2"):
        EpisodeDataset(bank, "val", way=5, shot=1, query=1, seed=0)


def test_the_support_comes_shuffled():
    bank = make_bank({"train": [9], "test": [6] * 8})
    dataset = EpisodeDataset(bank, "test", way=5, shot=1, query=1, seed=0)
    orders = {tuple(dataset[EpisodeNumber(0, number)].support_labels.tolist()) for number in range(50)}
    assert len(orders) > 25
