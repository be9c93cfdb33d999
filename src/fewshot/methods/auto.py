"""The classifier for photos of one's own: linear, chosen and calibrated by leaving examples out."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from fewshot.data.episodes import EmbeddedEpisode
from fewshot.errors import FewShotError
from fewshot.held_out import HeldOut, hold_out
from fewshot.methods.base import MetricMethod

DEFAULT, CENTRED, MEANS = "logistic regression", "logistic regression on centred embeddings", "nearest class mean"
PENALTIES = {DEFAULT: 1.0, CENTRED: 3.0}  # inverse, C of scikit-learn, whose default is 1
# The temperature to expect, and how far it may be from that, as a standard deviation of its logarithm. Fitted to
# ``src/benchmarks/photos.py --study``; with one example a class, nothing else is known.
TEMPERATURES = {DEFAULT: (0.036, 0.59), CENTRED: (0.126, 0.38), MEANS: (0.139, -0.35)}  # factor, power of the shots
SPREAD = 0.2
STIFFNESS = 1e-3  # of biases: without it, those of classes that are far apart would have no optimum
ERRORS = 2  # standard errors by which another classifier has to be better
FEW_CLASSES = 0.55  # with fewer classes, probabilities are surer: the factor is 1 - FEW_CLASSES / (way - 1)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear classifier of the directions of embeddings.

    Attributes:
        name: of the classifier.
        why: it was taken.
        centre: subtracted from normalised embeddings, ``[features]``.
        weight: ``[way, features]``.
        bias: ``[way]``.
        temperature: divides the scores.
        held_out: answers to the examples without having seen them; None: every class had a single one.
    """

    name: str
    why: str
    centre: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    temperature: float = 1.0
    held_out: HeldOut | None = None

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        """Return logits ``[queries, way]`` of embeddings ``[queries, features]``."""
        points = directions(query.float(), self.centre)
        return (points @ self.weight.mT + self.bias) / self.temperature

    def to(self, device: torch.device) -> "Linear":
        """Return the same on another device."""
        return replace(self, centre=self.centre.to(device), weight=self.weight.to(device), bias=self.bias.to(device))


