from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import make_bank
from fewshot.data.episodes import EpisodeDataset, EpisodeNumber
from fewshot.errors import FewShotError
from fewshot.evaluation import Evaluation
from fewshot.metrics import EpisodeAccuracy, confusion_counts, credit, largest


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


def test_the_interval_covers_the_true_accuracy_about_95_times_in_100():
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        metric = EpisodeAccuracy()
        for right in random.binomial(10, random.beta(8, 2, 60)):
            metric.update(*episode(int(right)))
        estimate = metric.compute()
        covered += abs(estimate.accuracy - 0.8) <= estimate.ci95
    assert 0.91 <= covered / 400 <= 0.98


def test_the_estimate_does_not_depend_on_the_distribution_over_processes():
    counts = np.random.default_rng(1).integers(0, 11, 101)
    whole, *shares = [EpisodeAccuracy() for _ in range(4)]
    for number, right in enumerate(counts):
        whole.update(*episode(int(right)))
        shares[number % 3].update(*episode(int(right)))
    for state in ("right", "right_squared", "episodes", "queries"):
        setattr(shares[0], state, sum(getattr(share, state) for share in shares))
    assert shares[0].compute() == whole.compute()


def test_updates_may_be_batched():
    episodes = [episode(right) for right in (3, 10, 0, 7)]
    single, together = EpisodeAccuracy(), EpisodeAccuracy()
    for logits, labels in episodes:
        single.update(logits, labels)
    together.update(*map(torch.cat, zip(*episodes, strict=True)))
    assert together.compute() == single.compute()


def test_perfect_accuracy_has_zero_width_and_one_episode_has_no_interval():
    metric = EpisodeAccuracy()
    metric.update(*episode(10))
    assert np.isnan(metric.compute().ci95)
    metric.update(*episode(10))
    assert metric.compute() == (1.0, 0.0, 2, 0)


def test_confusion_counts_have_each_query_with_every_class_of_its_episode():
    bank = make_bank({"train": [4] * 2, "test": [4] * 5})
    dataset, number = EpisodeDataset(bank, "test", way=3, shot=1, query=2, seed=0), EpisodeNumber(0, 3)
    classes = [position // 4 - 2 for position in dataset[number].query[::2].tolist()]
    together, predicted = confusion_counts(dataset, {number: np.eye(3, dtype=bool)[[0, 1, 1, 1, 2, 0]]})
    expected = np.zeros((5, 5), dtype=int)
    expected[np.ix_(classes, classes)] = 2
    assert together.tolist() == expected.tolist()
    a, b, c = classes
    assert (predicted[a, a], predicted[a, b], predicted[b, b], predicted[c, c], predicted[c, a]) == (1, 1, 2, 1, 1)
    assert predicted.sum() == 6


def test_equal_logits_share_the_credit_so_that_constant_embeddings_give_chance():
    labels = torch.arange(5).repeat_interleave(3)[None]
    metric = EpisodeAccuracy()
    for _ in range(4):
        metric.update(torch.zeros(1, 15, 5), labels)
    assert metric.compute() == (0.2, 0.0, 4, 60)


def test_the_estimate_and_its_interval_are_exact_with_ties_of_every_size():
    random, way, queries = np.random.default_rng(0), 7, 10
    logits = torch.from_numpy(random.integers(0, 3, (200, queries, way)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, way, (200, queries)))
    credits = np.array(
        [
            [(row[label] == row.max()) / (row == row.max()).sum() for row, label in zip(*episode, strict=True)]
            for episode in zip(logits.numpy(), labels.numpy(), strict=True)
        ]
    )
    assert torch.equal(credit(logits, labels), torch.from_numpy(credits).float())
    whole, *shares = [EpisodeAccuracy() for _ in range(4)]
    whole.update(logits, labels)
    for number in range(200):
        shares[number % 3].update(logits[number : number + 1], labels[number : number + 1])
    for state in whole.metric_state:
        setattr(shares[0], state, sum(getattr(share, state) for share in shares))
    estimate, accuracies = whole.compute(), credits.mean(1)
    assert shares[0].compute() == estimate
    assert estimate.accuracy == pytest.approx(accuracies.mean(), rel=1e-14)
    assert estimate.ci95 == pytest.approx(1.96 * accuracies.std(ddof=1) / np.sqrt(200), rel=1e-12)
    assert estimate.tied == ((logits == logits.amax(2, keepdim=True)).sum(2) > 1).sum()
    # The answers used in paired comparisons give the same credits.
    evaluation = Evaluation(
        SimpleNamespace(datasets={"test": SimpleNamespace(query_labels=labels[0], concentration=None)}),
        {EpisodeNumber(0, 0): largest(logits)[0].numpy()},
        estimate,
        None,
        0.0,
    )
    assert evaluation.correct == pytest.approx(credits[:1].sum(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_are_an_error(value):
    metric, (logits, labels) = EpisodeAccuracy(), episode(3)
    logits[0, 4, 1] = value
    metric.update(logits, labels)
    with pytest.raises(FewShotError, match="the logits of 1 of 10 queries are not finite"):
        metric.compute()


def test_classes_with_equal_logits_share_an_answer():
    bank = make_bank({"train": [4] * 2, "test": [4] * 3})
    dataset, number = EpisodeDataset(bank, "test", way=3, shot=1, query=1, seed=0), EpisodeNumber(0, 0)
    _, predicted = confusion_counts(dataset, {number: np.ones((3, 3), dtype=bool)})
    assert predicted == pytest.approx(np.full((3, 3), 1 / 3))
