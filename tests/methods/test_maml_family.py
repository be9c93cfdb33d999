"""Three variants of MAML, each of which overrides one or two short methods."""

import pytest
import torch
from torch import nn

from fewshot.data.episodes import Episode, stack
from fewshot.encoders.conv4 import Conv4
from fewshot.methods.maml import MAML


class ANIL(MAML):
    """Almost no inner loop (Raghu et al., 2020, arXiv 1909.09157): the inner steps change only the last layer."""

    def adapts(self, name):
        return name.startswith("head.")

    def adapt(self, weights, support, labels, steps, differentiable=False):
        features = self.features(weights, support)  # once: no step changes the encoder
        return self.descend(weights, lambda adapted: self.logits(adapted, features), labels, steps, differentiable)


class MetaSGD(MAML):
    """Meta-SGD (Li et al., 2017, arXiv 1707.09835): every parameter has its own, learned inner learning rate."""

    def __init__(self, encoder, **settings):
        super().__init__(encoder, **settings)
        rates = {name: torch.full_like(weight, self.inner_learning_rate) for name, weight in self.weights().items()}
        self.rates = nn.ParameterDict({name.replace(".", "/"): rate for name, rate in rates.items()})

    def update(self, weights, gradients, number):  # noqa: ARG002
        rates = {name: weights[f"rates.{name.replace('.', '/')}"] for name in gradients}
        return {name: weights[name] - rates[name] * gradient for name, gradient in gradients.items()}


class Reptile(MAML):
    """Reptile (Nichol et al., 2018, arXiv 1803.02999): the meta-gradient is initial minus adapted weights."""

    def task_gradient(self, episode):
        result = super().task_gradient(episode)
        start = self.weights()
        adapted = self.adapt(start, episode.support, episode.support_labels, self.inner_steps)
        return result._replace(gradients=[(start[name] - adapted[name]).detach() for name in start])


def make(kind, **changes):
    torch.manual_seed(1)
    settings = {"way": 3, "inner_learning_rate": 0.1, "inner_steps": 2, "task_batching": "loop", "vmap_tasks": 2}
    return kind(Conv4(1, 16, filters=8), **settings | changes).double()


def tasks(count=4, way=3, shot=2, query=3):
    """Make tasks whose classes differ in which rows are bright."""
    generator = torch.Generator().manual_seed(0)

    def images(labels):
        noise = torch.randn(len(labels), 1, 16, 16, dtype=torch.float64, generator=generator)
        for image, label in zip(noise, labels.tolist(), strict=True):
            image[0, 5 * label : 5 * label + 3] += 1
        return noise

    support, queries = torch.arange(way).repeat_interleave(shot), torch.arange(way).repeat_interleave(query)
    return stack([Episode(images(support), support, images(queries), queries, way) for _ in range(count)])


@pytest.mark.parametrize("kind", [ANIL, MetaSGD])
def test_it_learns(kind):
    method, batch = make(kind), tasks()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        found = method.meta_gradient(batch)
        for parameter, gradient in zip(method.weights().values(), found.gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        losses.append(found.loss.item())
    assert losses[-1] < losses[0] / 4
    assert method.eval()(next(batch.tasks())).shape == (9, 3)


def test_reptile_moves_towards_the_adapted_weights():
    method = make(Reptile, inner_steps=3)
    task = next(tasks(1).tasks())
    start = {name: weight.detach().clone() for name, weight in method.weights().items()}
    adapted = method.adapt(method.weights(), task.support, task.support_labels, 3)
    for (name, weight), gradient in zip(start.items(), method.meta_gradient(stack([task])).gradients, strict=True):
        torch.testing.assert_close(weight - gradient, adapted[name].detach())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", [ANIL, MetaSGD, Reptile])
def test_all_ways_to_run_tasks_agree(kind, order):
    expected = make(kind, order=order).meta_gradient(tasks())
    for batching in ("threads", "vmap"):
        if kind is Reptile and batching == "vmap":
            continue  # written for one task at a time: with vmap, its weights would need the dimension of tasks
        for recompute in (False, True):
            found = make(kind, order=order, task_batching=batching, recompute=recompute).meta_gradient(tasks())
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_anil_adapts_the_last_layer_and_learns_the_encoder():
    method = make(ANIL)
    task = next(tasks(1).tasks())
    adapted = method.adapt(method.weights(), task.support, task.support_labels, 2)
    changed = {name for name, weight in method.weights().items() if not torch.equal(weight, adapted[name])}
    assert changed == {"head.weight", "head.bias"}
    gradients = dict(zip(method.weights(), method.meta_gradient(stack([task])).gradients, strict=True))
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if name.startswith("encoder.0"))


def test_meta_sgd_with_equal_rates_is_maml_and_learns_them():
    learned, plain = make(MetaSGD).meta_gradient(tasks()), make(MAML).meta_gradient(tasks())
    torch.testing.assert_close(learned.gradients[: len(plain.gradients)], plain.gradients)
    assert all(gradient.abs().max() > 0 for gradient in learned.gradients[len(plain.gradients) :][:1])


@pytest.mark.parametrize("order", [1, 2])
def test_learned_rates_start_as_maml_and_have_a_derivative_for_each_step_and_tensor(order):
    method = make(MAML, order=order, learn_rates=True)
    found, plain = method.meta_gradient(tasks()), make(MAML, order=order).meta_gradient(tasks())
    torch.testing.assert_close(found.gradients[: len(plain.gradients)], plain.gradients)
    gradients = dict(zip(method.weights(), found.gradients, strict=True))
    name, rate = "head.weight", method.rates["head/weight"]
    assert set(gradients) == {*make(MAML).weights(), *(f"rates.{key}" for key in method.rates)} and rate.shape == (2,)
    if order == 1:
        return  # whose derivative leaves terms out
    for step in range(2):
        losses = []
        for change in (1e-5, -1e-5):
            changed = make(MAML, learn_rates=True)
            with torch.no_grad():
                changed.rates["head/weight"][step] += change
            losses.append(changed.meta_gradient(tasks()).loss.item())
        by_difference = (losses[0] - losses[1]) / 2e-5
        assert gradients[f"rates.{name.replace('.', '/')}"][step].item() == pytest.approx(by_difference, rel=1e-4)


@pytest.mark.parametrize("order", [1, 2])
def test_learned_rates_do_not_depend_on_how_tasks_are_run(order):
    expected = make(MAML, order=order, learn_rates=True).meta_gradient(tasks())
    for batching in ("threads", "vmap"):
        for recompute in (False, True):
            changes = {"order": order, "task_batching": batching, "recompute": recompute, "learn_rates": True}
            torch.testing.assert_close(make(MAML, **changes).meta_gradient(tasks()), expected, rtol=1e-8, atol=1e-10)


def test_a_test_of_more_steps_uses_the_rates_of_the_last_one():
    method = make(MAML, learn_rates=True, test_inner_steps=3)
    with torch.no_grad():
        for rates in method.rates.values():
            rates[:] = torch.tensor([0.1, 0.2])
    task = next(tasks(1).tasks())
    arguments = task.support, task.support_labels
    weights = method.weights()
    for rate, steps in ((0.1, 1), (0.2, 2)):
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items() if "rates" not in name}
        weights = make(MAML, inner_learning_rate=rate).adapt(weights, *arguments, steps)
    adapted = method.adapt(method.weights(), *arguments, 3)
    torch.testing.assert_close({name: adapted[name] for name in weights}, weights)
