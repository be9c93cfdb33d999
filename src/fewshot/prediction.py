"""Classify your own images, given a folder of examples for each class."""

import csv
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.progress import track

from fewshot.checks import Count, Natural, Place, Rate, misfits, refuse
from fewshot.data.files import ImageFile, file_at, list_folder
from fewshot.data.folder import by_class
from fewshot.data.kinds import is_drawn, warn_of_mismatch
from fewshot.data.locate import splits_named
from fewshot.data.photos import Photo, read_ahead
from fewshot.data.twins import Known, are_twins, candidates, thumbnails
from fewshot.errors import FewShotError, shortened
from fewshot.files import atomic_writer, output_directory, write_atomically
from fewshot.learned import Learned, Pixels
from fewshot.metrics import largest
from fewshot.predictor import Predictor, arbitrary_alone, make_predictor
from fewshot.taught import load_taught
from fewshot.text import for_csv, for_figure, for_terminal, make_table, say
from fewshot.trained import FROM_CHECKPOINT, REPLACEABLE, choices_of

TYPES: dict[str, Any] = {"batch": Count, "sheet": Natural, "shown": Natural, "unknown": bool, "false_alarm": Rate}
TYPES["mirror"] = bool | None
TYPES |= dict.fromkeys(("checkpoint", "model", "support", "query", "out", "cache_dir"), Place | None)
NAMED = 5  # files left out that are named on the terminal; a file lists all of them
WARNED = 20  # near-duplicate pairs that are named, one per line


@dataclass(frozen=True)
class Prediction:
    """The answer to one query.

    Attributes:
        file: the query.
        label: the most probable class.
        probability: of that class, by the softmax over the classes of the support set. It compares these classes; it
            does not say whether the image shows any of them.
        runner_up: the second most probable class.
        familiarity: how like the classes the image is, see ``fewshot.familiarity``; None: not asked for.
        unknown: it is less like them than images of the classes are.
    """

    file: str
    label: str
    probability: float
    runner_up: str
    familiarity: float | None = None
    unknown: bool = False


def predict(config: DictConfig) -> None:
    """Classify the queries by the support set: write ``predictions.csv``, print the first, and draw a contact sheet.

    Files that cannot be read are named and left out. Queries are read in batches, so any number fits into memory.

    Args:
        config: the composed ``conf/predict.yaml``.

    Raises:
        FewShotError: the support set or the queries are missing; a class has no readable image; or no query is
            readable and outside of the support set.
    """
    refuse(misfits(config, TYPES))
    queries = _find_queries(config.query)
    left_out: list[str] = []  # why, for each file
    start = _start(config, left_out)
    predictor, learned = start.predictor, start.learned
    unread = len(left_out)
    limit = _limit(learned, config)
    out = output_directory(config.out, "predict")
    for line in start.lines:
        say(line)

    tally = _Tally()
    with atomic_writer(written := out / "predictions.csv") as file:
        table = csv.writer(file)
        table.writerow(
            ["file", "label", "probability", "runner-up", *(["familiarity", "unknown"] * (limit is not None))]
        )
        count = 1 if predictor.method.needs_all_queries else math.ceil(len(queries) / config.batch)
        reading = read_ahead(queries, predictor.read)
        for batch in track(np.array_split(np.arange(len(queries)), count), description="classifying", transient=True):
            readable = dict(_read_queries(islice(reading, len(batch)), start.known, left_out))
            if not readable:
                continue
            represented = learned.represent(list(readable.values()))
            if config.model is not None:  # its photos are not there to be compared
                readable, represented = _without_copies(readable, represented, learned, config.model, left_out)
                if not readable:
                    continue
            logits = learned.answer(represented)
            for pixels, prediction, best in zip(
                readable.values(),
                _answers(readable, logits, learned, represented, limit),
                largest(logits).tolist(),
                strict=True,
            ):
                table.writerow(map(for_csv, _cells(prediction)))
                tally.add(config, start, prediction, pixels, best)
        _list_left_out(left_out, out)
        if len(left_out) - unread == len(queries):
            raise FewShotError(f"there is no query left to classify; {out / 'left_out.txt'} says why each was left out")

    write_atomically(out / "classifier.json", json.dumps(start.record, indent=2).encode())
    classified = len(queries) - (len(left_out) - unread)
    _print(tally.shown, classified, learned)
    if limit is not None:
        rate = f"about {config.false_alarm:.0%} of the images of a class are, too"
        are = "is" if tally.unknown == 1 else "are"
        say(f"{tally.unknown:,} of {classified:,} queries {are} unlike every class; {rate}")
    if predictor.method.needs_all_queries and classified == 1:
        say(f"warning: {arbitrary_alone(predictor.method)}", error=True)
    elif predictor.method.needs_all_queries:
        say(
            f"{type(predictor.method).__name__} is transductive: each answer depends on all {classified:,} queries, "
            "and few queries, or queries of few classes, mislead it"
        )
    warn_of_mismatch(predictor.knows, tally.hand_drawn, "queries")
    _print_right(tally.right, tally.tied)
    _warn_of_copies(tally.copies, "which gives away its class")
    if left_out:
        say(f"files left out: {len(left_out):,}; {out / 'left_out.txt'} lists them with the reasons")
    say(written)
    if tally.drawn:
        say(contact_sheet(tally.drawn, out / "predictions.png", predictor.crop))


