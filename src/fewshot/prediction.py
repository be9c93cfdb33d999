"""Classify your own images, given a folder of examples for each class."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from hydra.utils import get_object
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.progress import track

from fewshot.data.bank import has_bright_ink
from fewshot.data.files import ImageFile, file_at, list_folder
from fewshot.data.folder import by_class
from fewshot.data.images import normalise
from fewshot.data.locate import splits_named
from fewshot.data.photos import CROPS, Photo, read_ahead, read_photo
from fewshot.data.twins import Known, are_twins, candidates, thumbnails
from fewshot.embeddings import EMBEDDED_TOGETHER
from fewshot.errors import FewShotError, shortened
from fewshot.files import atomic_writer, output_directory, write_atomically
from fewshot.hardware import check_hardware, precision_of
from fewshot.learned import Learned, Pixels
from fewshot.methods.auto import Linear
from fewshot.methods.base import Classifier, FewShotMethod, MetricMethod, require_finite
from fewshot.metrics import largest
from fewshot.text import for_csv, for_figure, for_terminal, make_table, say
from fewshot.trained import load_trained, make_untrained, with_chosen_method

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
    """

    file: str
    label: str
    probability: float
    runner_up: str


class Predictor:
    """Applies a method to images from files.

    Args:
        method: trained, or a method that needs no training.
        dataset: ``size``, ``channels`` and ``normalise`` of the images that its encoder takes.
        ink: it was trained on bright letters on black, see ``read_photo``.
        hardware: the group of that name; one device is used.
        crop: what becomes of images that are not square, see ``fewshot.data.photos.prepare``.

    Raises:
        FewShotError: ``hardware`` requests more than one device, or ``crop`` is unknown.
    """

    def __init__(
        self, method: FewShotMethod, dataset: DictConfig, ink: bool, hardware: DictConfig, crop: str = "auto"
    ) -> None:
        if crop not in CROPS:
            raise FewShotError(f"crop={crop} is unknown: choose {', '.join(CROPS)}")
        if hardware.devices not in (1, "auto"):
            raise FewShotError(f"hardware.devices={hardware.devices}: predictions are made on one, hardware.devices=1")
        self.size, self.channels, self.kind, self.ink = dataset.size, dataset.channels, dataset.normalise, ink
        self.crop = ("pad" if ink else "center") if crop == "auto" else crop
        check_hardware(hardware)
        precision: Any = precision_of(hardware)
        self._fabric = Fabric(accelerator=hardware.accelerator, devices=1, precision=precision)
        require_finite(method, "the network")
        self.method = method.eval().to(self._fabric.device)
        if precision.startswith("64"):
            self.method.double()

    def read(self, file: ImageFile) -> Pixels:
        """Read an image as the network sees it: uint8 ``[size, size, channels]``; see ``read_photo``."""
        return read_photo(file, self.size, self.channels, self.ink, self.crop, reduced=True)

    def learn(self, support: Mapping[str, Sequence[Pixels]]) -> Learned:
        """Learn classes from examples.

        Args:
            support: the images of each class, by its name, as returned by ``read``; at least one per class.

        Raises:
            FewShotError: there are fewer than two classes, or one is empty.
        """
        if len(support) < 2 or not all(support.values()):
            raise FewShotError("a support set needs at least two classes, and at least one image of each")
        labels = torch.arange(len(support)).repeat_interleave(
            torch.tensor([len(examples) for examples in support.values()])
        )
        images = [image for examples in support.values() for image in examples]
        return self.learn_examples(tuple(support), self.represent(images), labels)

    def learn_examples(self, classes: tuple[Any, ...], examples: torch.Tensor, labels: torch.Tensor) -> Learned:
        """Learn classes from what ``represent`` returns; see ``Learned``."""
        # Full context embeddings read the support set as a sequence, and were trained on shuffled ones.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        classify = self._learn(examples[order], labels[order], len(classes))
        if isinstance(classify, Linear) and classify.held_out is not None:
            in_order = classify.held_out._replace(index=order[classify.held_out.index], labels=labels)
            classify = classify._replace(held_out=in_order)
        alone = isinstance(self.method, MetricMethod) and not self.method.transductive
        return Learned(classes, examples, labels, self.represent, classify, self._learn if alone else None)

    def represent(self, images: Sequence[Pixels]) -> torch.Tensor:
        """Embed images if the method compares embeddings, ``[images, ...]``; else return them, uint8, on the CPU."""
        pixels = torch.from_numpy(np.stack(images))
        if not isinstance(self.method, MetricMethod):
            return pixels
        with torch.no_grad(), self._fabric.autocast():
            return torch.cat([self.method.embed_images(self._input(part)) for part in pixels.split(EMBEDDED_TOGETHER)])

    def _learn(self, examples: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        labels, method = labels.to(self._fabric.device), self.method
        with torch.no_grad(), self._fabric.autocast():
            if not isinstance(method, MetricMethod):
                adapted = method.classifier(self._input(examples), labels, way)
                return self._without_gradients(lambda images: adapted(self._input(images)))
            learned = method.learn(examples, labels, way)
            return learned if isinstance(learned, Linear) else self._without_gradients(learned)

    def _without_gradients(self, classify: Classifier) -> Classifier:
        def answer(queries: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), self._fabric.autocast():
                return classify(queries)

        return answer

    def _input(self, pixels: torch.Tensor) -> torch.Tensor:
        return normalise(pixels.to(self._fabric.device), self.kind).to(self.method.dtype)


def make_predictor(config: DictConfig) -> Predictor:
    """Make the predictor that ``conf/predict.yaml`` describes, from a checkpoint or a method that needs no training.

    Raises:
        FewShotError: the checkpoint is broken, or does not go with the chosen method or groups, see
            ``with_chosen_method``; or without a checkpoint, there are untrained weights.
    """
    if config.checkpoint is not None:
        trained = with_chosen_method(load_trained(config.checkpoint, trust=config.trust), config.overrides)
        ink = has_bright_ink(get_object(trained.config.dataset.source._target_))
        return Predictor(trained.method, trained.config.dataset, ink, config.hardware, config.crop)
    method = make_untrained(config.method, "this method or its encoder")
    return Predictor(method, config.dataset, ink=False, hardware=config.hardware, crop=config.crop)


def predict(config: DictConfig) -> None:
    """Classify the queries by the support set: write ``predictions.csv``, print the first, and draw a contact sheet.

    Files that cannot be read are named and left out. Queries are read in batches, so any number fits into memory.

    Args:
        config: the composed ``conf/predict.yaml``.

    Raises:
        FewShotError: the support set or the queries are missing; a class has no readable image; or no query is
            readable and outside of the support set.
    """
    _check_numbers(config)
    examples, queries = _find_support(config.support), _find_queries(config.query)
    predictor = make_predictor(config)
    left_out: list[str] = []  # why, for each file
    support, known, files = _read_support(examples, predictor.read, left_out)
    unread = len(left_out)
    learned, classes = predictor.learn(support), list(support)
    twins = Known([pixels for images in support.values() for pixels in images])
    out = output_directory(config.out, "predict")
    _explain(learned, [file.name for file in files], out)

    shown: list[Prediction] = []
    drawn: list[tuple[Prediction, Pixels]] = []
    copies: list[str] = []
    tied = 0
    # For queries whose class is known: the credit for the answer, by whether the query is a copy.
    right: dict[bool, list[float]] = {False: [], True: []}
    with atomic_writer(written := out / "predictions.csv") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "probability", "runner-up"])
        # A transductive method answers all queries together.
        count = 1 if predictor.method.transductive else math.ceil(len(queries) / config.batch)
        reading = read_ahead(queries, predictor.read)
        for batch in track(np.array_split(np.arange(len(queries)), count), description="classifying", transient=True):
            readable = dict(_read_queries(islice(reading, len(batch)), known, left_out))
            if not readable:
                continue
            logits = learned(list(readable.values()))
            for (name, pixels), prediction, best in zip(
                readable.items(), _answers(readable, logits, classes), largest(logits).tolist(), strict=True
            ):
                cells = (name, prediction.label, f"{prediction.probability:.4f}", prediction.runner_up)
                table.writerow(map(for_csv, cells))
                shown += [prediction] if len(shown) < config.shown else []
                drawn += [(prediction, pixels)] if len(drawn) < config.sheet else []
                copied = twins.find(pixels)
                if copied is not None:
                    copies.append(f"{name} looks the same as {files[copied].name} in the support set")
                tied += sum(best) > 1
                credit = dict(zip(classes, best, strict=True)).get(_class_of(name, config.query, support) or "")
                right[copied is not None] += [] if credit is None else [credit / sum(best)]
        _list_left_out(left_out, out)
        if len(left_out) - unread == len(queries):
            raise FewShotError(f"there is no query left to classify; {out / 'left_out.txt'} says why each was left out")

    classified = len(queries) - (len(left_out) - unread)
    _print(shown, classified, support)
    if predictor.method.transductive:
        say(_few_queries(type(predictor.method).__name__, classified))
    _print_right(right, tied)
    _warn_of_copies(copies, "which gives away its class")
    if left_out:
        say(f"{len(left_out):,} files were left out; {out / 'left_out.txt'} lists them with the reasons")
    say(written)
    if drawn:
        say(contact_sheet(drawn, out / "predictions.png", predictor.crop))


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


