import re

import pytest
import torch
from torch import nn

from fewshot.data.episodes import Episode
from fewshot.distances import cosine, l2
from fewshot.errors import FewShotError
from fewshot.methods.protonet import PrototypicalNetwork, prototypes


def method(distance=l2):
    return PrototypicalNetwork(nn.Flatten(), distance)


def test_prototypes_are_class_means_for_any_order_and_shots():
    support = torch.tensor([[2.0, 0.0], [5.0, 5.0], [4.0, 2.0], [0.0, 4.0]])
    labels = torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(prototypes(support, labels, 2), torch.tensor([[5.0, 5.0], [2.0, 2.0]]))


@pytest.mark.parametrize(("distance", "expected"), [(l2, [[-20.0, -13.0]]), (cosine, [[-0.4, -0.01005]])])
def test_logits_are_negative_distances_to_the_prototypes(distance, expected):
    support = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    episode = Episode(support, torch.tensor([0, 0, 1, 1]), torch.tensor([[3.0, 4.0]]), torch.tensor([0]), 2)
    torch.testing.assert_close(method(distance)(episode), torch.tensor(expected), atol=1e-4, rtol=0)


def test_query_labels_are_never_used():
    torch.manual_seed(0)
    labels = torch.arange(5)
    episode = Episode(torch.randn(5, 3), labels, torch.randn(10, 3), torch.randint(0, 5, (10,)), 5)
    shuffled = episode._replace(query_labels=torch.randint(0, 5, (10,)))
    assert torch.equal(method()(episode), method()(shuffled))


def test_a_classifier_matches_an_episode():
    torch.manual_seed(0)
    labels = torch.tensor([1, 0, 1, 1])
    episode = Episode(torch.randn(4, 1, 2, 2), labels, torch.randn(5, 1, 2, 2), torch.zeros(5, dtype=torch.int64), 2)
    torch.testing.assert_close(method().classifier(episode.support, labels, 2)(episode.query), method()(episode))


@pytest.mark.parametrize(
    ("compare", "returned"),
    [
        (lambda self, e: -self.distance(e.query, e.support), "float32 [6, 9]"),
        (lambda self, e: -self.distance(e.query, e.support)[:, :2], "float32 [6, 2]"),
        (lambda self, e: self.distance(e.support[:3], e.query), "float32 [3, 6]"),
        (lambda self, e: self.distance(e.query, e.support[:3]).long(), "int64 [6, 3]"),
    ],
)
def test_a_method_of_ones_own_that_returns_something_else_is_named(compare, returned):
    made = type("Own", (PrototypicalNetwork,), {"compare": compare})(nn.Flatten())
    labels = torch.arange(3)
    episode = Episode(torch.rand(9, 1, 2, 2), labels.repeat(3), torch.rand(6, 1, 2, 2), labels.repeat(2), 3)
    message = rf"Own returned {re.escape(returned)} for an episode; .* floating point \[queries, way\], here \[6, 3\]"
    with pytest.raises(FewShotError, match=message):
        made.answer(episode)


def test_an_encoder_that_returns_maps_is_named():
    made = PrototypicalNetwork(nn.Conv2d(1, 4, 3))
    with pytest.raises(FewShotError, match=r"the encoder Conv2d returned \[2, 4, 3, 3\], .* end it with nn\.Flatten"):
        made.represent(torch.rand(2, 1, 5, 5))
