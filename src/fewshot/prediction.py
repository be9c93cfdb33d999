"""Classify images of one's own: a folder of examples a class, and a method that needs no more than those."""

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from hydra.utils import get_object
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import DictConfig
from rich.progress import track

from fewshot.data.bank import has_bright_ink
from fewshot.data.files import ImageFile, list_folder
from fewshot.data.folder import by_class
from fewshot.data.images import normalise
from fewshot.data.locate import splits_named
from fewshot.data.photos import read_photo
from fewshot.data.twins import Known, are_twins, candidates, thumbnails
from fewshot.errors import FewShotError
from fewshot.files import atomic_writer, output_directory
from fewshot.hardware import check_hardware, precision_of
from fewshot.methods.base import FewShotMethod, require_finite
from fewshot.text import for_csv, for_figure, make_table, say
from fewshot.trained import load_trained, make_untrained, with_chosen_method

WARNED = 20  # pairs of images that are nearly the same, each by a line
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """The answer to one query.

    Attributes:
        file: the query.
        label: the most probable class.
        probability: its, by the softmax over the classes of the support set. It tells how much likelier this class is
            than the others of the set, not whether the image shows any of them.
        runner_up: the second.
    """

    file: str
    label: str
    probability: float
    runner_up: str


class Predictor:
    """A method, with what it takes to show it images of one's own.

    Args:
        method: trained, or one that needs no training.
        dataset: the ``size``, ``channels`` and ``normalise`` of the images that its encoder takes.
        ink: it knows letters that are bright on black, see ``read_photo``.
        hardware: the group of that name; one device is used.

    Raises:
        FewShotError: more than one device is asked for.
    """

    def __init__(self, method: FewShotMethod, dataset: DictConfig, ink: bool, hardware: DictConfig) -> None:
        if hardware.devices not in (1, "auto"):
            raise FewShotError(f"hardware.devices={hardware.devices}: predictions are made on one, hardware.devices=1")
        self.size, self.channels, self.kind, self.ink = dataset.size, dataset.channels, dataset.normalise, ink
        check_hardware(hardware)
        precision: Any = precision_of(hardware)
        self._fabric = Fabric(accelerator=hardware.accelerator, devices=1, precision=precision)
        require_finite(method, "the network")
        self.method = method.eval().to(self._fabric.device)
        if precision.startswith("64"):
            self.method.double()

    def read(self, file: ImageFile) -> Pixels:
        """An image as the network is to see it: uint8 ``[size, size, channels]``; see ``read_photo``."""
        return read_photo(file, self.size, self.channels, self.ink)

    def learn(self, support: Mapping[str, Sequence[Pixels]]) -> Callable[[Sequence[Pixels]], torch.Tensor]:
        """Learn some classes from examples.

        Args:
            support: the images of each class, by its name, as ``read`` gives them; at least one each.

        Returns:
            A function of such images, at least one, to logits ``[images, way]`` on the CPU, the classes in the order
            of ``support``; their softmax is the probabilities.

        Raises:
            FewShotError: there are fewer than two classes, or one is empty; from the function: a logit is not finite.
        """
        if len(support) < 2 or not all(support.values()):
            raise FewShotError("a support set needs two classes or more, and an image or more of each")
        labels = torch.arange(len(support)).repeat_interleave(torch.tensor([len(of) for of in support.values()]))
        # Full context embeddings read the support as a sequence, and were trained on shuffled ones.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images = self._input([image for of in support.values() for image in of])
        with torch.no_grad(), self._fabric.autocast():
            classify = self.method.classifier(images[order], labels[order].to(images.device), len(support))

        def answer(queries: Sequence[Pixels]) -> torch.Tensor:
            with torch.no_grad(), self._fabric.autocast():
                logits = classify(self._input(queries)).float().cpu()
            if not logits.isfinite().all():
                raise FewShotError(
                    "the network's logits for these images are not finite (NaN or infinite), so there is no answer; "
                    "choose hardware.precision=32-true, or another checkpoint"
                )
            return logits

        return answer

    def _input(self, images: Sequence[Pixels]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(images)).to(self._fabric.device)
        return normalise(pixels, self.kind).to(self.method.dtype)


def make_predictor(config: DictConfig) -> Predictor:
    """Make the predictor that ``conf/predict.yaml`` describes, from a checkpoint or a method that needs no training.

    Raises:
        FewShotError: the checkpoint is broken, or does not go with the chosen method or groups, see
            ``with_chosen_method``; or without a checkpoint, there are untrained weights.
    """
    if config.checkpoint is not None:
        trained = with_chosen_method(load_trained(config.checkpoint, trust=config.trust), config.overrides)
        ink = has_bright_ink(get_object(trained.config.dataset.source._target_))
        return Predictor(trained.method, trained.config.dataset, ink, config.hardware)
    method = make_untrained(config.method, "this method or its encoder")
    return Predictor(method, config.dataset, ink=False, hardware=config.hardware)


