import math

import pytest
import torch
from torch import nn

from fewshot.data.episodes import EmbeddedEpisode, Episode
from fewshot.distances import ScaledCosine, cosine, l2
from fewshot.errors import FewShotError
from fewshot.methods.matching import FullContextMatchingNetwork, MatchingNetwork, sum_by_class


class Linear(nn.Linear):
    features = 4


def episode(shots=(2, 1, 3), queries=6, dtype=torch.float64):
    torch.manual_seed(0)
    labels = torch.cat([torch.full((shot,), label) for label, shot in enumerate(shots)])
    return Episode(
        torch.randn(len(labels), 5, dtype=dtype),
        labels,
        torch.randn(queries, 5, dtype=dtype),
        torch.randint(0, len(shots), (queries,)),
        len(shots),
    )


def plain(distance=l2):
    torch.manual_seed(1)
    return MatchingNetwork(Linear(5, 4), distance).double()


def full_context(steps=2, distance=l2):
    torch.manual_seed(1)
    return FullContextMatchingNetwork(Linear(5, 4), distance, unrolling_steps=steps).double()


def shuffled(task: Episode) -> Episode:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    return task._replace(support=task.support[order], support_labels=task.support_labels[order])


@pytest.mark.parametrize("distance", [l2, cosine, ScaledCosine(7.0, learn=False).double()])
def test_probabilities_are_the_attention_weighted_sum_of_labels(distance):
    task, method = episode(), plain(distance)
    support, query = method.encoder(task.support), method.encoder(task.query)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for row, q in zip(expected, query, strict=True):
        kernel = [math.exp(-distance(q[None], s[None]).item()) for s in support]
        for weight, label in zip(kernel, task.support_labels, strict=True):
            row[label] += weight / sum(kernel)
    torch.testing.assert_close(method(task).exp(), expected)


def test_the_order_of_the_support_matters_only_with_full_context():
    task = episode()
    torch.testing.assert_close(plain()(task), plain()(shuffled(task)))
    method = full_context()
    assert (method(task) - method(shuffled(task))).abs().max() > 1e-6


def test_loss_and_gradient_stay_finite_when_the_probability_underflows():
    attention = torch.tensor([[0.0, -2000.0, -3000.0]], requires_grad=True)
    logits = sum_by_class(attention, torch.tensor([0, 1, 1]), 2)
    assert logits.exp()[0, 1] == 0
    loss = nn.functional.cross_entropy(logits, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(2000)
    assert attention.grad is not None
    torch.testing.assert_close(attention.grad, torch.tensor([[1.0, -1.0, 0.0]]))


def sigmoid_cell(cell: nn.LSTMCell, x, hidden, memory):
    """Compute an LSTM step from its equations."""
    gates = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ hidden + cell.bias_hh
    into, forget, new, out = gates.chunk(4)
    memory = forget.sigmoid() * memory + into.sigmoid() * new.tanh()
    return out.sigmoid() * memory.tanh(), memory


@pytest.mark.parametrize("steps", [1, 3])
def test_full_context_embeddings_follow_the_equations(steps):
    task, method = episode(), full_context(steps)
    support = method.embed_support(method.encoder(task.support))
    query = method.embed_query(method.encoder(task.query), support)
    lstm, plain_support = method.support_lstm, method.encoder(task.support)
    expected = plain_support.clone()
    for direction, order in (("", range(6)), ("_reverse", range(5, -1, -1))):
        cell = nn.LSTMCell(4, 4).double()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).data = getattr(lstm, f"{name}_l0{direction}").data
        hidden = memory = torch.zeros(4, dtype=torch.float64)
        for position in order:
            hidden, memory = sigmoid_cell(cell, plain_support[position], hidden, memory)
            expected[position] += hidden
    torch.testing.assert_close(support, expected)
    for number, start in enumerate(method.encoder(task.query)):
        hidden = memory = torch.zeros(4, dtype=torch.float64)
        for _ in range(steps):
            readout = (support @ hidden).softmax(0) @ support
            hidden, memory = sigmoid_cell(method.query_lstm, torch.cat([start, readout]), hidden, memory)
            hidden = hidden + start
        torch.testing.assert_close(query[number], hidden)


def test_tasks_solved_together_are_solved_as_each_alone():
    torch.manual_seed(2)
    together = EmbeddedEpisode(
        torch.randn(2, 6, 4, dtype=torch.float64),
        torch.tensor([[0, 1, 2, 0, 1, 2], [2, 2, 1, 1, 0, 0]]),
        torch.randn(2, 5, 4, dtype=torch.float64),
        torch.zeros(2, 5, dtype=torch.long),
        3,
    )
    for method in (plain(), full_context()):
        each = torch.stack([method.compare(task) for task in together.tasks()])
        torch.testing.assert_close(method.compare_tasks(together), each)


def test_queries_are_classified_independently():
    task = episode()
    for method in (plain(), full_context()):
        torch.testing.assert_close(method(task)[2:3], method(task._replace(query=task.query[2:3])))


@pytest.mark.parametrize("make", [plain, full_context])
def test_a_classifier_does_not_favour_classes_with_more_samples(make):
    task, method = episode(shots=(2, 1, 3)), make()
    logits = method.classifier(task.support, task.support_labels, 3)(task.query)
    torch.testing.assert_close(logits, method(task) - torch.tensor([2, 1, 3], dtype=torch.float64).log())
    if make is plain:
        # Repeating the samples of one class shifts the sum of equation 1 towards it, but not the mean.
        again = torch.cat([task.support, task.support[:2]]), torch.cat([task.support_labels, task.support_labels[:2]])
        probabilities = method.classifier(*again, 3)(task.query).softmax(1)
        torch.testing.assert_close(probabilities, logits.softmax(1))
    even = episode(shots=(2, 2, 2))
    same = method.classifier(even.support, even.support_labels, 3)(even.query).softmax(1)
    torch.testing.assert_close(same, method(even).softmax(1))


def test_zero_unrolling_steps_are_rejected():
    with pytest.raises(FewShotError, match=r"method\.unrolling_steps=0 .* method=matching"):
        full_context(0)