def contact_sheet(drawn: Sequence[tuple[Prediction, Pixels]], path: Path, crop: str, columns: int = 6) -> Path:
    """Draw queries as the network saw them, each with its answer and probability.

    Args:
        drawn: predictions, each with its pixels, uint8 ``[size, size, channels]``.
        path: of the picture.
        crop: what became of images that were not square; it is named.
        columns: at most so many queries side by side.

    Returns:
        The path.
    """
    columns, rows = min(columns, len(drawn)), math.ceil(len(drawn) / columns)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.6 * columns, 1.9 * rows), layout="constrained")
        figure.suptitle(f"crop={crop}", fontsize=8)
        for axes in figure.subplots(rows, columns, squeeze=False).flat:
            axes.set_axis_off()
        for axes, (prediction, pixels) in zip(figure.axes, drawn, strict=False):
            grey = pixels.shape[-1] == 1
            axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
            label = prediction.label if len(prediction.label) <= 20 else f"{prediction.label[:19]}…"
            axes.set_title(f"{for_figure(label)}\n{prediction.probability:.0%}", fontsize=8)
        figure.savefig(path, dpi=120)
    return path


def _list_left_out(left_out: Sequence[str], out: Path) -> None:
    if left_out:
        with atomic_writer(out / "left_out.txt") as lines:
            lines.writelines(f"{for_terminal(line)}\n" for line in left_out)


def find_support(place: str | None, least: int = 2) -> dict[str, list[ImageFile]]:
    """Find the image files of each class.

    Args:
        place: a folder with one folder per class.
        least: the smallest number of classes allowed.

    Raises:
        FewShotError: there is no such folder, a class is empty, or there are fewer than ``least`` classes.
    """
    if place is None or not Path(place).expanduser().is_dir():
        why = "there is no support set" if place is None else f"there is no folder {place}"
        raise FewShotError(f"{why}; name a folder that contains one folder of images per class: support=DIR")
    files = list_folder(Path(place).expanduser())
    classes = by_class(files)
    splits = splits_named(list(classes))
    if splits:
        names = [name for folders in splits.values() for name in folders]
        raise FewShotError(
            f"{place} contains the splits of a data set, {', '.join(names)}, instead of one folder per class; name one "
            f"of them: support={Path(place) / names[-1]}"
        )
    empty = [path for path in sorted(Path(place).expanduser().iterdir()) if path.is_dir() and path.name not in classes]
    empty = [path for path in empty if not path.name.startswith(".")]
    if empty:
        raise FewShotError(f"class {empty[0].name} has no image in {empty[0]}; add one, or remove the folder")
    if len(classes) < least:
        raise FewShotError(
            f"{place} has {len(classes)} folder{'s' * (len(classes) != 1)} with files, and at least "
            f"{'one class is' if least == 1 else 'two classes are'} needed: put the images of each class "
            "into a folder with its name"
        )
    inner = sorted({file.rpartition("/")[0] for file in files if file.count("/") > 1})
    if inner and not any(file.count("/") == 1 for file in files):
        instead = Path(place) / inner[0].partition("/")[0]
        say(
            f"the {len(classes)} classes are {shortened(list(classes))}, and the folders in them, such as {inner[0]}, "
            f"are parts of these; to tell those apart instead, choose support={instead}"
        )
    return classes