def _check_numbers(config: DictConfig) -> None:
    for key, least in (("batch", 1), ("sheet", 0), ("shown", 0)):
        if not isinstance(config[key], int) or config[key] < least:
            raise FewShotError(f"{key}={config[key]} must be a whole number of at least {least}")


def _find_support(place: str | None) -> dict[str, list[ImageFile]]:
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
    if len(classes) < 2:
        raise FewShotError(
            f"{place} has {len(classes)} folder{'s' * (len(classes) != 1)} with files, and at least two classes are "
            "needed: put the images of each class into a folder with its name"
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


def _few_queries(method: str, queries: int) -> str:
    """Say what the number of queries means to a transductive method."""
    if queries == 1:
        return (
            f"warning: {method} is transductive: it compares queries with each other, so the answer to a single one "
            "can be arbitrary; classify more together, or choose a method such as method=protonet"
        )
    return (
        f"{method} is transductive: each answer depends on all {queries:,} queries, and few queries, or queries of few "
        "classes, mislead it"
    )


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


def _check_numbers(config: DictConfig) -> None:
    for key, least in (("batch", 1), ("sheet", 0), ("shown", 0)):
        if not isinstance(config[key], int) or config[key] < least:
            raise FewShotError(f"{key}={config[key]} must be a whole number of at least {least}")


def _explain(learned: Learned, names: Sequence[str], out: Path) -> None:
    """Print how good the classifier will be, and record it in ``classifier.json``."""
    for line in learned.describe(names):
        say(line)
    write_atomically(out / "classifier.json", json.dumps(learned.record(names), indent=2).encode())


def _warn_of_copies(pairs: Sequence[str], consequence: str) -> None:
    for pair in pairs[:WARNED]:
        say(f"warning: {pair} (perhaps recompressed, resized or mirrored), {consequence}", error=True)
    if len(pairs) > WARNED:
        say(f"warning: and {len(pairs) - WARNED:,} more such pairs", error=True)


def _read_support(
    examples: Mapping[str, Sequence[ImageFile]], read: Callable[[ImageFile], Pixels], left_out: list[str]
) -> tuple[dict[str, list[Pixels]], dict[bytes, ImageFile], list[ImageFile]]:
    """Read the images of each class; also return each file by the hash of its bytes, and the files in order."""
    support: dict[str, list[Pixels]] = {}
    known: dict[bytes, ImageFile] = {}
    read_files: list[ImageFile] = []
    class_of: dict[bytes, str] = {}
    labelled = [(name, file) for name, files in examples.items() for file in files]
    reading = read_ahead((file for _, file in labelled), read)
    for (name, file), (_, photo) in zip(labelled, reading, strict=True):
        support.setdefault(name, [])
        if isinstance(photo, FewShotError):
            _leave_out(photo, left_out)
            continue
        if class_of.setdefault(photo.digest, name) != name:
            again = known[photo.digest].name
            say(f"warning: {file.name} is the same image as {again} of a different class", error=True)
        known.setdefault(photo.digest, file)
        support[name].append(photo.pixels)
        read_files.append(file)
    for name, images in support.items():
        if not images:
            raise FewShotError(f"class {name} has no readable image in {Path(examples[name][0].name).parent}; add one")
    _warn_of_twins(support, read_files)
    return support, known, read_files


def _warn_of_twins(support: Mapping[str, Sequence[Pixels]], files: Sequence[ImageFile]) -> None:
    """Name near-duplicate images, and images with equal pixels."""
    images = [(name, pixels) for name, examples in support.items() for pixels in examples]
    apart, together = [], []
    for one, other, mirror in candidates(thumbnails(np.stack([pixels for _, pixels in images]))):
        (first, pixels), (second, others) = images[one], images[other]
        if are_twins(pixels, others, mirror):
            pair = f"{files[other].name} of the class {second} looks the same as {files[one].name}"
            (together if first == second else apart).append(pair + ("" if first == second else f" of {first}"))
    _warn_of_copies(list(dict.fromkeys(apart)), "so they cannot be told apart")
    _warn_of_copies(list(dict.fromkeys(together)), "so it adds nothing, and the leave-one-out accuracy is too high")


def _read_queries(
    reading: Iterable[tuple[ImageFile, Photo | FewShotError]], known: Mapping[bytes, ImageFile], left_out: list[str]
) -> Iterator[tuple[str, Pixels]]:
    for file, photo in reading:
        if isinstance(photo, FewShotError):
            _leave_out(photo, left_out)
        elif photo.digest in known:
            _leave_out(FewShotError(f"{file.name} is in the support set, as {known[photo.digest].name}"), left_out)
        else:
            yield file.name, photo.pixels


def _answers(names: Mapping[str, Pixels], logits: torch.Tensor, classes: Sequence[str]) -> Iterator[Prediction]:
    top = logits.softmax(dim=1).topk(2)
    for name, (probability, _), (first, second) in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
        yield Prediction(name, classes[first], probability, classes[second])


def _leave_out(why: FewShotError, left_out: list[str]) -> None:
    left_out.append(str(why))
    if len(left_out) <= NAMED:
        say(f"left out: {why}", error=True)


def _print(shown: Sequence[Prediction], queries: int, support: Mapping[str, Sequence[Pixels]]) -> None:
    shots = Counter(map(len, support.values()))
    images = f"{min(shots)} to {max(shots)} images" if len(shots) > 1 else f"{min(shots)} image{'s' * (min(shots) > 1)}"
    rows = [(Path(answer.file).name, answer.label, f"{answer.probability:.1%}", answer.runner_up) for answer in shown]
    if shown:
        title = f"{queries:,} queries, {len(support)} classes with {images} each"
        say(make_table(title, ["file", "label", "probability", "runner-up"], rows, numbers=("probability",)))
    if len(shown) < queries:
        say(f"... and {queries - len(shown):,} more:")