class Auto(MetricMethod):
    """scikit-learn's logistic regression on normalised embeddings, with probabilities that mean something.

    Its answers are those of ``LogisticRegression()`` on embeddings that are divided by their norm, if classes have
    equally many examples. If a class has two or more, they are left out in turn (see ``fewshot.held_out.parts``). The
    answers decide whether another classifier is taken, which has to be better by more than two standard errors, and
    the temperature of the probabilities (Guo et al., 2017, arXiv 1706.04599), together with the one that is expected
    for as many shots. With one example a class, the default and the expected temperature are used. Classes count the
    same whatever their shots.

    The others are the nearest class mean and a logistic regression, both on embeddings that are also centred at the
    mean of the class means, and divided by their norm again (Wang et al., 2019, arXiv 1911.04623).

    Args:
        encoder: already trained, or pretrained; one vector per image.
    """

    trains_on = "nothing"

    def learn(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Linear:
        """See ``MetricMethod``; the result is linear, for export.

        Raises:
            FewShotError: an embedding is not a vector.
        """
        if support.dim() != 2:
            raise FewShotError(
                f"Auto takes one vector per image, but the encoder's embeddings are {list(support.shape[1:])}"
            )
        with torch.autocast(support.device.type, enabled=False):
            return _choose(support.float(), labels, way)

    def compare(self, embedded: EmbeddedEpisode) -> torch.Tensor:
        """See ``MetricMethod``."""
        return self.learn(embedded.support, embedded.support_labels, embedded.way)(embedded.query)


def directions(embeddings: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Return the unit vectors from the centre to normalised embeddings, ``[images, features]``."""
    return normalize(normalize(embeddings, dim=-1) - centre, dim=-1)


def class_means(points: torch.Tensor, labels: torch.Tensor, way: int) -> torch.Tensor:
    """Average the points of each class: ``[way, features]``."""
    sums = points.new_zeros(way, points.shape[1]).index_add_(0, labels, points)
    return sums / labels.bincount(minlength=way)[:, None]


def expected_temperature(name: str, shots: float, way: int) -> float:
    """Return the temperature of a classifier on photos."""
    factor, power = TEMPERATURES[name]
    return factor * shots**power * (1 - FEW_CLASSES / (way - 1))


def _choose(support: torch.Tensor, labels: torch.Tensor, way: int) -> Linear:
    shots = len(labels) / way
    chosen, best = DEFAULT, None
    temperatures, tried = {}, {}
    for name in TEMPERATURES:
        found = hold_out(lambda *learned, name=name: fit(name, *learned), support, labels.cpu(), way)
        if found is None:
            temperature = expected_temperature(DEFAULT, shots, way)
            why = "with one example a class, none can be left out to try another, or to fit the temperature"
            return replace(fit(DEFAULT, support, labels, way), temperature=temperature, why=why)
        fewer = max(1.0, shots - 1)
        expected = expected_temperature(name, fewer, way)
        temperatures[name] = _fit_temperature(found, expected)
        tried[name], losses = found, found.losses(temperatures[name])
        if best is None:
            best = losses
            continue
        gain = best - losses
        if gain.mean() > ERRORS * gain.std() / len(gain) ** 0.5:
            chosen, best = name, losses
    held_out, temperature = tried[chosen], temperatures[chosen]
    held_out = replace(held_out, logits=held_out.logits / temperature)
    ratio = expected_temperature(chosen, shots, way) / expected_temperature(chosen, max(1.0, shots - 1), way)
    why = (
        "on held-out examples, no other classifier is better by more than two standard errors"
        if chosen == DEFAULT
        else "on held-out examples, it is better than the default by more than two standard errors"
    )
    fitted = fit(chosen, support, labels, way)
    return replace(fitted, temperature=temperature * ratio, why=why, held_out=held_out)


def fit(name: str, support: torch.Tensor, labels: torch.Tensor, way: int) -> Linear:
    """Learn one of the classifiers in ``TEMPERATURES``, with a temperature of 1; see ``MetricMethod.learn``."""
    centre = class_means(normalize(support, dim=-1), labels, way).mean(0)
    if name == DEFAULT:
        centre = torch.zeros_like(centre)
    points, shots = directions(support, centre), labels.bincount(minlength=way)
    means = class_means(points, labels, way)
    unequal = len(shots.unique()) > 1
    noise = (points - means[labels]).square().sum() / (shots - 1).sum().clamp_min(1)
    if name == MEANS:
        # A mean of n examples is farther from its class's queries than the true mean is, by their noise / n.
        return Linear(name, "", centre, 2 * means, noise / shots - means.square().sum(1))
    # The optimal weights lie in the span of the support, so the fit needs only as many numbers as examples.
    basis, _ = torch.linalg.qr(points.mT.double())
    model = LogisticRegression(C=PENALTIES[name], class_weight="balanced", max_iter=1000)
    model.fit((points.double() @ basis).cpu(), labels.cpu())
    weight, bias = (torch.from_numpy(values) for values in (model.coef_, model.intercept_))
    if len(weight) == 1:  # two classes: one score, for the second
        weight, bias = (torch.cat([-0.5 * values, 0.5 * values]) for values in (weight, bias))
    weight, bias = (weight.to(basis) @ basis.mT).to(support), bias.to(support)
    if unequal:
        moved = 0.0 if name == DEFAULT else 1 / (way * shots[labels])
        bias = _rebalance(points, labels, weight, bias, PENALTIES[name], noise, moved)
    return Linear(name, "", centre, weight, bias)


def _rebalance(
    points: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    penalty: float,
    noise: torch.Tensor,
    moved: torch.Tensor | float,
) -> torch.Tensor:
    """Fit the biases of a logistic regression again, as if the examples were not those that decided the weights.

    A class with few examples has learned their noise, and scores them too high. So its bias is too low for queries,
    which would rather be answered with a class of more examples.

    Args:
        points: ``[examples, features]``.
        labels: int64 ``[examples]``.
        weight: ``[way, features]``, optimal for the points.
        bias: ``[way]``, the same.
        penalty: C of scikit-learn, with balanced classes.
        noise: mean squared distance of an example from the mean of its class.
        moved: how far the noise of each example moved the centre, as a share, ``[examples]``.
    """
    way, shots = len(weight), labels.bincount(minlength=len(weight))
    scores, truth = points @ weight.mT, torch.nn.functional.one_hot(labels, way).to(points)
    balance = (len(labels) / way / shots)[labels][:, None]
    # The gradient is zero at the optimum, where the weights are therefore the sum of these multiples of the points.
    multiples = penalty * balance * (truth - (scores + bias).softmax(1))
    scores = scores - noise * (multiples - torch.as_tensor(moved).to(points).reshape(-1, 1) * multiples.sum(0))
    scores = scores.double().cpu()
    truth, balance = truth.double().cpu(), balance.double().cpu()

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logs = (scores + torch.from_numpy(values)).log_softmax(1)
        gradient = (balance * (logs.exp() - truth)).sum(0).numpy() + STIFFNESS * values
        return float(-(balance * truth * logs).sum()) + STIFFNESS / 2 * float(values @ values), gradient

    return torch.from_numpy(minimize(loss, np.zeros(way), jac=True).x).to(bias)


def _fit_temperature(held_out: HeldOut, expected: float) -> float:
    """Return the most probable temperature, given a log-normal distribution around the expected one."""

    def surprise(log: float) -> float:
        prior = (log / SPREAD) ** 2 / 2
        return float(held_out.losses(expected * math.exp(log)).sum()) + prior

    return expected * math.exp(float(minimize_scalar(surprise, bounds=(-3, 3), method="bounded").x))