def _find_queries(place: str | None) -> list[ImageFile]:
    if place is None:
        raise FewShotError("there are no queries; name them with query=DIR, query=FILE or 'query=\"GLOB\"'")
    path = Path(place).expanduser()
    if path.is_dir():
        found = list(list_folder(path).values())
    else:
        paths = [path] if path.exists() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        found = [file_at(path) for path in paths if not path.is_dir()]
    if not found:
        raise FewShotError(f"there is nothing to classify in query={place}; name a folder, a file or a pattern")
    return found


def _class_of(file: str, place: str, classes: Container[str]) -> str | None:
    """The class that the nearest folder of a query is named after; None if there is no such folder.

    Args:
        file: path of the query.
        place: the ``query`` argument; folders above it do not count.
        classes: names of the classes.
    """
    path, root = Path(file), Path(place).expanduser()
    if not root.is_dir():
        fixed = list(takewhile(lambda part: not has_magic(part), root.parts))
        root = Path(*fixed) if len(fixed) < len(root.parts) else path.parent
    below = [folder.name for folder in path.parents if folder == root or root in folder.parents]
    return next((name for name in below if name in classes), None)


def _print_right(right: Mapping[bool, Sequence[float]], tied: int) -> None:
    """Print how many queries are right, with and without copies of support images, and how many are guesses."""
    if tied:
        say(
            f"warning: for {tied:,} of the queries, several classes have the same largest logit: their label is the "
            "first of these classes, and counts as a guess among them",
            error=True,
        )
    everything = [*right[False], *right[True]]
    if everything:
        total = f"{sum(everything):,.1f}".removesuffix(".0")  # with ties
        counted = f"{total} of the {len(everything):,} queries in folders named after a class are right"
        say(f"{counted}: {np.mean(everything):.2%}")
    if right[True] and right[False]:
        say(f"without the {len(right[True]):,} that look the same as a support image: {np.mean(right[False]):.2%}")


@dataclass
class _Tally:
    """What is said about the queries at the end."""

    shown: list[Prediction] = field(default_factory=list)
    drawn: list[tuple[Prediction, Pixels]] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    # For queries whose class is known: the credit for the answer, by whether the query is a copy.
    right: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    tied: int = 0
    unknown: int = 0
    hand_drawn: list[bool] = field(default_factory=list)

    def add(
        self, config: DictConfig, start: "_Start", prediction: Prediction, pixels: Pixels, best: Sequence[bool]
    ) -> None:
        name, classes = prediction.file, start.learned.classes
        self.shown += [prediction] if len(self.shown) < config.shown else []
        self.drawn += [(prediction, pixels)] if len(self.drawn) < config.sheet else []
        copied = start.twins.find(pixels) if start.twins is not None else None
        if copied is not None:
            self.copies.append(f"{name} looks the same as {start.names[copied]} in the support set")
        self.tied += sum(best) > 1
        self.unknown += prediction.unknown
        self.hand_drawn.append(is_drawn(pixels))
        credit = dict(zip(classes, best, strict=True)).get(_class_of(name, config.query, classes) or "")
        self.right[copied is not None] += [] if credit is None else [credit / sum(best)]


@dataclass(frozen=True)
class _Start:
    """What is there before the queries: from a support set, or from a file without its photos."""

    predictor: Predictor
    learned: Learned
    lines: Sequence[str]  # for the user
    record: Mapping[str, Any]
    names: Sequence[str] = ()  # of the examples
    known: Mapping[bytes, ImageFile] = field(default_factory=dict)
    twins: Known | None = None


