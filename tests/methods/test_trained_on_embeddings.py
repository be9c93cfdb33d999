"""Methods that train more than an encoder, or through a solver: R2D2, relation networks, FEAT, Meta-Baseline."""

import math

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from fewshot.config import compose
from fewshot.data.episodes import EmbeddedEpisode, Episode
from fewshot.distances import ScaledCosine, l2
from fewshot.encoders.conv4 import Conv4
from fewshot.encoders.pretrained import Pretrained
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.methods.feat import FEAT
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.methods.r2d2 import R2D2
from fewshot.methods.relation import RelationNetwork
from fewshot.training import make_method

FEATURES = 6
NAMES = ("r2d2", "metaoptnet_ridge", "relation", "feat", "meta_baseline")


class Vectors(nn.Flatten):
    features = FEATURES


def episode(shots=(2, 2, 2), query: int = 4, seed: int = 0) -> EmbeddedEpisode:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots))
    answers = torch.arange(len(shots)).repeat_interleave(query)
    support, queries = (torch.randn(len(some), FEATURES, generator=generator) for some in (labels, answers))
    return EmbeddedEpisode(support, labels, queries, answers, len(shots))


@pytest.mark.parametrize("name", NAMES)
class TestAll:
    @pytest.fixture
    def made(self, name):
        torch.manual_seed(0)
        method = make_method(compose(f"method={name}", "encoder.filters=4"))
        method.train()
        for seed in range(3):  # batch norm learns its statistics
            method(images(seed))
        return method.eval()

    def test_renumbered_classes_and_shuffled_samples_change_nothing_else(self, made):
        task, new = images(7), torch.tensor([2, 0, 1])
        order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
        other = task._replace(support=task.support[order], support_labels=new[task.support_labels][order])
        expected = made(task)
        assert expected.shape == (12, 3) and expected.isfinite().all() and expected.std() > 0
        assert torch.allclose(made(other)[:, new], expected, atol=1e-4)

    def test_a_query_is_classified_the_same_way_alone(self, made):
        task = images(7)
        alone = made(task._replace(query=task.query[:1], query_labels=task.query_labels[:1]))
        assert torch.allclose(alone, made(task)[:1], atol=1e-4)

    def test_every_weight_learns(self, made):
        task = images(7)
        made.train()
        loss = made.loss(made(task), task.query_labels)
        loss.backward()
        still = {name for name, weight in made.named_parameters() if weight.requires_grad and weight.grad is None}
        assert not still and loss.isfinite()

    def test_classes_may_differ_in_shot_and_their_samples_may_be_repeated(self, made):
        task = images(7)
        repeated = torch.tensor([0, 0, 1, 1, 2, 3, 4, 5])  # both samples of one class twice
        more = task._replace(support=task.support[repeated], support_labels=task.support_labels[repeated])
        logits = made.classifier(task.support, task.support_labels, 3)(task.query)
        if hasattr(made, "log_penalty"):  # the penalty is weighed against the number of samples
            with torch.no_grad():
                made.log_penalty += math.log(8 / 6)
        again = made.classifier(more.support, more.support_labels, 3)(task.query)
        assert torch.allclose(again, logits, atol=0.02)

    def test_it_needs_training(self, name, cache_dir, tmp_path):
        config = compose("encoder=pretrained", "encoder.weights=null", f"method={name}", f"cache_dir={cache_dir}",
                         f"out={tmp_path / 'out'}", name="evaluate")  # fmt: skip
        if name != "meta_baseline":  # whose factor alone is trained
            with pytest.raises(FewShotError, match="train"):
                evaluate(config)


def images(seed: int) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    labels, answers = torch.arange(3).repeat_interleave(2), torch.arange(3).repeat_interleave(4)
    support, query = (torch.rand(len(some), 1, 28, 28, generator=generator) for some in (labels, answers))
    return Episode(support, labels, query, answers, 3)


@pytest.mark.parametrize("shots", [(2, 2, 2), (1, 4, 2)])
def test_r2d2_is_the_ridge_regression_of_scikit_learn(shots):
    task = episode(shots)
    support, query = (torch.cat([part, torch.ones(len(part), 1)], 1).double() for part in (task.support, task.query))
    labels = one_hot(task.support_labels, 3).double()
    weights = (labels * (len(labels) / 3 / labels.sum(0))).sum(1)
    ridge = Ridge(alpha=0.7, fit_intercept=False).fit(support, labels, sample_weight=weights)
    method = R2D2(Vectors(), penalty=0.7, scale=3.0)
    nn.init.constant_(method.shift, -1.0)
    assert np.allclose(method.compare(task).detach().numpy(), 3 * ridge.predict(query) - 1, atol=1e-4)


def test_the_penalty_is_learned_only_if_it_should_be():
    for name, learned in (("r2d2", True), ("metaoptnet_ridge", False)):
        method = make_method(compose(f"method={name}", "encoder.filters=4"))
        assert method.log_penalty.requires_grad == learned
        assert method.log_penalty.exp().item() == pytest.approx({"r2d2": 1, "metaoptnet_ridge": 50}[name], rel=1e-5)


