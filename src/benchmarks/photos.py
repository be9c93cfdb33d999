"""Compare classifiers of a few photos a class: accuracy, calibration, and how well unseen classes are noticed.

    python src/benchmarks/photos.py encoder=lite0 encoder.file=efficientnet-lite0-57934424.pth

prints the table of notebooks/guides/predict.md, for miniImageNet's test classes and the halves of its training classes.
``--study`` prints what the constants of ``method=auto`` and ``fewshot.familiarity`` were set by, on validation classes.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# The folder of this script has a module called profile, which would replace Python's own.
sys.path = [str(ROOT / "src"), *(place for place in sys.path if place != str(Path(__file__).parent))]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import Image  # noqa: E402
from rich.progress import track  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from scipy.optimize import minimize_scalar  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from torch.nn.functional import cross_entropy, normalize  # noqa: E402

from fewshot.config import compose  # noqa: E402
from fewshot.data.photos import prepare  # noqa: E402
from fewshot.errors import FewShotError  # noqa: E402
from fewshot.familiarity import learn_familiarity  # noqa: E402
from fewshot.methods.auto import DEFAULT, PENALTIES, Auto, class_means, directions  # noqa: E402
from fewshot.predictor import make_predictor  # noqa: E402
from fewshot.text import say  # noqa: E402
from fewshot.training import make_data  # noqa: E402

WAY, QUERY, SHOTS, UNSEEN = 10, 50, (1, 2, 5, 10), 10
IMAGES = QUERY + max(SHOTS)  # of each class
BINS = 15  # of the calibration error
Answer = Callable[[torch.Tensor], torch.Tensor]  # from embeddings to logits


class Draw(NamedTuple):
    """Embeddings of some classes, ``[images, features]``, and of queries of other classes."""

    support: torch.Tensor
    labels: torch.Tensor
    query: torch.Tensor
    truth: torch.Tensor
    unseen: torch.Tensor


class Score(NamedTuple):
    """What one classifier did in one draw."""

    accuracy: float
    confidence: float
    calibration_error: float
    area: float


def embed(overrides: Sequence[str], split: str, cache: Path) -> torch.Tensor:
    """Embed the first ``IMAGES`` photos of each class of a split: ``[classes, IMAGES, features]``."""
    key = hashlib.sha256(repr((sorted(overrides), IMAGES)).encode()).hexdigest()[:12]
    file = cache / "photos" / f"{split}-{key}.safetensors"
    if file.exists():
        return load_file(file)["embeddings"]
    data = make_data(compose("dataset=miniimagenet", f"cache_dir={cache}"))
    data.setup()
    positions, labels = data.bank.labelled(split)
    chosen = torch.cat([positions[labels == label][:IMAGES] for label in labels.unique()])
    predictor = make_predictor(compose(*overrides, name="predict"))
    batches = [
        predictor.represent(
            [prepare(Image.fromarray(image), predictor.size, 3) for image in data.bank.images[part].numpy()]
        ).cpu()
        for part in track(chosen.split(32), description=f"embedding {split}")
    ]
    embeddings = torch.cat(batches).unflatten(0, (-1, IMAGES))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": embeddings}, file)
    return embeddings


def draws(embeddings: torch.Tensor, way: int, shot: int, count: int) -> Iterator[Draw]:
    """Draw classes and their support, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        classes = torch.randperm(len(embeddings), generator=generator)
        order = torch.stack([torch.randperm(IMAGES, generator=generator) for _ in classes])
        chosen = embeddings[classes[:, None], order]
        known, others = chosen[:way], chosen[way : way + UNSEEN]
        yield Draw(
            known[:, :shot].flatten(0, 1),
            torch.arange(way).repeat_interleave(shot),
            known[:, -QUERY:].flatten(0, 1),
            torch.arange(way).repeat_interleave(QUERY),
            others[:, -QUERY:].flatten(0, 1),
        )


def prototypes(draw: Draw) -> Answer:
    """The default of earlier versions: minus the squared distance to the class means."""
    means = class_means(draw.support, draw.labels, int(draw.labels.max()) + 1)
    return lambda query: -torch.cdist(query, means).square()


def scikit_learn(draw: Draw) -> Answer:
    """Three lines of scikit-learn: logistic regression on normalised embeddings."""
    model = LogisticRegression(max_iter=1000).fit(normalize(draw.support, dim=1), draw.labels)
    return lambda query: torch.from_numpy(model.decision_function(normalize(query, dim=1)))


def auto(draw: Draw) -> Answer:
    """The default."""
    return Auto(torch.nn.Identity()).learn(draw.support, draw.labels, int(draw.labels.max()) + 1)


CLASSIFIERS: dict[str, Callable[[Draw], Answer]] = {
    "`method=protonet`, the default before": prototypes,
    "scikit-learn's logistic regression": scikit_learn,
    "`method=auto`": auto,
}