def _start(config: DictConfig, left_out: list[str]) -> _Start:
    if config.model is not None:
        decided = choices_of(config.overrides, (*FROM_CHECKPOINT, *REPLACEABLE, "checkpoint", "support", "mirror"))
        if decided:
            raise FewShotError(f"{decided[0]}: model={config.model} decides that; remove one of them")
        crop = None if config.crop == "auto" else config.crop
        taught = load_taught(config.model, config.hardware, config.trust, crop)
        figures = taught.summary.get("leave_one_out")
        lines = [
            f"{len(taught.learned.labels):,} examples of {len(taught.learned.classes)} classes, from {config.model}"
        ]
        if isinstance(figures, dict) and isinstance(figures.get("accuracy"), float):
            lines.append(f"accuracy on held-out examples when it was taught: {figures['accuracy']:.1%}")
        return _Start(taught.predictor, taught.learned, lines, taught.summary)
    examples = find_support(config.support)
    predictor = make_predictor(config)
    support, known, files = read_support(examples, predictor.read, left_out)
    warn_of_mismatch(
        predictor.knows, [is_drawn(pixels) for images in support.values() for pixels in images], "examples"
    )
    learned, names = predictor.learn(support), [file.name for file in files]
    twins = Known([pixels for images in support.values() for pixels in images])
    return _Start(predictor, learned, list(learned.describe(names)), learned.record(names), names, known, twins)


def _without_copies(
    readable: dict[str, Pixels], represented: torch.Tensor, learned: Learned, model: str, left_out: list[str]
) -> tuple[dict[str, Pixels], torch.Tensor]:
    """Leave out queries that are examples in a taught file."""
    copies = learned.copies(represented)
    for name, copy_of in zip(readable, copies, strict=True):
        if copy_of is not None:
            label = learned.classes[learned.labels[copy_of]]
            _leave_out(FewShotError(f"{name} is an example of {label} in {model}"), left_out)
    new = [number for number, copy_of in enumerate(copies) if copy_of is None]
    names = list(readable)
    return {names[number]: readable[names[number]] for number in new}, represented[new]


def _limit(learned: Learned, config: DictConfig) -> float | None:
    """The familiarity below which a query is unknown; None: nobody asked."""
    if not config.unknown:
        return None
    if learned.familiarity is None:
        raise FewShotError("unknown=true needs a method that compares embeddings; choose another one: method=auto")
    return learned.familiarity.threshold(config.false_alarm)


def _warn_of_copies(pairs: Sequence[str], consequence: str) -> None:
    for pair in pairs[:WARNED]:
        say(f"warning: {pair} (perhaps recompressed, resized or mirrored), {consequence}", error=True)
    if len(pairs) > WARNED:
        say(f"warning: and {len(pairs) - WARNED:,} more such pairs", error=True)


def read_support(
    examples: Mapping[str, Sequence[ImageFile]], read: Callable[[ImageFile], Pixels], left_out: list[str]
) -> tuple[dict[str, list[Pixels]], dict[bytes, ImageFile], list[ImageFile]]:
    """Read the images of each class; also return each file by the hash of its bytes, and the files in order."""
    support: dict[str, list[Pixels]] = {}
    known: dict[bytes, ImageFile] = {}
    read_files: list[ImageFile] = []
    class_of: dict[bytes, str] = {}
    digests: list[bytes] = []
    labelled = [(name, file) for name, files in examples.items() for file in files]
    reading = read_ahead((file for _, file in labelled), read)
    for (name, file), (_, photo) in zip(labelled, reading, strict=True):
        support.setdefault(name, [])
        if isinstance(photo, FewShotError):
            _leave_out(photo, left_out)
            continue
        if class_of.setdefault(photo.digest, name) != name:
            again = known[photo.digest].name
            consequence = "of a different class, so they cannot be distinguished"
            say(f"warning: {file.name} is the same image as {again} {consequence}", error=True)
        known.setdefault(photo.digest, file)
        support[name].append(photo.pixels)
        read_files.append(file)
        digests.append(photo.digest)
    for name, images in support.items():
        if not images:
            raise FewShotError(f"class {name} has no readable image in {Path(examples[name][0].name).parent}; add one")
    _warn_of_twins(support, read_files, digests)
    return support, known, read_files


