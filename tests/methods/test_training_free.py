"""Classifiers that need no training: what each computes, and what they have in common."""

import json
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from torch.nn.functional import one_hot

from fewshot.config import ROOT, compose
from fewshot.data.episodes import EmbeddedEpisode, EpisodeNumber, draw_query_counts
from fewshot.demo import page_of
from fewshot.distances import cosine, l2
from fewshot.embeddings import LabelledEmbeddings
from fewshot.errors import FewShotError
from fewshot.estimator import FewShotClassifier
from fewshot.evaluation import _check_imbalance, evaluate
from fewshot.methods.feat import FEAT
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.methods.pt_map import sinkhorn
from fewshot.methods.training_free import descend, in_span
from fewshot.prediction import predict
from fewshot.predictor import make_predictor
from fewshot.training import make_data, train

INDUCTIVE = (
    "simpleshot",
    "nearest_neighbour",
    "logistic_regression",
    "ridge_regression",
    "finetune",
    "finetune_cosine",
)
TRANSDUCTIVE = ("transductive_finetune", "soft_kmeans", "bd_cspn", "laplacian_shot", "pt_map", "tim", "alpha_tim")
WAY, FEATURES = 4, 12


class Vectors(torch.nn.Identity):
    features = FEATURES


def method(name: str, **settings):
    """A method on embeddings that are given directly."""
    node: Any = OmegaConf.to_container(compose(f"method={name}").method, resolve=False)
    encoder = torch.nn.Identity()
    own = {key: value for key, value in node.items() if key != "encoder"}
    made = instantiate({**own, **settings, "_partial_": True})(encoder=encoder).eval()
    made.before_evaluation(lambda _: LabelledEmbeddings(training_embeddings(), torch.zeros(50, dtype=torch.int64)))
    return made


def training_embeddings() -> torch.Tensor:
    return torch.rand(50, FEATURES, generator=torch.Generator().manual_seed(9))


