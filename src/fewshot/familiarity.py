"""Whether an image shows any of the known classes: how like their examples its embedding is."""

from dataclasses import dataclass, replace

import torch
from scipy.stats import norm, t
from torch.nn.functional import normalize

from fewshot.errors import FewShotError
from fewshot.held_out import hold_out
from fewshot.methods.auto import class_means

FALSE_ALARM = 0.05  # share of the images of a class that the page and ONNX files call perhaps none of these
MIN_HELD_OUT = 4  # fewest held-out examples whose scores set the threshold
# Mean and standard deviation of the scores of classes with one example, see ``src/benchmarks/photos.py --study``.
ONE_SHOT = (0.70, 0.18)


@dataclass(frozen=True, eq=False)
class Familiarity:
    """Scores from -2 to 2 of how like the classes an embedding is.

    The score is the cosine with the nearest class mean, plus the cosine with the nearest class mean after centring at
    the mean of the class means. The first sees what the classes have in common, which decides with few classes; the
    second what distinguishes them.

    Attributes:
        centre: ``[features]``.
        means: directions of the class means, ``[way, features]``.
        centred: the same after centring.
        mean: of the scores of examples that were left out.
        spread: their standard deviation.
        examples: their number; 0: too few, so the two numbers are those of photos in general.
    """

    centre: torch.Tensor
    means: torch.Tensor
    centred: torch.Tensor
    mean: float = ONE_SHOT[0]
    spread: float = ONE_SHOT[1]
    examples: int = 0

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        """Score embeddings ``[queries, ...]``: ``[queries]``."""
        return self.cosines(query).amax(-1).sum(-1)

    def cosines(self, query: torch.Tensor) -> torch.Tensor:
        """Return the cosines with the class means, plain and centred: ``[queries, 2, way]``."""
        points = normalize(query.flatten(1).float(), dim=1)
        return torch.stack([points @ self.means.mT, normalize(points - self.centre, dim=1) @ self.centred.mT], 1)

    def threshold(self, false_alarm: float) -> float:
        """Return the score below which an image is unknown.

        It is the one-sided prediction bound of a normal sample: images of the classes are below it at the given rate,
        which is a little less with the examples that were left out. With too few of them, it is a fixed number.

        Raises:
            FewShotError: the rate is not above 0 and below 1.
        """
        if not 0 < false_alarm < 1:
            raise FewShotError(f"false_alarm={false_alarm} must be above 0 and below 1: 0.05 for 5%")
        if not self.examples:
            return self.mean + self.spread * float(norm.ppf(false_alarm))
        quantile = float(t.ppf(false_alarm, self.examples - 1))
        return self.mean + quantile * self.spread * (1 + 1 / self.examples) ** 0.5


def learn_familiarity(support: torch.Tensor, labels: torch.Tensor, way: int) -> Familiarity:
    """Learn the scores of classes, and what scores to expect of their images by leaving examples out.

    Args:
        support: embeddings, ``[examples, ...]``.
        labels: int64 ``[examples]``, every class at least once.
        way: the number of classes.
    """
    learned = _means(support, labels, way)
    found = hold_out(lambda *examples: _means(*examples).cosines, support, labels.cpu(), way)
    if found is None or found.examples < MIN_HELD_OUT:
        return learned
    scores = found.logits.amax(-1).sum(-1)
    return replace(learned, mean=float(scores.mean()), spread=float(scores.std()), examples=found.examples)


def _means(support: torch.Tensor, labels: torch.Tensor, way: int) -> Familiarity:
    points = normalize(support.flatten(1).float(), dim=1)
    labels = labels.to(points.device)
    means = class_means(points, labels, way)
    centre = means.mean(0)
    centred = class_means(normalize(points - centre, dim=1), labels, way)
    return Familiarity(centre, normalize(means, dim=1), normalize(centred, dim=1))
