import numpy as np
import pytest
import torch

from conftest import make_bank
from fewshot.data.episodes import EpisodeDataset, EpisodeNumber
from fewshot.metrics import EpisodeAccuracy, meetings_of


def episode(right: int, queries: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.zeros(1, queries, dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0]]).repeat(1, queries, 1)
    logits[0, right:] = torch.tensor([0.0, 1.0])
    return logits, labels


def test_the_estimate_is_the_mean_over_episodes_with_its_normal_interval():
    counts = [10, 7, 3, 9, 9, 0]
    metric = EpisodeAccuracy()
    for right in counts:
        metric.update(*episode(right))
    estimate, accuracies = metric.compute(), np.array(counts) / 10
    assert estimate.accuracy == pytest.approx(accuracies.mean(), rel=1e-15)
    assert estimate.ci95 == pytest.approx(1.96 * accuracies.std(ddof=1) / np.sqrt(6), rel=1e-12)
    assert estimate.episodes == 6


def test_the_interval_covers_the_truth_about_95_times_in_100():
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        metric = EpisodeAccuracy()
        for right in random.binomial(10, random.beta(8, 2, 60)):
            metric.update(*episode(int(right)))
        estimate = metric.compute()
        covered += abs(estimate.accuracy - 0.8) <= estimate.ci95
    assert 0.91 <= covered / 400 <= 0.98


def test_it_does_not_matter_how_episodes_are_spread_over_processes():
    counts = np.random.default_rng(1).integers(0, 11, 101)
    whole, *shares = [EpisodeAccuracy() for _ in range(4)]
    for number, right in enumerate(counts):
        whole.update(*episode(int(right)))
        shares[number % 3].update(*episode(int(right)))
    for state in ("right", "right_squared", "episodes", "queries"):
        setattr(shares[0], state, sum(getattr(share, state) for share in shares))
    assert shares[0].compute() == whole.compute()


def test_episodes_count_alike_one_by_one_and_together():
    episodes = [episode(right) for right in (3, 10, 0, 7)]
    single, together = EpisodeAccuracy(), EpisodeAccuracy()
    for one in episodes:
        single.update(*one)
    together.update(*(torch.cat(of) for of in zip(*episodes, strict=True)))
    assert together.compute() == single.compute()


def test_all_right_has_no_width_and_one_episode_has_no_interval():
    metric = EpisodeAccuracy()
    metric.update(*episode(10))
    assert np.isnan(metric.compute().ci95)
    metric.update(*episode(10))
    assert metric.compute() == (1.0, 0.0, 2)


def test_meetings_count_each_query_with_every_class_of_its_episode():
    bank = make_bank({"train": [4] * 2, "test": [4] * 5})
    dataset, number = EpisodeDataset(bank, "test", way=3, shot=1, query=2, seed=0), EpisodeNumber(0, 3)
    of_class = [position // 4 - 2 for position in dataset[number].query[::2].tolist()]
    met, taken = meetings_of(dataset, {number: np.array([0, 1, 1, 1, 2, 0])})
    expected = np.zeros((5, 5), dtype=int)
    expected[np.ix_(of_class, of_class)] = 2
    assert met.tolist() == expected.tolist()
    a, b, c = of_class
    assert (taken[a, a], taken[a, b], taken[b, b], taken[c, c], taken[c, a]) == (1, 1, 2, 1, 1)
    assert taken.sum() == 6
