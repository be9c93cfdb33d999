"""Compare classifiers of a few photos a class: accuracy, calibration, and how well unseen classes are noticed.

    python src/benchmarks/photos.py encoder=lite0 encoder.file=efficientnet-lite0-57934424.pth --photos clothing=DIR

prints the table of notebooks/guides/predict.md, for miniImageNet's test classes and folders of photos. ``--study``
prints what the constants of ``method=auto`` and ``fewshot.familiarity`` were set by, on miniImageNet's validation
classes, and the same of the folders, by which nothing was set.
"""

import argparse
import hashlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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

from fewshot.checkpoints import digest  # noqa: E402
from fewshot.config import compose  # noqa: E402
from fewshot.data.files import ImageFile, list_folder  # noqa: E402
from fewshot.errors import FewShotError  # noqa: E402
from fewshot.familiarity import learn_familiarity  # noqa: E402
from fewshot.methods.auto import DEFAULT, TEMPERATURES, Auto, class_means, expected_temperature, fit  # noqa: E402
from fewshot.predictor import Predictor, make_predictor  # noqa: E402
from fewshot.text import say  # noqa: E402
from fewshot.training import make_data  # noqa: E402

WAY, QUERY, SHOTS, UNSEEN = 10, 50, (1, 2, 5, 10), 10
IMAGES = QUERY + max(SHOTS)  # of each class
BINS = 15  # of the calibration error
FACTORS = (1, 1.2, 1.4, 1.6, 1.8, 2)  # of a temperature
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


def embed(predictor: Predictor, name: str, photos: Mapping[str, Sequence[ImageFile]], cache: Path) -> torch.Tensor:
    """Embed the first ``IMAGES`` photos of each class that has so many: ``[classes, IMAGES, features]``."""
    files = [file for files in photos.values() if len(files) >= IMAGES for file in files[:IMAGES]]
    known = [
        digest(predictor.method.encoder.state_dict()),
        predictor.size,
        predictor.crop,
        [Path(file.name).name for file in files],
    ]
    path = cache / "photos" / f"{name}-{hashlib.sha256(repr(known).encode()).hexdigest()[:12]}.safetensors"
    if path.exists():
        return load_file(path)["embeddings"]
    read = [predictor.read(file) for file in track(files, description=f"reading {name}")]
    parts = [read[start : start + 32] for start in range(0, len(read), 32)]
    batches = [predictor.represent(part).cpu() for part in track(parts, description=f"embedding {name}")]
    embeddings = torch.cat(batches).unflatten(0, (-1, IMAGES))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": embeddings}, path)
    return embeddings


def of_split(split: str, cache: Path) -> dict[str, list[ImageFile]]:
    """Return the photos of each class of a split of miniImageNet, 84x84 pixels."""
    data = make_data(compose("dataset=miniimagenet", f"cache_dir={cache}"))
    data.setup()
    positions, labels = data.bank.labelled(split)

    def read(position: int) -> bytes:
        content = io.BytesIO()
        Image.fromarray(data.bank.images[position].numpy()).save(content, "bmp")
        return content.getvalue()

    return {
        str(label): [ImageFile(str(i), partial(read, i)) for i in positions[labels == label].tolist()]
        for label in labels.unique().tolist()
    }


