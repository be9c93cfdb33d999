"""Proofs that MAML computes the meta-gradient of the order it claims."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.ops import DropBlock2d

from fewshot.autograd import autograd_graph, is_double_backward
from fewshot.data.episodes import Episode, stack
from fewshot.encoders.conv4 import Conv4
from fewshot.errors import FewShotError
from fewshot.methods.maml import MAML, MetaGradient, total_cross_entropy

SETTINGS = {
    "way": 3,
    "order": 2,
    "inner_learning_rate": 0.4,
    "inner_steps": 2,
    "test_inner_steps": 3,
    "clip_norm": None,
    "task_batching": "loop",
    "vmap_tasks": 2,
    "recompute": False,
}


class Smooth(nn.Sequential):
    """A network that is differentiable everywhere, unlike one with ReLU or max pooling."""

    features = 4

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def method(encoder=Smooth, **changes) -> MAML:
    torch.manual_seed(1)
    return MAML(encoder(), **SETTINGS | changes).double()


def conv4():
    return Conv4(1, 16, filters=8)


def tasks(count=5, way=3, shot=2, query=2, size=16, seed=0) -> Episode:
    generator = torch.Generator().manual_seed(seed)

    def images(per_class):
        return torch.randn(way * per_class, 1, size, size, dtype=torch.float64, generator=generator)

    labels = torch.arange(way)
    support, queries = labels.repeat_interleave(shot), labels.repeat_interleave(query)
    return stack([Episode(images(shot), support, images(query), queries, way) for _ in range(count)])


def gradients_of(maml: MAML, batch: Episode) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in maml.meta_gradient(batch).gradients])


def loss_after_adaptation(maml, batch):
    """Compute the loss with plain modules and no graph between steps."""
    total = 0.0
    start = {name: value.clone() for name, value in maml.state_dict().items()}
    for task in batch.tasks():
        for _ in range(maml.inner_steps):
            maml.zero_grad()
            cross_entropy(maml.head(maml.encoder(task.support)), task.support_labels).backward()
            with torch.no_grad():
                for parameter in maml.parameters():
                    parameter.sub_(maml.inner_learning_rate * parameter.grad)
        total += cross_entropy(maml.head(maml.encoder(task.query)), task.query_labels).item()
        maml.load_state_dict(start)
    return total / len(batch.query)


@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_is_the_derivative_of_the_loss_after_adaptation(steps):
    maml, batch = method(inner_steps=steps), tasks(2)
    gradients = maml.meta_gradient(batch).gradients
    assert maml.meta_gradient(batch).loss.item() == pytest.approx(loss_after_adaptation(maml, batch), rel=1e-12)
    first = method(inner_steps=steps, order=1).meta_gradient(batch).gradients
    misses = []
    for parameter, second_order, first_order in zip(maml.parameters(), gradients, first, strict=True):
        values = parameter.data.view(-1)
        for position in {0, len(values) // 2, len(values) - 1}:
            original, step = values[position].item(), 1e-5
            losses = []
            for moved in (original + step, original - step):
                values[position] = moved
                losses.append(loss_after_adaptation(maml, batch))
            values[position] = original
            difference = (losses[0] - losses[1]) / (2 * step)
            assert second_order.view(-1)[position].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)
            misses.append(abs(first_order.view(-1)[position].item() - difference))
    assert max(misses) > 1e-3  # first order is different


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order_is_the_gradient_at_the_adapted_weights(steps):
    maml, batch = method(inner_steps=steps, order=1), tasks(1)
    expected = {name: value.clone() for name, value in maml.state_dict().items()}
    task = next(batch.tasks())
    for _ in range(steps):
        loss = cross_entropy(maml.head(maml.encoder(task.support)), task.support_labels)
        for parameter, gradient in zip(
            maml.parameters(), torch.autograd.grad(loss, list(maml.parameters())), strict=True
        ):
            parameter.data -= 0.4 * gradient
    loss = cross_entropy(maml.head(maml.encoder(task.query)), task.query_labels)
    at_adapted = torch.autograd.grad(loss, list(maml.parameters()))
    maml.load_state_dict(expected)
    torch.testing.assert_close(maml.meta_gradient(batch).gradients, list(at_adapted), rtol=1e-10, atol=1e-12)


def kinds(order: int, steps: int, encoder=conv4) -> list[str]:
    maml = method(encoder, order=order, inner_steps=steps)
    task = next(tasks(1).tasks())
    nodes, _ = autograd_graph(total_cross_entropy(maml.solve(task), task.query_labels))
    return [node.name() for node in nodes]


def test_only_second_order_differentiates_the_gradients_of_the_inner_steps():
    def double(names):
        return sum(map(is_double_backward, names))

    plain = kinds(1, 0)
    counts = {order: [kinds(order, steps) for steps in (1, 2, 3)] for order in (1, 2)}
    assert double(plain) == double(kinds(2, 0)) == 0
    assert [double(names) for names in counts[1]] == [0, 0, 0]
    found = [double(names) for names in counts[2]]
    assert found[0] > 0 and found[0] < found[1] < found[2]
    sizes = [len(names) for names in counts[2]]
    assert all(second > first for first, second in pairwise(sizes))
    # First order adds only one subtraction per parameter and step to the graph of plain training.
    added = [len(names) - len(plain) for names in counts[1]]
    assert added == [added[0] * steps for steps in (1, 2, 3)]
    assert set(counts[1][2]) - set(plain) <= {"SubBackward0"}


class Quadratic(MAML):
    """A task loss of |theta - target|^2 / 2, whose meta-gradient is known in closed form."""

    def __init__(self, **changes):
        nn.Module.__init__(self)
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        self.order, self.inner_learning_rate = changes["order"], 0.1
        self.inner_steps, self.recompute = changes["steps"], changes.get("recompute", False)
        self.rates = nn.ParameterDict()

    def classify(self, weights, images):  # noqa: ARG002
        return weights["theta"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_meta_gradient_of_a_quadratic_matches_the_closed_form(monkeypatch, steps, recompute):
    targets = {"support": torch.tensor([3.0, 5.0]).double(), "query": torch.tensor([-1.0, 4.0]).double()}
    monkeypatch.setattr(
        "fewshot.methods.maml.total_cross_entropy", lambda theta, target: (theta - target).square().sum() / 2
    )
    for order in (1, 2):
        maml = Quadratic(order=order, steps=steps, recompute=recompute)
        adapted = maml.adapt(maml.weights(), targets["support"], targets["support"], steps, order == 2)["theta"]
        gradient = torch.autograd.grad((adapted - targets["query"]).square().sum() / 2, maml.theta)[0]
        shrink = 0.9**steps
        at = targets["support"] + shrink * (maml.theta.detach() - targets["support"])
        torch.testing.assert_close(adapted.detach(), at)
        expected = (at - targets["query"]) * (shrink if order == 2 else 1)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("order", [1, 2])
def test_zero_inner_steps_is_plain_training(order):
    maml, batch = method(conv4, inner_steps=0, order=order), tasks(3)
    losses = [cross_entropy(maml.head(maml.encoder(t.query)), t.query_labels) for t in batch.tasks()]
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(maml.parameters()))
    torch.testing.assert_close(maml.meta_gradient(batch).gradients, list(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batching", ["loop", "threads", "vmap"])
def test_tasks_of_a_meta_batch_are_independent(batching):
    maml, batch = method(conv4, task_batching=batching, vmap_tasks=5), tasks(5)
    other = tasks(5, seed=9)
    mixed = Episode(*(torch.cat([a[:2], b[2:]]) for a, b in zip(batch[:-1], other[:-1], strict=True)), 3)
    one, two = maml.meta_gradient(batch), maml.meta_gradient(mixed)
    torch.testing.assert_close(one.logits[:2], two.logits[:2], rtol=1e-10, atol=1e-12)
    assert (one.logits[2:] - two.logits[2:]).abs().max() > 1e-3
    alone = [gradients_of(maml, stack([task])) for task in batch.tasks()]
    torch.testing.assert_close(gradients_of(maml, batch), torch.stack(alone).mean(0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("encoder", [Smooth, conv4])
def test_all_ways_to_run_tasks_agree(order, encoder):
    batch = tasks(5)
    expected = method(encoder, order=order).meta_gradient(batch)
    for batching in ("threads", "vmap", "auto"):
        for recompute in (False, True):
            found = method(encoder, order=order, task_batching=batching, recompute=recompute).meta_gradient(batch)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("batching", ["loop", "threads", "vmap", "auto"])
@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU(), DropBlock2d(0.2, 3)])
def test_with_dropout_all_ways_to_run_tasks_draw_the_same_numbers(layer, batching, recompute, monkeypatch):
    monkeypatch.delattr("fewshot.methods.tasks.map_in_threads")  # threads may be in order by chance

    def noisy():
        encoder = Smooth()
        encoder[2] = layer
        return encoder

    batch = tasks()
    expected = method(noisy).meta_gradient(batch)
    found = method(noisy, task_batching=batching, recompute=recompute).meta_gradient(batch)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_orders_have_equal_logits_and_different_gradients():
    batch = tasks()
    one, two = (method(conv4, order=order).meta_gradient(batch) for order in (1, 2))
    torch.testing.assert_close(one.logits, two.logits)
    distance = max((a - b).abs().max() for a, b in zip(one.gradients, two.gradients, strict=True))
    assert distance > 1e-3


def test_forward_adapts_under_no_grad_and_changes_nothing():
    maml = method(conv4).eval()
    before = {name: value.clone() for name, value in maml.state_dict().items()}
    task = next(tasks(1).tasks())
    with torch.no_grad():
        logits = maml(task)
    assert logits.shape == (6, 3) and not logits.requires_grad
    assert all(torch.equal(before[name], value) for name, value in maml.state_dict().items())
    adapted = method(conv4, inner_steps=3)
    torch.testing.assert_close(logits, adapted.solve(task).detach())


def test_adaptation_fits_the_support_set():
    maml = method(conv4, test_inner_steps=20).eval()
    task = next(tasks(1).tasks())
    again = task._replace(query=task.support, query_labels=task.support_labels)
    assert (maml(again).argmax(1) == again.query_labels).all()


def test_frozen_parameters_are_neither_adapted_nor_trained():
    maml = method(conv4)
    frozen = next(iter(maml.encoder.parameters())).requires_grad_(False)
    found: MetaGradient = maml.meta_gradient(tasks())
    assert len(found.gradients) == len(list(maml.parameters())) - 1
    assert frozen.grad is None


def test_training_at_a_different_way_is_rejected():
    with pytest.raises(FewShotError, match=r"made for 3 classes, and the episode has 4: .* train\.way"):
        method().meta_gradient(tasks(1, way=4))


@pytest.mark.parametrize("way", [2, 4, 7])
def test_a_different_way_can_be_tested(way):
    maml = method(conv4, test_inner_steps=30).eval()
    task = next(tasks(1, way=way).tasks())
    again = task._replace(query=task.support, query_labels=task.support_labels)
    assert maml(again).shape == (2 * way, way)
    assert (maml(again).argmax(1) == again.query_labels).all()


def test_extra_head_rows_are_kept_and_missing_ones_reuse_others():
    maml = method()
    assert all(torch.equal(weight, maml.weights()[name]) for name, weight in maml.weights(way=2).items())
    more = maml.weights(way=7)
    assert torch.equal(more["head.weight"][:3], maml.head.weight) and torch.equal(
        more["head.bias"][3:6], maml.head.bias
    )


def test_classified_images_share_a_batch_with_the_support_set():
    maml = method(conv4, test_inner_steps=3).eval()
    task = next(tasks(1).tasks())
    weights = maml.adapt(maml.weights(), task.support, task.support_labels, 3)
    expected = maml.classify(weights, torch.cat([task.support, task.query[:1]]))[-1:]
    torch.testing.assert_close(maml.classifier(task.support, task.support_labels, 3)(task.query[:1]), expected)


def test_it_is_transductive_exactly_if_batch_norm_lets_queries_influence_each_other():
    def without():
        encoder = Smooth()
        encoder[1] = nn.Identity()
        return encoder

    for encoder, transductive in ((conv4, True), (Smooth, True), (without, False)):
        made, episode = method(encoder), next(tasks(1).tasks())
        fewer = episode._replace(query=episode.query[:-1], query_labels=episode.query_labels[:-1])
        with torch.no_grad():
            alike = torch.allclose(made(fewer), made(episode)[:-1], atol=1e-6)
        assert made.transductive == transductive == (not alike)
        assert not made.needs_all_queries


def test_a_class_with_more_samples_has_no_more_influence():
    maml = method(conv4, test_inner_steps=3).eval()
    task = next(tasks(1).tasks())
    # Three copies of the samples of class 1, or of all samples, add no information.
    in_class_1 = task.support_labels == 1
    more = [torch.cat([tensor, *[tensor[in_class_1]] * 2]) for tensor in (task.support, task.support_labels)]
    thrice = [torch.cat([tensor] * 3) for tensor in (task.support, task.support_labels)]
    found = maml.classifier(*more, 3)(task.query)
    torch.testing.assert_close(found, maml.classifier(*thrice, 3)(task.query))
    unbalanced = maml(task._replace(support=more[0], support_labels=more[1]))
    assert (unbalanced - maml(task)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order", 3),
        ("inner_learning_rate", 0),
        ("inner_steps", -1),
        ("test_inner_steps", -1),
        ("clip_norm", 0),
        ("vmap_tasks", 0),
        ("task_batching", "magic"),
    ],
)
def test_settings_out_of_range_are_rejected(name, value):
    with pytest.raises(FewShotError, match=f"method.{name}={value}"):
        method(**{name: value})


class Bare(nn.Sequential):
    """A network with a batch norm without weights, and so with running statistics, and a parameter without a use."""

    features = 4

    def __init__(self):
        norm = nn.BatchNorm2d(4, affine=False)
        super().__init__(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.unused = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("batching", ["threads", "vmap"])
def test_running_statistics_and_unused_parameters_are_no_obstacle(batching, order):
    expected, found = (
        gradients_of(method(Bare, order=order, task_batching=way), tasks()) for way in ("loop", batching)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_learned_rates_need_inner_steps():
    with pytest.raises(FewShotError, match=r"method\.learn_rates=true needs method\.inner_steps of at least 1"):
        method(inner_steps=0, learn_rates=True)


def test_a_layer_without_second_derivatives_is_named():
    def encoder():
        network = Smooth()
        network[2] = nn.Hardsigmoid()
        return network

    assert gradients_of(method(encoder, order=1), tasks(1)).isfinite().all()
    with pytest.raises(FewShotError, match=r"no second derivative .*hardsigmoid.*method\.order=1"):
        method(encoder, order=2).meta_gradient(tasks(1))
