"""Your own images: one folder per class."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewshot.checks import Share
from fewshot.config import command
from fewshot.data.bank import SPLITS, ImageClass, Source
from fewshot.data.files import ImageFile, is_archive, list_archive, list_folder
from fewshot.data.locate import holds, splits_named
from fewshot.data.photos import read_photo
from fewshot.errors import FewShotError
from fewshot.text import say

MIN_CLASSES = 2  # classes per split: fewer make no task

Files = Mapping[str, ImageFile]  # by path
Classes = dict[str, list[ImageFile]]


def folder(data_dir: str, size: int, channels: int, val: Share, test: Share, split_seed: int, depth: int = 1) -> Source:
    """Find the classes in a folder, and divide them into training, validation and test.

    Args:
        data_dir: a folder or an archive with one folder per class; or with folders for training, test and perhaps
            validation (under any of their usual names), each with one folder per class. If a single folder contains
            all images and has folders itself, it is searched instead. Links are followed.
        size: height and width of the images, see ``read_photo``.
        channels: 1 for grey, 3 for RGB.
        val: the share of the classes to validate on; of the training classes if only a folder for validation is
            missing; not used if there is one.
        test: the share of the classes to test on; not used if there are folders for splits.
        split_seed: draws them.
        depth: how deep the folders of classes are: 1 for ``CLASS/``, 2 for ``ALPHABET/CLASS/``. Deeper folders belong
            to their class.

    Raises:
        FewShotError: there is no such folder, or it has too few classes.
    """
    if depth < 1:
        raise FewShotError(f"dataset.source.depth={depth} must be at least 1")
    root = Path(data_dir).expanduser()
    files = list_files(root)
    images = only_images(files)
    if not images:
        archives = [name for name in files if is_archive(name)]
        fix = f"; unpack it, or choose data_dir={root / archives[0]}" if archives else ""
        raise FewShotError(f"there are no images in {root}: {holds(root)}{fix}; one folder of images per class is read")
    where, inside = _entered(root, images)
    named = _split_folders(where, inside)
    rule = "folders" if "val" in named else f"folders, val drawn, seed {split_seed}"
    if named:
        splits = _from_folders(where, inside, named, val, split_seed, depth)
    else:
        rule, splits = f"drawn, seed {split_seed}", _drawn(where, inside, val, test, split_seed, depth)
    used = [Path(file.name) for classes in splits.values() for files in classes.values() for file in files]
    _report_ignored(root, files, images, len(used))
    _mention_depth(where, [name for classes in splits.values() for name in classes], inside, named, depth)

    def classes() -> list[ImageClass]:
        return [
            ImageClass(name, split, len(members), partial(load_images, members, size, channels))
            for split in SPLITS
            for name, members in splits[split].items()
        ]

    return Source(used if root.is_dir() else [root], classes, rule)


def by_class(files: Files, depth: int = 1) -> Classes:
    """Group files by the first ``depth`` folders of their paths; files in fewer folders are left out."""
    classes = defaultdict(list)
    for name, file in files.items():
        *folders, _ = name.split("/")
        if len(folders) >= depth:
            classes["/".join(folders[:depth])].append(file)
    return dict(sorted(classes.items()))


def by_parent(files: Files, preferred: str) -> Classes:
    """Group files by the name of the folder they are in, at any depth.

    Args:
        files: to group.
        preferred: the name of a folder. Where the same class is below such a folder and elsewhere, too, the others are
            other pictures, such as masks or a validation set, and all that is elsewhere is left out.
    """
    inside: Classes = defaultdict(list)
    outside: Classes = defaultdict(list)
    for path, file in files.items():
        *above, name, _ = ["", *path.split("/")]
        (inside if preferred in above else outside)[name].append(file)
    return inside if inside.keys() & outside.keys() else inside | outside


def list_files(root: Path) -> Files:
    """List what is in a folder or an archive.

    Raises:
        FewShotError: it is neither.
    """
    if root.is_file() and is_archive(root.name):
        return list_archive(root)
    if not root.is_dir():
        raise FewShotError(
            f"there is no folder {root}; choose the folder or archive that contains one folder per class, with "
            "data_dir=PATH"
        )
    return list_folder(root)


def only_images(files: Files) -> Files:
    """Return those files that Pillow can read, by their endings."""
    return {name: file for name, file in files.items() if name.lower().endswith(_endings())}


def _below(files: Files, folder: str) -> Files:
    prefix = f"{folder}/"
    return {name.removeprefix(prefix): file for name, file in files.items() if name.startswith(prefix)}


def _entered(where: Path, images: Files, top: bool = True) -> tuple[Path, Files]:
    """Enter folders as long as a single one contains all images, in folders of its own."""
    only = _only_folder(images)
    if only is None:
        return where, images
    inner, inside = _entered(where / only, _below(images, only), top=False)
    if top:
        say(f"the classes are those in {inner}, the only folder in {where} that contains folders of images")
    return inner, inside


def _only_folder(images: Files) -> str | None:
    """Return the folder that contains all images if it has folders of images itself, else None."""
    names = {name.partition("/")[0] for name in images if "/" in name}
    return names.pop() if len(names) == 1 and any(name.count("/") > 1 for name in images) else None


def _split_folders(where: Path, images: Files) -> dict[str, str]:
    """Return the folder of each split; {} if the folders are classes.

    Raises:
        FewShotError: a split has several folders, or train or test has none.
    """
    found = splits_named(list(by_class(images)))
    several = next((names for names in found.values() if len(names) > 1), None)
    if several:
        raise FewShotError(
            f"{where} has several folders for a split, {', '.join(several)}; merge them, or draw all splits from one: "
            f"data_dir={where / several[0]}"
        )
    named = {split: names[0] for split, names in found.items()}
    missing = [split for split in ("train", "test") if split not in named] if named else []
    if missing:
        raise FewShotError(
            f"{where} has the folders {', '.join(named.values())}, which are splits and not classes, but none for "
            f"{missing[0]}; add {where / missing[0]} with one folder per class, or draw all splits from one: "
            f"data_dir={where / next(iter(named.values()))}"
        )
    return named


def _from_folders(
    where: Path, images: Files, named: Mapping[str, str], val: float, seed: int, depth: int
) -> dict[str, Classes]:
    splits = {}
    for split, name in named.items():
        below = _below(images, name)
        while (only := _only_folder(below)) is not None:  # train/images/CLASS
            below = _below(below, only)
        splits[split] = by_class(below, depth)
    instead = f"draw all splits from one: data_dir={where / named['train']}"
    for split, classes in splits.items():
        if len(classes) < MIN_CLASSES:
            raise FewShotError(
                f"{where / named[split]} has {len(classes)} folders with images, and at least {MIN_CLASSES} classes "
                f"are needed for {split}; move some there, or {instead}"
            )
    first: dict[str, str] = {}
    for split, classes in splits.items():
        shared = [name for name in classes if first.setdefault(name, split) != split]
        if shared:
            raise FewShotError(
                f"{where / named[first[shared[0]]]} and {where / named[split]} have {len(shared)} classes in common, "
                f"such as {shared[0]}, but a few-shot test is about classes that were not trained on: put each class "
                f"into one of them, or {instead}"
            )
    if "val" not in splits:
        count = max(MIN_CLASSES, round(val * len(splits["train"])))
        if len(splits["train"]) - count < MIN_CLASSES:
            raise FewShotError(
                f"{where / named['train']} has {len(splits['train'])} classes, too few to hold out {count} of them for "
                f"validation: lower dataset.source.val={val}, add {where / 'val'} with others, or {instead}"
            )
        say(
            f"{where} has no folder for validation: {count} of the {len(splits['train'])} classes in "
            f"{named['train']} are held out for it (dataset.source.val={val})"
        )
        order = _shuffled(splits["train"], seed)
        splits["val"] = {name: splits["train"][name] for name in sorted(order[:count])}
        splits["train"] = {name: splits["train"][name] for name in sorted(order[count:])}
    return splits


def _drawn(where: Path, images: Files, val: float, test: float, seed: int, depth: int) -> dict[str, Classes]:
    classes = by_class(images, depth)
    at_depth = f" {depth} levels deep" if depth > 1 else ""
    outside = len(images) - sum(map(len, classes.values()))
    at_depth += f" (and {outside:,} images outside of these)" if outside else ""
    splits = draw_classes(
        list(classes),
        val,
        test,
        seed,
        found=f"{where} has {len(classes)} folders with images{at_depth}",
        otherwise=f"; or classify them without training: {command('predict')} encoder=pretrained "
        f"method=protonet support={where} query=...",
    )
    return {split: {name: classes[name] for name in names} for split, names in splits.items()}


def draw_classes(
    names: Sequence[str], val: float, test: float, seed: int, found: str | None = None, otherwise: str = ""
) -> dict[str, list[str]]:
    """Draw the classes of each split by a hash of seed and name, the same on every machine.

    Args:
        names: of all classes.
        val: share of the classes to validate on.
        test: share of the classes to test on.
        seed: of the draw.
        found: for the message, which classes there are.
        otherwise: for the message, another way out.

    Returns:
        The sorted names of the classes of each split.

    Raises:
        FewShotError: there are too few classes.
    """
    counts = {split: max(MIN_CLASSES, round(share * len(names))) for split, share in (("val", val), ("test", test))}
    if len(names) - sum(counts.values()) < MIN_CLASSES:
        least = len(SPLITS) * MIN_CLASSES
        enough = f"lower dataset.source.val={val} and dataset.source.test={test}" if len(names) >= least else "add some"
        raise FewShotError(
            f"{found or f'there are {len(names)} classes'}, too few classes to train, validate and test on different "
            f"ones ({least} at least, better 20): {enough}{otherwise}"
        )
    order = _shuffled(names, seed)
    ends = {"val": (0, counts["val"]), "test": (counts["val"], sum(counts.values()))}
    parts = {split: order[slice(*span)] for split, span in ends.items()}
    return {"train": sorted(order[sum(counts.values()) :]), **{split: sorted(part) for split, part in parts.items()}}


def _shuffled(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest())


def _report_ignored(root: Path, files: Files, images: Files, used: int) -> None:
    others = sorted(set(files) - set(images))
    if others:
        say(f"ignored {len(others):,} files in {root} that are not images, such as {others[0]}")
    if used < len(images):
        say(f"ignored {len(images) - used:,} images in {root} that are not in the folder of a class")


def _mention_depth(where: Path, names: Sequence[str], images: Files, named: Mapping[str, str], depth: int) -> None:
    """Say how to take the folders within classes as classes, if all images are in such folders."""
    levels = depth + bool(named)
    folders = [name.split("/")[:-1] for name in images]
    deeper = {tuple(parts[: levels + 1]) for parts in folders if len(parts) > levels}
    if min((len(parts) for parts in folders if len(parts) >= levels), default=0) > levels and len(deeper) >= 2 * len(
        names
    ):
        say(
            f"the {len(names)} folders such as {names[0]} in {where} are the classes; to take the {len(deeper)} "
            f"folders in them instead, add dataset.source.depth={depth + 1}"
        )


def load_images(files: Sequence[ImageFile], size: int, channels: int) -> NDArray[np.uint8]:
    """Read the images of a class: uint8 ``[images, size, size, channels]``; see ``read_photo``."""
    return np.stack([read_photo(file, size, channels) for file in files])


@cache
def _endings() -> tuple[str, ...]:
    """Return the endings of files that Pillow can read."""
    Image.init()
    return tuple(ending for ending, format_ in Image.EXTENSION.items() if format_ in Image.OPEN)
