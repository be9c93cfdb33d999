"""What leaving examples out says about a classifier, and the classifier that is chosen by it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from fewshot.errors import FewShotError
from fewshot.held_out import FITS, HeldOut, hold_out, parts
from fewshot.learned import Learned
from fewshot.methods import auto
from fewshot.methods.auto import CENTRED, DEFAULT, MEANS, Auto, class_means, directions, expected_temperature, fit
from fewshot.methods.protonet import PrototypicalNetwork


def clusters(shots, noise=0.6, seed=0, features=32):
    """Examples and queries near one centre per class; embeddings have a large common part, as those of networks do."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(shots), features, generator=generator)

    def near(labels):
        return 3 + centres[labels] + noise * torch.randn(len(labels), features, generator=generator)

    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots))
    truth = torch.arange(len(shots)).repeat_interleave(100)
    return near(labels), labels, near(truth), truth


def test_each_example_is_left_out_equally_often_with_one_of_every_other_class():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    left_out = list(parts(labels))
    assert 0 < len(left_out) <= FITS
    for part in left_out:
        assert labels[part].unique().tolist() == [0, 1] and len(part) == 2
    counts = torch.cat(left_out).bincount(minlength=7)
    assert counts[:6].unique().numel() == 1 and counts[6] == 0
    assert list(parts(torch.tensor([0, 1, 2]))) == []
    many = list(parts(torch.arange(2).repeat_interleave(100)))
    assert len(many) == FITS and torch.cat(many).bincount().tolist() == [1] * 200


@pytest.mark.parametrize(
    ("shots", "more"),
    [
        ((2, 5), "one more example"),
        ((20, 3), "one more example"),
        ((41, 3), "up to 3 more examples"),
        ((100, 100), "up to 5 more examples"),
    ],
)
def test_the_examples_that_queries_have_more_are_counted(shots, more):
    labels = torch.arange(2).repeat_interleave(torch.tensor(shots))
    examples = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0))
    most = max(int(labels[part].bincount().max()) for part in parts(labels))
    assert most == (1 if more == "one more example" else int(more.split()[2]))
    learned = Learned(("a", "b"), examples, labels, torch.stack, examples.mm, lambda *_: lambda rows: rows[:, :2])
    (line, *_) = learned.describe([""] * len(labels))
    assert line.endswith(f"with {more} per class, queries may be classified slightly better")


def test_an_example_is_answered_by_a_classifier_without_it():
    support, labels, _, _ = clusters([3, 3, 3])
    seen = []

    def learn(kept, kept_labels, way):
        assert kept_labels.bincount().tolist() == [2, 2, 2] and way == 3

        def classify(queries):
            seen.append((kept[:, None] == queries).all(-1).any())
            return torch.zeros(len(queries), way)

        return classify

    assert hold_out(learn, support, labels, 3).examples == 9
    assert not any(seen)


def test_accuracy_confusions_and_suspects():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    logits = 9.0 * torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 1, 2, 2, 0, 1, 1, 1, 2, 0]), 3)
    found = HeldOut(logits, torch.arange(6).repeat(2), labels)
    accuracy, low, high = found.accuracy()
    assert accuracy == pytest.approx(4.5 / 6) and 0.25 < low < accuracy < high < 1
    assert found.confused() == [(0.25, 0, 1), (0.125, 0, 2)]
    ((example, label, probability),) = found.suspects()
    assert (example, label) == (1, 1) and probability > 0.99


def test_the_estimate_is_what_queries_get_with_one_example_less():
    accuracies, estimates = [], []
    for seed in range(20):
        support, labels, query, truth = clusters([3] * 5, noise=1.6, seed=seed)
        kept = torch.tensor([0, 1, 3, 4, 6, 7, 9, 10, 12, 13])
        method = PrototypicalNetwork(torch.nn.Identity())
        answers = method.learn(support[kept], labels[kept], 5)(query)
        accuracies.append((answers.argmax(1) == truth).double().mean().item())
        estimates.append(hold_out(method.learn, support, labels, 5).accuracy()[0])
    assert 0.4 < np.mean(accuracies) < 0.95
    assert abs(np.mean(accuracies) - np.mean(estimates)) < 0.06


@pytest.mark.parametrize("shots", [[1] * 4, [3] * 5, [10] * 2])
def test_the_default_is_scikit_learns_logistic_regression_on_normalised_embeddings(shots):
    support, labels, query, _ = clusters(shots)
    model = LogisticRegression(max_iter=1000).fit(normalize(support, dim=1), labels)
    expected = torch.from_numpy(model.decision_function(normalize(query, dim=1)))
    expected = expected if expected.dim() > 1 else expected[:, None] * torch.tensor([-0.5, 0.5])
    np.testing.assert_allclose(fit(DEFAULT, support, labels, len(shots))(query), expected, atol=0.005)


def test_with_one_example_a_class_the_default_is_taken_at_a_fixed_temperature():
    support, labels, query, _ = clusters([1] * 4)
    learned = Auto(torch.nn.Identity()).learn(support, labels, 4)
    assert learned.name == DEFAULT and learned.held_out is None and "one example a class" in learned.why
    expected = fit(DEFAULT, support, labels, 4)(query) / expected_temperature(DEFAULT, 1, 4)
    np.testing.assert_allclose(learned(query), expected, rtol=1e-5)


def test_the_centred_one_is_the_same_on_centred_directions():
    support, labels, query, _ = clusters([3] * 4)
    centre = class_means(normalize(support, dim=1), labels, 4).mean(0)
    model = LogisticRegression(C=auto.PENALTIES[CENTRED], max_iter=1000)
    model.fit(directions(support, centre).double(), labels)
    expected = model.decision_function(directions(query, centre).double())
    np.testing.assert_allclose(fit(CENTRED, support, labels, 4)(query), expected, atol=0.005)


@pytest.mark.parametrize("shots", [[2, 2], [5] * 5, [1, 4, 2]])
def test_probabilities_are_as_large_as_the_accuracy(shots):
    surer = []
    for seed in range(10):
        support, labels, query, truth = clusters(shots, noise=1.2, seed=seed)
        learned = Auto(torch.nn.Identity()).learn(support, labels, len(shots))
        assert learned.held_out is not None
        best = learned(query).softmax(1).max(1)
        surer.append(float(best.values.mean() - (best.indices == truth).double().mean()))
    assert abs(np.mean(surer)) < 0.15


def test_more_examples_make_no_class_more_likely():
    shares = []
    for seed in range(20):
        support, labels, query, _ = clusters([10, 1, 1], noise=1.6, seed=seed)
        answers = Auto(torch.nn.Identity()).learn(support, labels, 3)(query)
        shares.append((answers.argmax(1) == 0).double().mean().item())
    assert 0.25 < np.mean(shares) < 0.55  # a third of the queries are of that class; without rebalancing, it is 0.83


def test_another_classifier_is_taken_if_it_is_clearly_better(monkeypatch):
    support, labels, _, _ = clusters([6] * 4, noise=1.0)
    monkeypatch.setitem(auto.PENALTIES, DEFAULT, 1e-12)  # learns nothing
    monkeypatch.setitem(auto.PENALTIES, CENTRED, 1e-12)
    learned = Auto(torch.nn.Identity()).learn(support, labels, 4)
    assert learned.name == MEANS and "two standard errors" in learned.why


def test_feature_maps_are_refused():
    with pytest.raises(FewShotError, match=r"one vector per image, but the encoder's embeddings are \[2, 2\]"):
        Auto(torch.nn.Identity()).learn(torch.zeros(2, 2, 2), torch.tensor([0, 1]), 2)