def predict(config: DictConfig) -> None:
    """Classify the queries by the support set; write ``predictions.csv``, print the first, draw a sheet if asked.

    Files that cannot be read are named, and the others go on. The queries are read a batch at a time, so any number
    of them fits into memory.

    Args:
        config: the composed ``conf/predict.yaml``.

    Raises:
        FewShotError: the support set or the queries are not there; a class has no image that can be read; no query can
            be read, or all are in the support set.
    """
    for key in ("batch", "sheet", "shown"):
        least = 1 if key == "batch" else 0
        if not isinstance(config[key], int) or config[key] < least:
            raise FewShotError(f"{key}={config[key]} must be a whole number of at least {least}")
    examples, queries = _find_support(config.support), _find_queries(config.query)
    predictor = make_predictor(config)
    support, known, files = _read_support(examples, predictor.read)
    classify, classes = predictor.learn(support), list(support)
    twins = Known([pixels for of in support.values() for pixels in of])
    out = output_directory(config.out, "predict")

    shown: list[Prediction] = []
    drawn: list[tuple[Prediction, Pixels]] = []
    copies: list[str] = []
    right: dict[bool, list[bool]] = {False: [], True: []}  # of each query whose class is known, by whether it is a copy
    left_out = 0
    with atomic_writer(written := out / "predictions.csv") as file:
        table = csv.writer(file)
        table.writerow(["file", "label", "probability", "runner-up"])
        batches = np.array_split(np.arange(len(queries)), math.ceil(len(queries) / config.batch))
        for batch in track(batches, description="classifying", transient=True):
            readable = dict(_read_queries([queries[number] for number in batch], predictor.read, known))
            left_out += len(batch) - len(readable)
            if not readable:
                continue
            logits = classify(list(readable.values()))
            for (name, pixels), prediction in zip(readable.items(), _answers(readable, logits, classes), strict=True):
                cells = (name, prediction.label, f"{prediction.probability:.4f}", prediction.runner_up)
                table.writerow(map(for_csv, cells))
                shown += [prediction] if len(shown) < config.shown else []
                drawn += [(prediction, pixels)] if len(drawn) < config.sheet else []
                copied = twins.find(pixels)
                if copied is not None:
                    copies.append(f"{name} looks the same as {files[copied].name} of the support set")
                truth = _class_of(name, config.query, support)
                right[copied is not None] += [prediction.label == truth] if truth is not None else []
        if left_out == len(queries):
            raise FewShotError("no query is left to classify: see the lines above for why each was left out")

    _tell(shown, len(queries) - left_out, support)
    _tell_right(right)
    _warn_of_copies(copies, "so that its class is given away")
    if left_out:
        say(f"{left_out:,} left out, for the reasons above")
    say(written)
    if drawn:
        say(contact_sheet(drawn, out / "predictions.png"))


def contact_sheet(drawn: Sequence[tuple[Prediction, Pixels]], path: Path, columns: int = 6) -> Path:
    """Draw queries as the network saw them, each with its answer and that answer's probability.

    Args:
        drawn: predictions, each with its pixels, uint8 ``[size, size, channels]``.
        path: of the picture.
        columns: pictures side by side.

    Returns:
        The path.
    """
    columns, rows = min(columns, len(drawn)), math.ceil(len(drawn) / columns)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.6 * columns, 1.9 * rows), layout="constrained")
        for axes in figure.subplots(rows, columns, squeeze=False).flat:
            axes.set_axis_off()
        for axes, (prediction, pixels) in zip(figure.axes, drawn, strict=False):
            grey = pixels.shape[-1] == 1
            axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
            label = prediction.label if len(prediction.label) <= 20 else f"{prediction.label[:19]}…"
            axes.set_title(f"{for_figure(label)}\n{prediction.probability:.0%}", fontsize=8)
        figure.savefig(path, dpi=120)
    return path


def _find_support(place: str | None) -> dict[str, list[ImageFile]]:
    if place is None or not Path(place).expanduser().is_dir():
        why = "no support set is named" if place is None else f"there is no folder {place}"
        raise FewShotError(f"{why}; name one that holds a folder a class, with images in each: support=DIR")
    classes = by_class(list_folder(Path(place).expanduser()))
    splits = splits_named(list(classes))
    if splits:
        names = [name for of in splits.values() for name in of]
        raise FewShotError(
            f"{place} holds the splits of a data set, {', '.join(names)}, and no folder a class; name one of them: "
            f"support={Path(place) / names[-1]}"
        )
    if len(classes) < 2:
        raise FewShotError(
            f"{place} holds {len(classes)} folders with files in them, and two classes or more are needed: put the "
            "images of each class into a folder of its name"
        )
    return classes


def _find_queries(place: str | None) -> list[ImageFile]:
    if place is None:
        raise FewShotError("no queries are named; name them by query=DIR, query=FILE or 'query=\"GLOB\"'")
    path = Path(place).expanduser()
    if path.is_dir():
        found = list(list_folder(path).values())
    else:
        paths = [path] if path.exists() else sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
        found = [ImageFile(str(of), of.read_bytes) for of in paths if not of.is_dir()]
    if not found:
        raise FewShotError(f"there is nothing to classify in query={place}; name a folder, a file or a pattern")
    return found