def _warn_of_twins(
    support: Mapping[str, Sequence[Pixels]], files: Sequence[ImageFile], digests: Sequence[bytes]
) -> None:
    """Name near-duplicate images, and images with equal pixels, but not equal files in two classes once more."""
    images = [(name, pixels) for name, examples in support.items() for pixels in examples]
    apart: list[str] = []
    together: list[str] = []
    for one, other, mirror in candidates(thumbnails(np.stack([pixels for _, pixels in images]))):
        (first, pixels), (second, others) = images[one], images[other]
        if (first == second or digests[one] != digests[other]) and are_twins(pixels, others, mirror):
            pair = f"{files[other].name} of the class {second} looks the same as {files[one].name}"
            (together if first == second else apart).append(pair + ("" if first == second else f" of {first}"))
    _warn_of_copies(list(dict.fromkeys(apart)), "so they cannot be distinguished")
    too_high = "so it adds nothing, and the accuracy on held-out examples is too high"
    _warn_of_copies(list(dict.fromkeys(together)), too_high)


def _read_queries(
    reading: Iterable[tuple[ImageFile, Photo | FewShotError]], known: Mapping[bytes, ImageFile], left_out: list[str]
) -> Iterator[tuple[str, Pixels]]:
    for file, photo in reading:
        if isinstance(photo, FewShotError):
            _leave_out(photo, left_out)
        elif photo.digest in known:
            same = known[photo.digest].name
            _leave_out(
                FewShotError(f"{file.name} is in the support set{f', as {same}' * (same != file.name)}"), left_out
            )
        else:
            yield file.name, photo.pixels


def _cells(prediction: Prediction) -> list[str]:
    cells = [prediction.file, prediction.label, f"{prediction.probability:.4f}", prediction.runner_up]
    if prediction.familiarity is not None:
        cells += [f"{prediction.familiarity:.4f}", "yes" if prediction.unknown else "no"]
    return cells


def _answers(
    names: Iterable[str], logits: torch.Tensor, learned: Learned, represented: torch.Tensor, limit: float | None
) -> Iterator[Prediction]:
    # Probabilities that underflow are equal, so the logits decide.
    ranks = logits.argsort(dim=1, descending=True, stable=True)[:, :2]
    probabilities = logits.softmax(dim=1).gather(1, ranks[:, :1])
    scores: list[float | None] = [None] * len(logits)
    if limit is not None and learned.familiarity is not None:
        scores = learned.familiarity(represented).tolist()
    for name, (probability,), (first, second), score in zip(
        names, probabilities.tolist(), ranks.tolist(), scores, strict=True
    ):
        unknown = score is not None and limit is not None and score < limit
        yield Prediction(name, learned.classes[first], probability, learned.classes[second], score, unknown)


def _leave_out(why: FewShotError, left_out: list[str]) -> None:
    left_out.append(str(why))
    if len(left_out) <= NAMED:
        say(f"left out: {why}", error=True)


def _print(shown: Sequence[Prediction], queries: int, learned: Learned) -> None:
    shots = learned.labels.bincount().unique().tolist()
    images = f"{shots[0]} to {shots[-1]} images" if len(shots) > 1 else f"{shots[0]} image{'s' * (shots[0] > 1)}"
    rows = [
        (
            Path(answer.file).name,
            f"none of these ({answer.label}?)" if answer.unknown else answer.label,
            f"{answer.probability:.1%}",
            answer.runner_up,
        )
        for answer in shown
    ]
    if shown:
        title = (
            f"{queries:,} {'query' if queries == 1 else 'queries'}, {len(learned.classes)} classes with {images} each"
        )
        say(make_table(title, ["file", "label", "probability", "runner-up"], rows, numbers=("probability",)))
    if len(shown) < queries:
        say(f"... and {queries - len(shown):,} more:")