def test_labels_are_smoothed():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    target = 0.9 * one_hot(labels, 3) + 0.1 / 3
    by_hand = -(target * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(R2D2(Vectors(), label_smoothing=0.1).loss(logits, labels), by_hand)


class TestRelation:
    def test_scores_compare_the_mean_maps_of_a_class_with_those_of_a_query(self):
        torch.manual_seed(0)
        method = RelationNetwork(Conv4(1, 32, filters=2), filters=3, hidden=2).eval()
        maps = torch.randn(9, 2, 2, 2)
        labels = torch.tensor([0, 1, 1, 0, 0])
        task = EmbeddedEpisode(maps[:5], labels, maps[5:], torch.zeros(4, dtype=torch.int64), 2)
        for query in range(4):
            for label in range(2):
                pair = torch.cat([maps[:5][labels == label].mean(0), maps[5 + query]])
                score = method.relation(pair[None])[0, 0]
                assert torch.allclose(method.compare(task)[query, label], score, atol=1e-5)

    def test_the_loss_is_the_squared_error_of_the_scores(self):
        logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
        by_hand = sum((1 / (1 + math.exp(-logits[row, label])) - (labels[row] == label).item()) ** 2
                      for row in range(4) for label in range(3)) / 12  # fmt: skip
        assert RelationNetwork(Conv4(1, 16)).loss(logits, labels).item() == pytest.approx(by_hand, rel=1e-4)
        chosen = RelationNetwork(Conv4(1, 16), objective="cross_entropy")
        assert torch.equal(chosen.loss(logits, labels), cross_entropy(logits, labels))

    def test_other_encoders_say_how_many_maps_they_have(self):
        encoder = Pretrained("resnet18", weights=None, file=None)
        before = [buffer.clone() for buffer in encoder.buffers()]
        assert encoder.maps == 512
        assert all(map(torch.equal, encoder.buffers(), before))
        with pytest.raises(FewShotError, match=r"the encoder Flatten has no attribute maps; choose encoder=conv4"):
            RelationNetwork(nn.Flatten())


class TestFeat:
    def test_without_attention_prototypes_are_normalised_means(self):
        method = FEAT(Vectors(), l2).eval()
        nn.init.zeros_(method.attention.out_proj.weight)
        task = episode()
        means = torch.stack([task.support[task.support_labels == label].mean(0) for label in range(3)])
        centres = (means - means.mean(1, keepdim=True)) / means.std(1, correction=0, keepdim=True)
        assert torch.allclose(method.compare(task), -torch.cdist(task.query, centres).square(), atol=1e-3)

    def test_adaptation_is_softmax_attention_over_the_set(self):
        torch.manual_seed(0)
        method, sets = FEAT(Vectors(), l2).eval(), torch.randn(2, 5, FEATURES)
        query, key, value = (sets @ weight.T for weight in method.attention.in_proj_weight.chunk(3))
        context = (query @ key.mT / FEATURES**0.5).softmax(-1) @ value @ method.attention.out_proj.weight.T
        assert torch.allclose(method.adapt(sets), method.norm(sets + context), atol=1e-5)

    def test_the_contrast_compares_each_image_with_the_centre_of_its_adapted_class(self):
        torch.manual_seed(0)
        method, task = FEAT(Vectors(), l2).eval(), episode()
        every, labels = torch.cat([task.support, task.query]), torch.cat([task.support_labels, task.query_labels])
        centres = torch.stack([method.adapt(every[labels == label][None])[0].mean(0) for label in range(3)])
        expected = cross_entropy(-torch.cdist(every, centres).square(), labels)
        assert torch.allclose(method.contrast(task), expected, atol=1e-4)


def test_meta_baseline_is_a_prototypical_network_with_a_learned_factor():
    method = make_method(compose("method=meta_baseline", "encoder.filters=4"))
    assert type(method) is PrototypicalNetwork and isinstance(method.distance, ScaledCosine)
    assert method.distance.log_scale.requires_grad and method.distance.log_scale.exp().item() == pytest.approx(10)


@pytest.mark.parametrize(("pool", "features"), [("none", 16), ("max", 4), ("mean", 4)])
def test_conv4_pools_its_last_maps(pool, features):
    torch.manual_seed(0)
    encoder, pictures = Conv4(1, 32, filters=4, pool=pool).eval(), torch.rand(3, 1, 32, 32)
    maps = encoder.feature_maps(pictures)
    expected = {"none": maps.flatten(1), "max": maps.amax((2, 3)), "mean": maps.mean((2, 3))}[pool]
    assert encoder.features == features and encoder.maps == 4
    assert torch.allclose(encoder(pictures), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("r2d2", {"penalty": 0.0}, "method.penalty=0.0 must be a number above 0"),
        ("r2d2", {"scale": -1.0}, "method.scale=-1.0 must be a number above 0"),
        (
            "metaoptnet_ridge",
            {"label_smoothing": 1.0},
            "label_smoothing=1.0 must be a number of at least 0",
        ),
        ("relation", {"filters": 0}, "method.filters=0 must be a whole number of at least 1"),
        ("relation", {"objective": "hinge"}, "method.objective=hinge must be mse or cross_entropy"),
        ("feat", {"balance": -1.0}, "method.balance=-1.0 must be a number of at least 0"),
        ("feat", {"dropout": 1.0}, "method.dropout=1.0 must be a number of at least 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    node = OmegaConf.to_container(compose(f"method={name}").method, resolve=False)
    own = {key: value for key, value in node.items() if key not in ("encoder", "distance")}
    with pytest.raises(Exception, match=message) as caught:
        instantiate({**own, **settings, "_partial_": True})(
            encoder=Conv4(1, 16), **({"distance": l2} if name == "feat" else {})
        )
    assert isinstance(caught.value, FewShotError) or isinstance(caught.value.__cause__, FewShotError)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(FewShotError, match=r"encoder\.pool=sum must be none, max or mean"):
        Conv4(1, 28, pool="sum")
