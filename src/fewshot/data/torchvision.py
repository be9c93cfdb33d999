"""Classification data sets of torchvision, divided into classes to train, validate and test on."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from fewshot.checks import Share
from fewshot.data.bank import SPLITS, ImageClass, Source
from fewshot.data.folder import draw_classes
from fewshot.data.photos import prepare
from fewshot.errors import FewShotError, reason

Parts = tuple[str, Sequence[str | bool]]

# The folder in data_dir, and the argument that chooses a part with its values: parts divide the images of each class,
# and are put together here.
_EITHER = ("train", (True, False))
DATA_SETS: Mapping[str, tuple[str, Parts | None]] = {
    "CIFAR10": ("cifar-10-batches-py", _EITHER),
    "CIFAR100": ("cifar-100-python", _EITHER),
    "Caltech101": ("caltech101", None),
    "Caltech256": ("caltech256", None),
    "Country211": ("country211", ("split", ("train", "valid", "test"))),
    "DTD": ("dtd", ("split", ("train", "val", "test"))),
    "EuroSAT": ("eurosat", None),
    "FGVCAircraft": ("fgvc-aircraft-2013b", ("split", ("trainval", "test"))),
    "FashionMNIST": ("FashionMNIST", _EITHER),
    "Flowers102": ("flowers-102", ("split", ("train", "val", "test"))),
    "Food101": ("food-101", ("split", ("train", "test"))),
    "GTSRB": ("gtsrb", ("split", ("train", "test"))),
    "KMNIST": ("KMNIST", _EITHER),
    "MNIST": ("MNIST", _EITHER),
    "OxfordIIITPet": ("oxford-iiit-pet", ("split", ("trainval", "test"))),
    "SUN397": ("SUN397", None),
    "StanfordCars": ("stanford_cars", ("split", ("train", "test"))),
}


def torchvision(
    data_dir: str,
    name: str,
    size: int,
    channels: Literal[1, 3],
    download: bool = True,
    val: Share | Sequence[str] = 0.2,
    test: Share | Sequence[str] = 0.2,
    split_seed: int = 0,
    rule: str | None = None,
) -> Source:
    """Find a data set in ``data_dir``, or download it there, as torchvision does, which checks its digests.

    Args:
        data_dir: where torchvision keeps it: its ``root``.
        name: of the data set in ``torchvision.datasets``.
        size: height and width of the images, see ``prepare``.
        channels: 1 for grey, 3 for RGB.
        download: fetch it if it is missing.
        val: the classes to validate on, or their share of all classes.
        test: the classes to test on, or their share of all classes; those in neither are for training.
        split_seed: draws the classes if shares are given.
        rule: the name of a published split, if ``val`` and ``test`` list it.

    Raises:
        FewShotError: the data set is unknown, missing, damaged or cannot be downloaded; or a split is impossible.
    """
    if name not in DATA_SETS:
        raise FewShotError(f"dataset.source.name={name} must be one of {', '.join(DATA_SETS)}")
    listed = [not isinstance(share, int | float) for share in (val, test)]
    if any(listed) != all(listed):
        raise FewShotError("dataset.source.val and dataset.source.test must both list classes, or both be shares")
    folder, parts = DATA_SETS[name]
    root = Path(data_dir).expanduser()
    if not (root / folder).is_dir():
        _open(root, name, folder, parts, download)
    files = sorted(path for path in (root / folder).rglob("*") if path.is_file())

    def classes() -> list[ImageClass]:
        images = _by_class(_open(root, name, folder, parts, download=False))
        if all(listed):
            splits = _listed(name, list(images), val, test)  # type: ignore[arg-type]
        else:
            splits = draw_classes(list(images), val, test, split_seed)  # type: ignore[arg-type]
        return [
            ImageClass(label, split, len(images[label]), partial(_load, label, images[label], size, channels))
            for split in SPLITS
            for label in splits[split]
        ]

    return Source(files, classes, rule or ("listed" if all(listed) else f"drawn, seed {split_seed}"))


def _open(root: Path, name: str, folder: str, parts: Parts | None, download: bool) -> list[Any]:
    arguments = [{}] if parts is None else [{parts[0]: part} for part in parts[1]]
    made = getattr(datasets, name)
    missing = not (root / folder).is_dir()
    # PostScript is a program, and not every data set lets its images be opened in another way.
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name != "EPS"]
    try:
        # A second look would check the digests of everything again, so nothing is downloaded where the folder is.
        return [made(str(root), **part, **({"download": True} if missing and download else {})) for part in arguments]
    except ImportError as error:
        raise FewShotError(f"torchvision's {name} needs another package: {reason(error)}") from error
    except Exception as error:  # torchvision raises many types for what is missing or damaged
        state = "is not" if missing else "is incomplete or damaged"
        fix = (
            f"put it into {root / folder} as torchvision arranges it, or name the folder that holds {folder} with "
            "data_dir=PATH"
        )
        if missing and not download:
            fix += ", or download it with dataset.source.download=true"
        elif not missing:
            fix = f"remove {root / folder} to have it downloaded again, or {fix}"
        raise FewShotError(f"{name} {state} in {root}: {reason(error)}; {fix}") from error


def _by_class(parts: Sequence[Any]) -> dict[str, list[tuple[Any, int]]]:
    """Group images by class: for each class name the part and position of its images, classes in order of label."""
    found = defaultdict(list)
    for part in parts:
        for position, label in enumerate(_labels(part)):
            found[label].append((part, position))
    names = getattr(parts[0], "classes", None) or getattr(parts[0], "categories", None)
    return {str(names[label] if names else label): found[label] for label in sorted(found)}


def _labels(part: Any) -> Iterator[int]:
    for attribute in ("targets", "_labels", "labels", "y"):
        if hasattr(part, attribute):
            return map(int, getattr(part, attribute))
    for attribute in ("samples", "_samples"):
        if hasattr(part, attribute):
            return (int(label) for _, label in getattr(part, attribute))
    return (int(part[position][1]) for position in range(len(part)))


def _listed(name: str, classes: Sequence[str], val: Sequence[str], test: Sequence[str]) -> dict[str, list[str]]:
    unknown = [label for label in (*val, *test) if label not in classes]
    if unknown:
        raise FewShotError(f"{name} has no classes {', '.join(unknown[:5])}; it has {', '.join(classes[:5])}, ...")
    for part, labels in (("val", val), ("test", test)):
        repeated = [label for label, count in Counter(labels).items() if count > 1]
        if repeated:
            raise FewShotError(f"dataset.source.{part} of {name} lists {', '.join(repeated[:5])} more than once")
    both = sorted({*val} & {*test})
    if both:
        raise FewShotError(f"dataset.source.val and dataset.source.test share classes: {', '.join(both[:5])}")
    train = [label for label in classes if label not in {*val, *test}]
    return {"train": train, "val": [*val], "test": [*test]}


def _load(label: str, images: Sequence[tuple[Any, int]], size: int, channels: int) -> NDArray[np.uint8]:
    try:
        return np.stack([prepare(part[position][0], size, channels) for part, position in images])
    except Exception as error:  # decoders raise many types
        raise FewShotError(
            f"cannot read the images of {label}: {reason(error)}; remove the data set's folder to have it downloaded "
            "again, or replace the image"
        ) from error