def _class_of(file: str, place: str, classes: Container[str]) -> str | None:
    """The class of a query that lies in a folder of its name, or in a folder of that; None where it does not.

    Args:
        file: the query's path.
        place: where the queries are looked for; folders above it say nothing.
        classes: their names.
    """
    path, root = Path(file), Path(place).expanduser()
    if not root.is_dir():
        fixed = list(takewhile(lambda part: not has_magic(part), root.parts))
        root = Path(*fixed) if len(fixed) < len(root.parts) else path.parent
    below = [folder.name for folder in path.parents if folder == root or root in folder.parents]
    return next((name for name in below if name in classes), None)


def _tell_right(right: Mapping[bool, Sequence[bool]]) -> None:
    """How many queries are right, and how many without the copies of support images."""
    of_all = [*right[False], *right[True]]
    if of_all:
        counted = f"{sum(of_all):,} of the {len(of_all):,} queries in folders named after a class are right"
        say(f"{counted}: {np.mean(of_all):.2%}")
    if right[True] and right[False]:
        say(f"without the {len(right[True]):,} that look the same as a support image: {np.mean(right[False]):.2%}")


def _warn_of_copies(pairs: Sequence[str], consequence: str) -> None:
    for pair in pairs[:WARNED]:
        say(f"warning: {pair} (recompressed, resized or mirrored, say), {consequence}", error=True)
    if len(pairs) > WARNED:
        say(f"warning: and {len(pairs) - WARNED:,} more such pairs", error=True)


def _read_support(
    examples: Mapping[str, Sequence[ImageFile]], read: Callable[[ImageFile], Pixels]
) -> tuple[dict[str, list[Pixels]], dict[bytes, ImageFile], list[ImageFile]]:
    """The images of each class; each file by the hash of its bytes; and the files in the order of the images."""
    support: dict[str, list[Pixels]] = {}
    known: dict[bytes, ImageFile] = {}
    read_files: list[ImageFile] = []
    class_of: dict[bytes, str] = {}
    for name, files in examples.items():
        support[name] = []
        for file in files:
            try:
                digest, pixels = _read(file, read)
            except FewShotError as error:
                _leave_out(error)
                continue
            if class_of.setdefault(digest, name) != name:
                say(f"warning: {file.name} is the same image as {known[digest].name}, of another class", error=True)
            known.setdefault(digest, file)
            support[name].append(pixels)
            read_files.append(file)
        if not support[name]:
            raise FewShotError(f"no image of the class {name} in {Path(files[0].name).parent} can be read; add one")
    _warn_of_twins(support, read_files)
    return support, known, read_files


def _warn_of_twins(support: Mapping[str, Sequence[Pixels]], files: Sequence[ImageFile]) -> None:
    """Name the images of different classes that are nearly the same; the same pixels count, too."""
    images = [(name, pixels) for name, of in support.items() for pixels in of]
    pairs = []
    for one, other, mirror in candidates(thumbnails(np.stack([pixels for _, pixels in images]))):
        (first, pixels), (second, others) = images[one], images[other]
        if first != second and are_twins(pixels, others, mirror):
            pairs.append(f"{files[other].name} of the class {second} looks the same as {files[one].name} of {first}")
    _warn_of_copies(list(dict.fromkeys(pairs)), "so that nothing tells these classes apart")


def _read_queries(
    files: Sequence[ImageFile], read: Callable[[ImageFile], Pixels], known: Mapping[bytes, ImageFile]
) -> Iterator[tuple[str, Pixels]]:
    for file in files:
        try:
            digest, pixels = _read(file, read)
            if digest in known:
                raise FewShotError(f"{file.name} is in the support set, as {known[digest].name}: its class is told")
        except FewShotError as error:
            _leave_out(error)
        else:
            yield file.name, pixels


def _read(file: ImageFile, read: Callable[[ImageFile], Pixels]) -> tuple[bytes, Pixels]:
    contents: list[bytes] = []  # read once, where what goes wrong with it is reported

    def once() -> bytes:
        contents.append(file.read())
        return contents[0]

    pixels = read(ImageFile(file.name, once))
    return hashlib.sha256(contents[0]).digest(), pixels


def _answers(names: Mapping[str, Pixels], logits: torch.Tensor, classes: Sequence[str]) -> Iterator[Prediction]:
    top = logits.softmax(dim=1).topk(2)
    for name, (probability, _), (first, second) in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
        yield Prediction(name, classes[first], probability, classes[second])


def _leave_out(why: FewShotError) -> None:
    say(f"left out: {why}", error=True)


def _tell(shown: Sequence[Prediction], queries: int, support: Mapping[str, Sequence[Pixels]]) -> None:
    shots = Counter(map(len, support.values()))
    images = f"{min(shots)}" if len(shots) == 1 else f"{min(shots)} to {max(shots)}"
    rows = [(Path(of.file).name, of.label, f"{of.probability:.1%}", of.runner_up) for of in shown]
    if shown:
        title = f"{queries:,} queries, {len(support)} classes by {images} images each"
        say(make_table(title, ["file", "label", "probability", "runner-up"], rows, numbers=("probability",)))
    if len(shown) < queries:
        say(f"... and {queries - len(shown):,} more:")