def of_folder(folder: Path) -> dict[str, list[ImageFile]]:
    """Return the photos of each class, named after the folder that contains them, at any depth and in any split."""
    found: dict[str, list[ImageFile]] = {}
    for name, file in list_folder(folder).items():
        found.setdefault(Path(name).parent.name, []).append(file)
    return found


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
    """Yield the rows of a set of classes; of few, half are in a draw, and the others are unseen."""
    way = min(WAY, len(embeddings) // 2)
    for shot in SHOTS:
        found: dict[str, list[Score]] = {}
        for draw in draws(embeddings, way, shot, count):
            for label, learn in CLASSIFIERS.items():
                found.setdefault(label, []).append(score(draw, learn(draw), learn is auto))
        scores = {label: 100 * np.array(values) for label, values in found.items()}
        accuracies = [values[:, 0] for values in scores.values()]
        cells = [name, str(way), str(shot), *map(_interval, accuracies), _interval(accuracies[-1] - accuracies[-2])]
        for column in (2, 3):  # calibration errors, areas
            cells.append(", ".join(f"{values[:, column].mean():.1f}" for values in scores.values()))
        yield f"| {' | '.join(cells)} |"


def study(name: str, embeddings: torch.Tensor, count: int) -> Iterator[str]:
    """Yield, for ways and shots, the best temperature of each classifier, and the scores of known queries.

    With one example a class, also the calibration error of ``auto``, with its own temperature and with others.
    """
    for way in (2, 5, 10):
        for shot in SHOTS:
            logits: dict[str, list[torch.Tensor]] = {}
            truths, scores = [], []
            for draw in draws(embeddings, way, shot, count):
                for classifier in TEMPERATURES:
                    answer = fit(classifier, draw.support, draw.labels, way)(draw.query)
                    logits.setdefault(classifier, []).append(answer.double())
                truths.append(draw.truth)
                scores.append(learn_familiarity(draw.support, draw.labels, way)(draw.query))
            truth, known = torch.cat(truths), torch.cat(scores)
            best = {}
            for classifier, answers in logits.items():
                both = torch.cat(answers)
                found = minimize_scalar(
                    lambda log, both=both, truth=truth: float(cross_entropy(both / np.exp(log), truth)),
                    bounds=(-6, 3),
                    method="bounded",
                )
                best[classifier] = f"{np.exp(found.x):.3f} ({classifier})"
            yield (
                f"{name}, way {way}, shot {shot}: best temperature {', '.join(best.values())}; familiarity of queries: "
                f"mean {known.mean():.2f}, standard deviation {known.std():.2f}, 5% below {known.quantile(0.05):.2f}"
            )
            if shot == 1:
                expected, errors = expected_temperature(DEFAULT, shot, way), []
                for factor in FACTORS:
                    shares = [(answers / expected / factor).softmax(1) for answers in logits[DEFAULT]]
                    errors.append(np.mean([calibration_error(*pair) for pair in zip(shares, truths, strict=True)]))
                yield (
                    f"    calibration error at {', '.join(map(str, FACTORS))} times the temperature of {expected:.3f}: "
                    f"{', '.join(f'{100 * error:.1f}' for error in errors)}"
                )


def _interval(values: NDArray[np.float64]) -> str:
    return f"{round(values.mean(), 1) + 0:.1f} ± {1.96 * values.std(ddof=1) / len(values) ** 0.5:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, or the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="the encoder: KEY=VALUE ... of fewshot predict")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--study", action="store_true")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/fewshot"), help="directory of the embeddings")
    parser.add_argument("--photos", action="append", default=[], metavar="NAME=DIR", help="another set, in folders")
    options = parser.parse_args(arguments)
    cache, predictor = options.cache.expanduser(), make_predictor(compose(*options.overrides, name="predict"))
    split = "val" if options.study else "test"
    sets = {"miniImageNet": embed(predictor, split, of_split(split, cache), cache)}
    for name, _, folder in (photos.partition("=") for photos in options.photos):
        sets[name] = embed(predictor, name, of_folder(Path(folder).expanduser()), cache)
    if options.study:
        for name, embeddings in sets.items():
            for line in study(name, embeddings, options.draws):
                say(line)
        return
    names = ["protonet, %", "scikit-learn, %", "auto, %", "difference", "calibration error of each", "AUROC of each"]
    say(f"| classes | way | shot | {' | '.join(names)} |")
    say("| --- " * 9 + "|")
    for name, embeddings in sets.items():
        for row in compare(name, embeddings, options.draws):
            say(row)


if __name__ == "__main__":
    try:
        main()
    except FewShotError as error:
        sys.exit(f"error: {error}")