def episodes(tasks: int = 3, shots=(2, 2, 2, 2), query: int = 5, noise: float = 0.3, seed: int = 0) -> EmbeddedEpisode:
    """Clusters of non-negative embeddings, one centre per class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(tasks, len(shots), FEATURES, generator=generator)
    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots))
    query_labels = torch.arange(len(shots)).repeat_interleave(query)

    def near(kinds):
        return (centres[:, kinds] + noise * torch.rand(tasks, len(kinds), FEATURES, generator=generator)).relu()

    return EmbeddedEpisode(
        near(labels), labels.expand(tasks, -1), near(query_labels), query_labels.expand(tasks, -1), len(shots)
    )


@pytest.mark.parametrize("name", [*INDUCTIVE, *TRANSDUCTIVE])
class TestAll:
    def test_clear_clusters_are_separated(self, name):
        task = episodes(noise=0.05)
        logits = method(name).compare_tasks(task)
        assert logits.shape == (3, 20, WAY) and logits.isfinite().all() and not logits.requires_grad
        assert torch.equal(logits.argmax(-1), task.query_labels)

    def test_an_episode_is_solved_the_same_way_alone_and_with_others(self, name):
        made, task = method(name), episodes(tasks=20)
        task = task._replace(support=task.support.double(), query=task.query.double())
        together = made.compare_tasks(task)
        alone = torch.stack([made.compare(episode) for episode in task.tasks()])
        torch.testing.assert_close(together, alone, rtol=1e-7, atol=1e-7)

    def test_renumbered_classes_and_shuffled_samples_change_nothing_else(self, name):
        made, task = method(name), episodes()
        new = torch.tensor([2, 0, 3, 1])
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        renumbered = task._replace(support=task.support[:, order], support_labels=new[task.support_labels][:, order])
        expected = made.compare_tasks(task).softmax(-1)
        assert torch.allclose(made.compare_tasks(renumbered).softmax(-1)[..., new], expected, atol=1e-3)

    def test_classes_may_differ_in_shot_and_there_may_be_two(self, name):
        made = method(name)
        assert made.compare_tasks(episodes(shots=(1, 3, 2, 5))).isfinite().all()
        task = episodes(shots=(1, 4), noise=0.05)
        assert torch.equal(made.compare_tasks(task).argmax(-1), task.query_labels)

    def test_only_transductive_methods_look_at_other_queries(self, name):
        made, task = method(name), episodes(noise=0.8)
        fewer = task._replace(query=task.query[:, :7], query_labels=task.query_labels[:, :7])
        alike = torch.allclose(made.compare_tasks(fewer), made.compare_tasks(task)[:, :7], atol=1e-4)
        assert alike != made.transductive and made.transductive == (name in TRANSDUCTIVE)

    def test_feature_maps_are_refused(self, name):
        task = episodes()
        maps = task._replace(support=task.support[..., None, None], query=task.query[..., None, None])
        with pytest.raises(FewShotError, match=r"takes one vector per image, but the encoder's embeddings are \[12, 1"):
            method(name).compare_tasks(maps)

    def test_there_is_nothing_to_train(self, name, cache_dir, tmp_path):
        with pytest.raises(FewShotError, match=rf"method={name} has nothing to train: use it on the encoder of a run"):
            train(compose(f"method={name}", f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}"))


def by_hand(task: EmbeddedEpisode):
    """The first episode, in float64: support, one-hot labels, queries."""
    support, query = task.support[0].double(), task.query[0].double()
    return support, one_hot(task.support_labels[0], task.way).double(), query


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def test_simpleshot_is_the_nearest_mean_of_centred_normalised_embeddings():
    task = episodes(shots=(1, 3, 2, 2))
    support, labels, query = by_hand(task)
    mean = training_embeddings().double().mean(0)
    support, query = unit(support - mean), unit(query - mean)
    means = torch.stack([support[labels[:, label] == 1].mean(0) for label in range(WAY)])
    expected = -torch.cdist(query, means).square()
    assert torch.allclose(method("simpleshot").compare_tasks(task)[0].double(), expected, atol=1e-5)
    centre = torch.stack([by_hand(task)[0][labels[:, label] == 1].mean(0) for label in range(WAY)]).mean(0)
    support, query = unit(by_hand(task)[0] - centre), unit(by_hand(task)[2] - centre)
    means = torch.stack([support[labels[:, label] == 1].mean(0) for label in range(WAY)])
    found = method("simpleshot", centre="support").compare_tasks(task)[0].double()
    assert torch.allclose(found, -torch.cdist(query, means).square(), atol=1e-5)


def test_the_nearest_neighbour_is_the_nearest_sample():
    task = episodes(shots=(1, 3, 2, 2), noise=1.0)
    support, labels, query = by_hand(task)
    distances = torch.cdist(unit(query), unit(support)).square()
    expected = torch.stack([-distances[:, labels[:, label] == 1].amin(1) for label in range(WAY)], dim=1)
    assert torch.allclose(method("nearest_neighbour").compare_tasks(task)[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("shots", [(1, 3, 2, 2), (2, 5)])
def test_logistic_regression_is_that_of_scikit_learn_on_all_features(shots):
    task = episodes(shots=shots, noise=1.0)
    support, labels, query = by_hand(task)
    model = LogisticRegression(C=3.0, class_weight="balanced", max_iter=10_000, tol=1e-8)
    expected = model.fit(unit(support), labels.argmax(1)).predict_proba(unit(query))
    found = method("logistic_regression", inverse_penalty=3.0).compare_tasks(task)[0].softmax(-1)
    assert np.allclose(found.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(("factor", "penalty"), [(1e-3, 1e4), (30.0, 1.0)])
def test_logistic_regression_finds_the_optimum_of_embeddings_of_any_size(factor, penalty):
    task = episodes(shots=(3, 3, 3, 3), noise=1.0)
    task = task._replace(support=factor * task.support, query=factor * task.query)
    support, labels, query = by_hand(task)
    model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=100_000, tol=1e-10)
    expected = model.fit(support, labels.argmax(1)).predict_proba(query)
    found = method("logistic_regression", features="none", inverse_penalty=penalty).compare_tasks(task)[0].softmax(-1)
    assert np.allclose(found.numpy(), expected, atol=5e-3)


def test_logistic_regression_says_once_if_it_stopped_before_its_optimum(capsys):
    made = method("logistic_regression", inverse_penalty=1e30)
    for _ in range(2):
        made.compare_tasks(episodes(shots=(3, 3, 3, 3), noise=1.0))
    assert capsys.readouterr().err.count("before its optimum: lower method.inverse_penalty=1e+30") == 1


def test_a_distance_that_a_method_does_not_use_is_mentioned(tmp_path, cache_dir, capsys):
    named = ["encoder=conv4", "distance=cosine"]
    with pytest.raises(FewShotError):  # an untrained encoder
        evaluate(compose("method=simpleshot", *named, f"cache_dir={cache_dir}", f"out={tmp_path}", name="evaluate"))
    assert "warning: distance=cosine is not used: method=simpleshot has no distance" in capsys.readouterr().err


def test_ridge_regression_is_that_of_scikit_learn():
    task = episodes(shots=(1, 3, 2, 2), noise=1.0)
    support, labels, query = by_hand(task)
    weights = (labels * (len(labels) / WAY / labels.sum(0))).sum(1)
    model = Ridge(alpha=0.5).fit(unit(support), labels, sample_weight=weights)
    found = method("ridge_regression", penalty=0.5).compare_tasks(task)[0]
    assert np.allclose(found.numpy(), model.predict(unit(query)), atol=1e-4)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_fine_tuning_lowers_the_loss_of_the_support(head):
    made = method("finetune", head=head, learning_rate=0.05)
    task = episodes(noise=1.0)
    support, labels = unit(task.support), one_hot(task.support_labels, WAY).float()
    start, inputs = made.initial_layer(support, labels), made.inputs(support)

    def loss(weights):
        return made.loss_of_layer(weights, inputs, labels, inputs)

    trained = descend(start, loss, 100, 0.05)
    assert (loss(trained) < 0.5 * loss(start)).all()
    # The layer is that of the paper: W f(x) + b, or cosines, which have no bias.
    weight, bias = trained[..., :-1], trained[..., -1]
    if head == "cosine":
        assert (bias == 0).all()
        expected = 10.0 * unit(support) @ unit(weight).mT
    else:
        assert (bias != 0).any()
        expected = 10.0 * (support @ weight.mT + bias[:, None])
    assert torch.allclose(made.logits(inputs, trained), expected, atol=1e-4)


@pytest.mark.parametrize("features", [3, 500])
def test_coordinates_in_the_span_keep_the_distances(features):
    made = torch.rand(2, 10, features, generator=torch.Generator().manual_seed(0)) - 0.5
    made[1, 4] = made[1, 0]  # an image twice
    support, query = in_span(made[:, :4], made[:, 4:])
    assert support.shape == (2, 4, min(features, 10)) and query.shape == (2, 6, min(features, 10))
    expected = torch.cdist(made[:, 4:], made[:, :4]).square()
    assert torch.allclose(torch.cdist(query, support).square(), expected, atol=1e-4 * features)


@pytest.mark.parametrize("name", [*INDUCTIVE, *TRANSDUCTIVE])
def test_more_features_than_images_change_no_answer(name):
    """Zeros as further features, as some methods count on few images."""
    task, made = episodes(noise=0.8), method(name)
    more = task.apply(lambda tensor: torch.nn.functional.pad(tensor, (0, 40)) if tensor.is_floating_point() else tensor)
    wide = method(name)
    if wide._train_mean is not None:
        wide._train_mean = torch.nn.functional.pad(wide._train_mean, (0, 40))
    assert torch.allclose(wide.compare_tasks(more).softmax(-1), made.compare_tasks(task).softmax(-1), atol=1e-2)


def test_soft_k_means_moves_prototypes_by_equation_3():
    task = episodes(noise=1.0)
    support, labels, query = by_hand(task)
    support, query = unit(support), unit(query)
    centres = labels.T @ support / labels.sum(0)[:, None]
    share = (-5.0 * torch.cdist(query, centres).square()).softmax(1)
    centres = (labels.T @ support + share.T @ query) / (labels.sum(0) + share.sum(0))[:, None]
    expected = -5.0 * torch.cdist(query, centres).square()
    found = method("soft_kmeans", scale=5.0).compare_tasks(task)[0].double()
    assert torch.allclose(found, expected, atol=1e-4)


def rectified(support, labels, query, scale):
    query = query + support.mean(0) - query.mean(0)
    means = labels.T @ support / labels.sum(0)[:, None]
    every = torch.cat([support, query])
    cosine = unit(every) @ unit(means).T
    members = torch.cat([labels, one_hot(cosine[len(support) :].argmax(1), WAY).double()])
    weights = members * (scale * cosine).exp()
    return (weights / weights.sum(0)).T @ every, query


def test_bd_cspn_weighs_the_samples_of_each_class_by_their_cosine():
    task = episodes(noise=1.0)
    centres, query = rectified(*by_hand(task), 10.0)
    found = method("bd_cspn").compare_tasks(task)[0].double()
    assert torch.allclose(found, 10 * unit(query) @ unit(centres).T, atol=1e-4)


def test_laplacian_shot_repeats_its_bound_update():
    task = episodes(noise=1.0)
    support, labels, query = by_hand(task)
    centres, query = rectified(unit(support), labels, unit(query), 10.0)
    cost = torch.cdist(query, centres).square()
    between = torch.cdist(query, query)
    affinity = torch.zeros_like(between)
    for row in range(len(query)):
        for column in between[row].argsort()[1:4].tolist():
            affinity[row, column] = 1
    answers = (-cost).softmax(1)
    for _ in range(4):
        answers = (-cost + 0.7 * affinity @ answers).softmax(1)
    found = method("laplacian_shot", features="l2n", neighbours=3, steps=4).compare_tasks(task)[0].double()
    assert torch.allclose(found.softmax(1), answers, atol=1e-4)


def test_optimal_transport_gives_each_class_the_same():
    cost = torch.rand(3, 20, 4, generator=torch.Generator().manual_seed(0))
    log_plan, classes = sinkhorn(cost, 10.0)
    assert torch.allclose(log_plan.exp().sum(2), torch.ones(3, 20), atol=1e-5)
    assert torch.allclose(log_plan.exp().sum(1), torch.full((3, 4), 5.0), atol=1e-2)
    # Started from its own solution it stays there.
    again, _ = sinkhorn(cost, 10.0, classes)
    assert torch.allclose(again, log_plan, atol=1e-3)


def test_alternating_directions_raise_the_mutual_information_of_tim():
    task, made = episodes(noise=1.0), method("tim")
    support, query = unit(task.support).double(), unit(task.query).double()
    labels = one_hot(task.support_labels, WAY).double()
    centres = labels.mT @ support / labels.sum(1)[..., None]

    def loss(centres):
        return made.loss_of_prototypes(made.logits(support, centres), labels, made.logits(query, centres))

    before = loss(centres)
    start = centres.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(start).sum(), start)
    step = made.alternate(support, labels, query, centres) - centres
    assert ((gradient * step).sum((1, 2)) < 0).all()  # a step goes downhill
    for _ in range(50):
        centres = made.alternate(support, labels, query, centres)
    assert (loss(centres) < before).all()


def test_both_solvers_of_tim_agree_on_clear_answers():
    task = episodes(noise=0.3)
    answers = [
        method("tim", **settings).compare_tasks(task).argmax(-1)
        for settings in ({}, {"solver": "gradient", "steps": 200, "learning_rate": 0.01})
    ]
    assert (answers[0] == answers[1]).float().mean() > 0.9


def test_tsallis_entropy_approaches_shannons_at_order_1():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]], dtype=torch.float64)
    near = method("alpha_tim", alpha=1.0001)._tsallis(probabilities)
    assert torch.allclose(near, torch.special.entr(probabilities).sum(-1), atol=1e-3)
    assert torch.allclose(method("alpha_tim", alpha=2.0)._tsallis(probabilities), torch.tensor([0.46, 0.0]).double())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tim", {"temperature": -1.0}, "method.temperature=-1.0 must be a number above 0"),
        ("tim", {"solver": "newton"}, "method.solver=newton must be adm or gradient"),
        ("tim", {"temperature": 0.0}, "method.temperature=0.0 must be a number above 0"),
        ("tim", {"temperature": float("inf")}, "method.temperature=inf must be a number above 0"),
        ("tim", {"temperature": "warm"}, "method.temperature=warm must be a number above 0"),
        ("tim", {"steps": 0}, "method.steps=0 must be a whole number of at least 1"),
        ("tim", {"steps": 2.5}, "method.steps=2.5 must be a whole number of at least 1"),
        ("alpha_tim", {"alpha": float("nan")}, "method.alpha=nan must be a number above 1"),
        ("alpha_tim", {"alpha": 1.0}, "method.alpha=1.0 must be a number above 1"),
        ("simpleshot", {"features": "l3n"}, "method.features=l3n must be none, l2n or cl2n"),
        ("simpleshot", {"centre": "test"}, "method.centre=test must be train or support"),
        ("logistic_regression", {"inverse_penalty": 0.0}, "method.inverse_penalty=0.0 must be a number above 0"),
        ("ridge_regression", {"penalty": -1.0}, "method.penalty=-1.0 must be a number above 0"),
        ("finetune", {"head": "round"}, "method.head=round must be linear or cosine"),
        ("finetune", {"scale": float("nan")}, "method.scale=nan must be a number above 0"),
        ("pt_map", {"inertia": 1.5}, "method.inertia=1.5 must be a number above 0 and at most 1"),
        ("laplacian_shot", {"neighbours": 0}, "method.neighbours=0 must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(name, settings, message):
    with pytest.raises(Exception, match=message) as caught:
        method(name, **settings)
    assert isinstance(caught.value, FewShotError) or isinstance(caught.value.__cause__, FewShotError)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"features": "none"}) for name in (*INDUCTIVE, *TRANSDUCTIVE) if name != "pt_map"),
        *(("tim", {"temperature": 1e4, "solver": solver}) for solver in ("adm", "gradient")),
        ("alpha_tim", {"temperature": 1e4}),
        ("pt_map", {"regularisation": 1e4}),
        ("soft_kmeans", {"scale": 1e8}),
        ("bd_cspn", {"scale": 1e8}),
        ("finetune_cosine", {"scale": 1e6}),
    ],
)
@pytest.mark.parametrize("factor", [1000.0, 0.0])
def test_large_embeddings_large_factors_and_equal_embeddings_get_finite_logits(name, settings, factor):
    task = episodes(noise=0.05)
    # No query is near to the other two classes.
    task = task._replace(support=factor * task.support, query=factor * task.query[:, :10])
    steps = {"steps": 20} if "tim" in name or "tune" in name else {}
    assert method(name, **settings, **steps).compare_tasks(task).isfinite().all()


def test_the_mean_of_training_classes_is_not_made_up():
    made = method("simpleshot")
    made._train_mean = None
    with pytest.raises(FewShotError, match=r"needs the mean of the training classes.*method\.centre=support"):
        made.compare_tasks(episodes())

    def no_such_split(split):
        raise FewShotError(f"the data set has no {split} classes")

    with pytest.raises(FewShotError, match=r"needs the mean of the training classes.*method\.centre=support"):
        made.before_evaluation(no_such_split)


def test_what_lacks_the_mean_of_training_classes_is_refused_before_any_image_is_read(run):
    choice = [f"checkpoint={run('protonet')}", "method=simpleshot"]
    message = r"needs the mean of the training classes.*method\.centre=support"
    for command in ("predict", "teach"):
        with pytest.raises(FewShotError, match=message):
            make_predictor(compose(*choice, name=command))
        assert make_predictor(compose(*choice, "method.centre=support", name=command))
    with pytest.raises(FewShotError, match=message), page_of(compose(*choice, "port=0", name="demo")):
        pass


def test_more_neighbours_than_queries_are_all_of_them():
    task = episodes()
    every = method("laplacian_shot", neighbours=19).compare_tasks(task)
    assert torch.equal(method("laplacian_shot", neighbours=1000).compare_tasks(task), every)


@pytest.mark.parametrize("name", TRANSDUCTIVE)
def test_a_single_query_gets_finite_logits(name):
    single = episodes(query=1)
    single = single._replace(query=single.query[:, :1], query_labels=single.query_labels[:, :1])
    logits = method(name).compare_tasks(single)
    assert logits.shape == (3, 1, WAY) and logits.isfinite().all()


def test_predict_says_what_a_single_query_means_to_a_transductive_method(run, tmp_path, capsys):
    random = np.random.default_rng(0)
    for name in ("support/a/0", "support/b/0", "query/0"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 30), dtype=np.uint8)).save(path)
    places = [f"{name}={tmp_path / name}" for name in ("support", "query", "out")]
    predict(compose(f"checkpoint={run('protonet')}", "method=tim", *places, name="predict"))
    shown = capsys.readouterr()
    assert "the answer to a single one can be arbitrary" in shown.err and "1 query, 2 classes" in shown.out


def test_the_estimator_warns_of_a_single_query_of_a_transductive_method():
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, FEATURES))
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    for name, alone in (("tim", True), ("soft_kmeans", True), ("nearest_neighbour", False)):
        made = method(name)
        made.encoder = encoder
        classifier = FewShotClassifier(made, size=8).fit(images[:4], list("abab"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            classifier.predict(images[:2])
            assert not caught
            classifier.predict(images[:1])
        assert [("a single one can be arbitrary" in str(one.message)) for one in caught] == [True] * alone


class TestUnbalancedQueries:
    @pytest.mark.parametrize("concentration", [0.01, 2.0, 1000.0])
    def test_counts_add_up_and_no_class_gives_more_than_it_has(self, concentration):
        most = np.array([20, 3, 0, 40, 17])
        drawn = np.array([draw_query_counts(most, 60, concentration, [seed]) for seed in range(300)])
        assert (drawn.sum(1) == 60).all() and (drawn >= 0).all() and (drawn <= most).all()

    def test_shares_are_dirichlet(self):
        drawn = np.array([draw_query_counts(np.full(5, 75), 75, 2.0, [seed]) for seed in range(3000)]) / 75
        assert np.allclose(drawn.mean(0), 0.2, atol=0.02)
        assert np.allclose(drawn.var(0), 0.2 * 0.8 / 11, atol=0.003)  # of a Dirichlet distribution with 5 times 2

    def test_the_support_is_that_of_the_balanced_episode(self, cache_dir):
        from fewshot.data.episodes import EpisodeDataset, classes_of  # noqa: PLC0415

        bank = make_data(compose(f"cache_dir={cache_dir}")).bank
        task = {"way": 5, "shot": 1, "query": 4, "seed": 0}
        balanced, drawn = EpisodeDataset(bank, "test", **task), EpisodeDataset(bank, "test", **task, concentration=0.5)
        missing = 0
        for number in range(50):
            one, other = balanced[EpisodeNumber(0, number)], drawn[EpisodeNumber(0, number)]
            assert torch.equal(one.support, other.support) and torch.equal(one.support_labels, other.support_labels)
            assert len(other.query) == len(other.query.unique()) == 20 == len(other.query_labels)
            assert not set(other.query.tolist()) & set(other.support.tolist())
            classes = classes_of(other, drawn.first)
            assert np.array_equal(classes, classes_of(one, balanced.first))
            found = np.searchsorted(drawn.first, other.query.numpy(), side="right") - 1
            assert np.array_equal(classes[other.query_labels.numpy()], found)
            missing += 5 - len(other.query_labels.unique())
        assert missing > 0  # classes without a query occur, and nothing above fails on them

    def test_too_few_images_are_refused_or_named(self, capsys):
        def checked(way, shot, query):
            task: Any = SimpleNamespace(counts=np.full(30, 20), way=way, shot=shot, query=query)
            _check_imbalance(task, 2.0)
            return capsys.readouterr().err

        with pytest.raises(FewShotError, match=r"have 20 images, so with shot=5 and query=15 each .*; lower query"):
            checked(5, 5, 15)
        assert "classes have at most 19 queries, too few in" in checked(5, 1, 15)
        assert not checked(5, 5, 5)


def test_a_run_is_evaluated_by_any_of_them(run, cache_dir, tmp_path, capsys):
    run_dir = run("protonet")

    def tested(*overrides):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        base = [f"checkpoint={run_dir}", f"cache_dir={cache_dir}", f"out={out}", "episodes=20", "hardware=cpu"]
        evaluate(compose(*base, *overrides, name="evaluate"))
        return json.loads((out / "results.json").read_text()), capsys.readouterr().out

    for name in ("simpleshot", "tim"):
        results, shown = tested(f"method={name}")
        assert results["method"] == name and results["transductive"] == (name == "tim")
        assert ("is transductive: it uses all queries of an episode together" in shown) == (name == "tim")
        assert ("assumes balanced ones" in shown) == (name == "tim")
    results, shown = tested("method=tim", "concentration=2", f"against={run_dir}")
    assert results["concentration"] == 2 and results["difference"]["episodes"] == 20
    assert "assumes as many" not in shown
    with pytest.raises(FewShotError, match="concentration=-1 must be a number above 0 or null"):
        tested("concentration=-1")


def test_the_page_refuses_transductive_methods(run):
    config = compose(f"checkpoint={run('protonet')}", "method=tim", "port=0", name="demo")
    with pytest.raises(FewShotError, match="TIM is transductive: it needs many queries together"), page_of(config):
        pass


def test_the_guide_says_which_methods_are_transductive():
    page = (ROOT / "notebooks" / "guides" / "classifiers.md").read_text()
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in page.splitlines()
        if row.startswith("| `") and "method=" not in row
    ]
    listed = {cells[0].split("`")[1]: cells[2:] for cells in rows}
    made = {name: method(name) for name in ("auto", *INDUCTIVE, *TRANSDUCTIVE)}
    yes = {True: "yes", False: "no"}
    assert listed == {name: [yes[one.transductive], yes[one.assumes_balance]] for name, one in made.items()}


@pytest.mark.parametrize("shot", [1, 5])
def test_easyfsl_gives_the_same_labels(shot, capsys):
    """For the methods that both compute alike; prints the numbers of guides/classifiers.md."""
    theirs = pytest.importorskip("easyfsl.methods", reason="easyfsl is not installed, to compare with")
    attention = pytest.importorskip("easyfsl.modules").MultiHeadAttention
    torch.manual_seed(0)
    feat, module = FEAT(Vectors(), l2).eval(), attention(1, FEATURES, FEATURES, FEATURES).eval()
    module.fc.load_state_dict(feat.attention.out_proj.state_dict())
    parts = feat.attention.in_proj_weight.data.chunk(3)
    for layer, weight in zip((module.w_qs, module.w_ks, module.w_vs), parts, strict=True):
        layer.weight.data.copy_(weight)
    same = torch.nn.Identity()
    slowly = {"learning_rate": 1e-4, "steps": 50}
    pairs = {
        "PrototypicalNetworks": (theirs.PrototypicalNetworks(same), PrototypicalNetwork(same, l2)),
        "PrototypicalNetworks, normalised": (
            theirs.PrototypicalNetworks(same, feature_normalization=2),
            method("simpleshot", features="l2n"),
        ),
        "SimpleShot": (theirs.SimpleShot(same), PrototypicalNetwork(same, cosine)),
        "BDCSPN": (theirs.BDCSPN(same), method("bd_cspn", scale=1.0)),
        # Its knn counts the query itself.
        "LaplacianShot": (theirs.LaplacianShot(same, knn=3), method("laplacian_shot", features="none", scale=1.0)),
        "FEAT": (theirs.FEAT(same, attention_module=module), feat),
    }
    differ = {  # on purpose; the guide says how
        "Finetune": (theirs.Finetune(same, fine_tuning_steps=50), method("finetune_cosine", scale=1.0, **slowly)),
        "TIM": (theirs.TIM(same), method("tim", solver="gradient", temperature=10.0, support_weight=1.0, **slowly)),
        "PTMAP": (theirs.PTMAP(same), method("pt_map", steps=10)),
        "TransductiveFinetuning": (theirs.TransductiveFinetuning(same), method("transductive_finetune")),
    }
    alike = {name: [0, 0] for name in pairs | differ}  # equal labels, queries
    for seed in range(1000):
        task = next(episodes(tasks=1, shots=(shot,) * WAY, noise=1.5, seed=seed).tasks())
        # easyfsl shifts the queries for the prototypes only; without a shift it makes no difference.
        unshifted = task._replace(query=task.query + task.support.mean(0) - task.query.mean(0))
        for name, (other, ours) in (pairs | differ if seed < 100 else pairs).items():
            given = unshifted if name in ("BDCSPN", "LaplacianShot") else task
            other.process_support_set(given.support, given.support_labels)
            with torch.no_grad():
                equal = ours.compare(given).argmax(1) == other(given.query).argmax(1)
            alike[name] = [alike[name][0] + int(equal.sum()), alike[name][1] + len(equal)]
    with capsys.disabled():
        rows = [f"{name}, {shot}-shot: {equal:,} of {queries:,}" for name, (equal, queries) in alike.items()]
        print("", *rows, sep="\n")
    for name in pairs:
        equal, queries = alike[name]
        assert equal >= queries * (1 - 1e-4), name  # ties of rounding


def test_advice_on_logits_that_are_not_finite_names_what_can_be_changed():
    for name, advice in (("ridge_regression", "settings of the method"), ("protonet", "optimizer.lr")):
        made = instantiate(compose(f"method={name}").method)
        made.test_accuracy.update(torch.full((2, 3, 4), float("nan")), torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(FewShotError, match=f"are not finite, .*{advice}"):
            made.test_accuracy.compute()


@pytest.mark.parametrize("name", ["feat", "classifier", "matching_fce", "maml"])
def test_an_encoder_without_its_number_of_features_is_named(name):
    node: Any = OmegaConf.to_container(compose(f"method={name}", "way=5").method)
    settings = {key: value for key, value in node.items() if key != "encoder"}
    settings |= {"classes": 3} if name == "classifier" else {}
    with pytest.raises(FewShotError, match=r"the encoder Flatten has no attribute features; add it"):
        instantiate({**settings, "_partial_": True})(encoder=torch.nn.Flatten())