def calibration_error(probabilities: torch.Tensor, truth: torch.Tensor) -> float:
    """Expected calibration error in ``BINS`` equal bins (Guo et al., 2017, arXiv 1706.04599)."""
    best = probabilities.max(1)
    right = (best.indices == truth).double()
    bins = (best.values * BINS).long().clamp_max(BINS - 1)
    gaps = [(best.values[bins == i].mean() - right[bins == i].mean()).abs() * (bins == i).sum() for i in bins.unique()]
    return float(torch.stack(gaps).sum()) / len(truth)


def score(draw: Draw, answer: Answer, by_familiarity: bool) -> Score:
    """Score a classifier; unseen classes are noticed by its largest probability, or by their familiarity."""
    probabilities, others = answer(draw.query).double().softmax(1), answer(draw.unseen).double().softmax(1)
    known, unknown = probabilities.amax(1), others.amax(1)
    if by_familiarity:
        familiarity = learn_familiarity(draw.support, draw.labels, probabilities.shape[1])
        known, unknown = familiarity(draw.query), familiarity(draw.unseen)
    area = roc_auc_score(np.repeat([1, 0], [len(known), len(unknown)]), torch.cat([known, unknown]))
    return Score(
        float((probabilities.argmax(1) == draw.truth).double().mean()),
        float(probabilities.amax(1).mean()),
        calibration_error(probabilities, draw.truth),
        float(area),
    )


def compare(name: str, embeddings: torch.Tensor, count: int) -> Iterator[str]:
    """Yield the rows of a set of classes."""
    for shot in SHOTS:
        found: dict[str, list[Score]] = {}
        for draw in draws(embeddings, WAY, shot, count):
            for label, learn in CLASSIFIERS.items():
                found.setdefault(label, []).append(score(draw, learn(draw), learn is auto))
        for label, scores in found.items():
            values = 100 * np.array(scores)
            accuracy = _interval(values[:, 0])
            confidence, error, area = values[:, 1:].mean(0)
            yield f"| {name} | {shot} | {label} | {accuracy} | {confidence:.1f} | {error:.1f} | {area:.1f} |"
        pair = 100 * np.array([[score.accuracy for score in found[label]] for label in list(CLASSIFIERS)[1:]])
        yield f"| {name} | {shot} | difference of the last two | {_interval(pair[1] - pair[0])} | | | |"


def study(embeddings: torch.Tensor, count: int) -> Iterator[str]:
    """Yield, for ways and shots, the best temperature of the default, and the scores of known and unknown queries."""
    for way in (2, 5, 10):
        for shot in SHOTS:
            logits, truths, scores = [], [], []
            for draw in draws(embeddings[: way + UNSEEN] if len(embeddings) < way else embeddings, way, shot, count):
                centre = class_means(normalize(draw.support, dim=1), draw.labels, way).mean(0)
                model = LogisticRegression(C=PENALTIES[DEFAULT], max_iter=1000)
                model.fit(directions(draw.support, centre), draw.labels)
                found = torch.from_numpy(model.decision_function(directions(draw.query, centre)))
                logits.append(found if found.ndim > 1 else found[:, None] * torch.tensor([-0.5, 0.5]))
                truths.append(draw.truth)
                scores.append(learn_familiarity(draw.support, draw.labels, way)(draw.query))
            both, truth, known = torch.cat(logits), torch.cat(truths), torch.cat(scores)
            best = minimize_scalar(
                lambda log, both=both, truth=truth: float(cross_entropy(both / np.exp(log), truth)),
                bounds=(-6, 3),
                method="bounded",
            )
            yield (
                f"way {way}, shot {shot}: best temperature {np.exp(best.x):.3f}; familiarity of queries: mean "
                f"{known.mean():.2f}, standard deviation {known.std():.2f}, 5% below {known.quantile(0.05):.2f}"
            )


def _interval(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.1f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, or the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="the encoder: KEY=VALUE ... of fewshot predict")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fewshot"), help="directory of the embeddings")
    options = parser.parse_args(arguments)
    cache = options.cache.expanduser()
    if options.study:
        for line in study(embed(options.overrides, "val", cache), options.draws):
            say(line)
        return
    training = embed(options.overrides, "train", cache)
    sets = {"test": embed(options.overrides, "test", cache)}
    sets |= {"training, first half": training[: len(training) // 2], "second half": training[len(training) // 2 :]}
    say("| classes | shot | classifier | accuracy, % | stated confidence | calibration error | ROC area |")
    say("| --- | --- | --- | --- | --- | --- | --- |")
    for name, embeddings in sets.items():
        for row in compare(name, embeddings, options.draws):
            say(row)


if __name__ == "__main__":
    try:
        main()
    except FewShotError as error:
        sys.exit(f"error: {error}")
