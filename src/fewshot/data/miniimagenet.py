"""miniImageNet (Vinyals et al., 2016) in the split of Ravi & Larochelle (2017): 64 + 16 + 20 classes."""

import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from posixpath import splitext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewshot.data.bank import SPLITS, ImageClass, Source, of_photos
from fewshot.data.files import BULK, ImageFile, is_archive
from fewshot.data.hdf5 import list_hdf5, read_hdf5
from fewshot.data.images import decode, to_pixels
from fewshot.data.locate import ALIASES, IMAGES, Place, children, holds, places, plain_name, split_of
from fewshot.data.pickles import to_array, to_list, unpickle
from fewshot.data.tables import TABLES, TableImages, read_table
from fewshot.errors import FewShotError, shortened
from fewshot.text import say

FOLDERS = ("miniimagenet", "mini-imagenet", "mini_imagenet", "miniImageNet")  # tried before others with similar names
PARTS = ("images", "image", "split", "splits", "csv", "processedimages")  # folders that contain a part of it
PICKLES, HDF5 = BULK[:2], BULK[2:]
WNID = re.compile(r"n\d{8}")
# The published classes, which identify miniImageNet under other names.
PUBLISHED = """
train n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831
train n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408
train n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743
train n03220513 n03337140 n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
train n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548 n04296562 n04389033
train n04435653 n04443257 n04509417 n04515003 n04596742 n04604644 n04612504 n06794110 n07584110 n07697537
train n07747607 n09246464 n13054560 n13133613
val n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042
val n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
test n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525
test n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
"""
SPLIT_OF_CLASS = {name: line.split()[0] for line in PUBLISHED.splitlines() for name in line.split()[1:]}
# Errors that a broken pickle raises.
BROKEN = (
    UnpicklingError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
)

Tree = Mapping[str, ImageFile]


@of_photos
def miniimagenet(data_dir: str, size: int) -> Source:
    """Find miniImageNet in or below ``data_dir``, in any common layout.

    It is in a folder named after miniImageNet, in ``data_dir`` itself or in one of its folders. These layouts are found
    anywhere in it, also in zips and tars: the images with one table of images and labels per split; one folder per
    split with one folder per class; one folder for each of the published classes; one pickled cache per split (a
    dictionary of "image_data" and "class_dict", or of "data" and "labels"); or one HDF5 file per split.

    Args:
        data_dir: the folder to search.
        size: height and width of the images.

    Raises:
        FewShotError: no layout is found, or it is incomplete.
    """
    root = Path(data_dir).expanduser()
    searched = list(places(root, "miniimagenet", FOLDERS, _belongs))
    found = [place for place in searched if _is_miniimagenet(place)]
    if not found:
        folder = next((place.path for place in searched if place.named and place.files), None)
        where = f"is not in {root / FOLDERS[0]}" if folder is None else f"was not recognised in {folder}"
        raise FewShotError(
            f"miniImageNet {where}, and its licence allows no automatic download; {holds(folder or root)}.",
            "Put there: images/ (or archives of it) with train.csv, val.csv, test.csv; or train/, val/, test/ with a",
            "folder for each class; or mini-imagenet-cache-{train,val,test}.pkl. Or name its folder: data_dir=PATH",
        )
    place = found[0] if len(found) == 1 else next(filter(_names_all_splits, found), found[0])
    return Source([place.path / name for name in place.files if _is_used(name)], partial(_classes, place, size))


def _belongs(path: Path) -> bool:
    """Return whether a folder or an archive may be part of miniImageNet: it contains no other classes."""
    if split_of(path.name.partition(".")[0]) is None and plain_name(path.name.partition(".")[0]) not in PARTS:
        return False
    inside = children(path) if path.is_dir() else []
    return all(name in SPLIT_OF_CLASS or split_of(name) for name in inside)


def _is_used(name: str) -> bool:
    suffix = splitext(name)[1].lower()  # much faster than a path, and there are tens of thousands of names
    if suffix in (*TABLES, *BULK, ".json"):
        return split_of(PurePosixPath(name).stem) is not None
    return suffix in IMAGES or is_archive(name)


def _is_miniimagenet(place: Place) -> bool:
    if place.named:
        return any(map(_is_used, place.files))
    used = [name for name in place.files if _is_used(name)]
    if not used:
        return False
    heads = (_head(place.files[name]) for name in used if name.lower().endswith((*TABLES, ".json")))
    texts = [*used, *heads]
    return any(WNID.findall(text) or "miniimagenet" in plain_name(text) for text in texts) and all(
        wnid in SPLIT_OF_CLASS for text in texts for wnid in WNID.findall(text)
    )


def _head(table: ImageFile) -> str:
    try:
        with _opened(table) as file:
            return str(file.read(4096).decode(errors="replace"))
    except OSError:
        return ""


def _opened(file: ImageFile) -> Any:
    return file.open() if file.open is not None else io.BytesIO(file.read())


def _names_all_splits(place: Place) -> bool:
    """Return whether the file names suggest all three splits; an archive may contain any of them."""
    if any(split_of(PurePosixPath(name).name.partition(".")[0]) is None for name in place.archives()):
        return True
    splits = defaultdict(set)
    for name in place.files:
        if _is_used(name):
            for part in PurePosixPath(name).parts:
                splits[PurePosixPath(name).suffix.lower()].add(split_of(part.partition(".")[0]))
    return any(found.issuperset(SPLITS) for found in splits.values())


class _PartError(FewShotError):
    """A layout exists only for some of the splits."""


def _classes(place: Place, size: int) -> list[ImageClass]:
    """Return the classes of the first complete layout; archives are only opened if the folder does not suffice."""
    layouts = {
        "tables and images": _from_tables,
        "one folder per split": _from_folders,
        "pickled caches": _from_pickles,
        "HDF5 files": _from_hdf5,
        "one folder per published class": _from_published,
    }
    trees: list[Callable[[], Tree]] = [lambda: {n: f for n, f in place.files.items() if not is_archive(n)}]
    trees += [place.opened] if place.archives() else []
    for number, make in enumerate(trees, start=1):
        tree = make()
        problems: list[FewShotError] = []
        for description, layout in layouts.items():
            if problems and layout in (_from_folders, _from_published) and not isinstance(problems[0], _PartError):
                continue  # the same images would be read with splits that contradict the tables
            try:
                classes = layout(place, tree, size)
            except FewShotError as error:
                problems.append(error)
                if number < len(trees):
                    break  # the archives may contain what is missing
            else:
                if classes:
                    for problem in problems:
                        say(f"{problem}; reading {description} instead")
                    _check(place, classes)
                    return classes
    if problems:
        raise problems[0]
    found = shortened(sorted(tree)) or "its archives are empty"
    raise FewShotError(
        f"{place.path} contains no known layout of miniImageNet ({found}): it needs train.csv, val.csv and test.csv, "
        "or folders train/, val/ and test/ with one folder per class"
    )


def _check(place: Place, classes: Sequence[ImageClass]) -> None:
    other = [c.name for c in classes if WNID.fullmatch(c.name) and c.name not in SPLIT_OF_CLASS]
    if other and not place.named:
        raise FewShotError(
            f"{place.path} contains {shortened(other)}, which are not of miniImageNet; use dataset=folder"
        )
    moved = [c.name for c in classes if c.name in SPLIT_OF_CLASS and c.split != SPLIT_OF_CLASS[c.name]]
    if moved:
        say(
            f"the splits in {place.path} are not those of Ravi & Larochelle: {len(moved)} classes are in a different "
            f"split, for example {moved[0]}; results are not comparable with published ones"
        )


def _from_tables(place: Place, tree: Tree, size: int) -> list[ImageClass]:
    tables = _by_split(place, [name for name in tree if name.lower().endswith(TABLES)], "table")
    if not tables:
        return []
    rows = {split: read_table(tree[tables[split]]) for split in SPLITS}
    images = TableImages(place.path, tree)
    listed: Counter[str] = Counter()
    classes = []
    for split, listed_here in rows.items():
        found = [(images.find(name, label), label) for name, label in listed_here]
        missing = [name for (name, _), (path, _) in zip(listed_here, found, strict=True) if path is None]
        if missing:
            raise FewShotError(
                f"{len(missing)} of the {len(listed_here)} images that {tree[tables[split]].name} lists are neither in "
                f"{place.path} nor in an archive there, for example {missing[0]}: unpack the images again"
            )
        members = defaultdict(list)
        for path, label in found:
            assert path is not None
            listed[path] += 1
            members[label].append(tree[path])
        classes += [_image_class(label, split, files, size) for label, files in members.items()]
    repeated = [name for name, count in listed.items() if count > 1]
    if repeated:
        raise FewShotError(
            f"{len(repeated)} images are listed more than once in {', '.join(tree[t].name for t in tables.values())}, "
            f"for example {PurePosixPath(repeated[0]).name}: test images must not be trained on; correct the tables"
        )
    return classes


def _by_split(place: Place, names: Iterable[str], kind: str) -> dict[str, str]:
    """Return the file of each split among files of one kind, in the folder with most splits; {} if there is none.

    Raises:
        FewShotError: a split has no file, or several.
    """
    folders: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        split = split_of(PurePosixPath(name).stem)
        if split is not None:
            folders[PurePosixPath(name).parent.as_posix()][split].append(name)
    if not folders:
        return {}
    folder, found = min(folders.items(), key=lambda item: (-len(item[1]), item[0].count("/"), item[0]))
    where = place.path / folder
    missing = [split for split in SPLITS if split not in found]
    if missing:
        present = shortened([PurePosixPath(name).name for files in found.values() for name in files])
        had, (example, *_) = next(iter(found.items()))
        wanted = [str(place.path / _renamed(example, had, split)) for split in missing]
        raise _PartError(f"{where} has {present}, but no {kind} for {', '.join(missing)}: add {', '.join(wanted)}")
    chosen = {}
    for split in SPLITS:
        exact = [name for name in found[split] if plain_name(PurePosixPath(name).stem) in ALIASES[split]]
        candidates = exact if len(exact) == 1 else found[split]
        if len(candidates) > 1:
            raise FewShotError(
                f"{where} has several files for {split}: {shortened([PurePosixPath(n).name for n in candidates])}; "
                f"rename the right one to {split}{PurePosixPath(candidates[0]).suffix}"
            )
        chosen[split] = candidates[0]
    return chosen


def _renamed(example: str, had: str, wanted: str) -> str:
    """Return the path of the file of a split, by analogy with that of a different split."""
    path = PurePosixPath(example)
    alias = max((alias for alias in ALIASES[had] if alias in path.name.lower()), key=len)
    return str(path.with_name(re.sub(alias, wanted, path.name, count=1, flags=re.IGNORECASE)))


def _from_folders(place: Place, tree: Tree, size: int) -> list[ImageClass]:
    found: dict[str, dict[str, dict[str, dict[str, list[ImageFile]]]]] = defaultdict(dict)
    for path, file in tree.items():
        if not path.lower().endswith(IMAGES):
            continue
        *folders, name = path.split("/")
        splits = [split_of(folder.partition(".")[0]) for folder in folders]
        number = next((n for n, split in enumerate(splits) if split), None)
        if number is None:
            continue
        split = splits[number]
        assert split is not None
        inside = folders[number + 1 :]
        # Some archives repeat the split, and a class may contain the name of a split: test_tube.
        while inside and split_of(inside[0]) == split and (len(inside) > 1 or plain_name(inside[0]) in ALIASES[split]):
            inside = inside[1:]
        label = next(filter(WNID.fullmatch, inside), inside[0] if inside else None) or _wnid(name)
        classes = found["/".join(folders[:number])].setdefault(split, {}).setdefault(folders[number], defaultdict(list))
        if label is not None:
            classes[label].append(file)
    if not found:
        return []
    above, by_split = min(found.items(), key=lambda item: (-len(item[1]), item[0].count("/"), item[0]))
    where = place.path / above
    chosen = []
    for split in SPLITS:
        empty = [child for child in (children(where) if where.is_dir() else []) if split_of(child) == split]
        if split not in by_split:
            present = shortened([f"{folder}" for folders in by_split.values() for folder in folders])
            fix = f"add {split}/, with one folder per class"
            raise FewShotError(
                f"{where / empty[0]} contains no folder with images: it needs one folder per class"
                if empty
                else f"{where} has {present}, but no folder for {split}: {fix}"
            )
        if len(by_split[split]) > 1:
            raise FewShotError(
                f"{where} has several folders for {split}: {shortened(list(by_split[split]))}; keep one of them"
            )
        ((folder, classes),) = by_split[split].items()
        if not classes:
            raise FewShotError(f"{where / folder} contains no folder with images: it needs one folder per class")
        chosen += [_image_class(label, split, files, size) for label, files in sorted(classes.items())]
    return chosen


def _wnid(name: str) -> str | None:
    found = WNID.match(name)
    return found.group() if found else None


def _from_published(place: Place, tree: Tree, size: int) -> list[ImageClass]:
    members = defaultdict(list)
    for path, file in tree.items():
        *folders, name = path.split("/")
        label = next((folder for folder in reversed(folders) if folder in SPLIT_OF_CLASS), _wnid(name))
        if path.lower().endswith(IMAGES) and label in SPLIT_OF_CLASS:
            members[label].append(file)
    if not members:
        return []
    missing = [name for name in SPLIT_OF_CLASS if name not in members]
    if missing:
        raise FewShotError(
            f"{place.path} has images of {len(members)} of the {len(SPLIT_OF_CLASS)} classes; {shortened(missing)} are "
            "missing, and there are no tables or folders of splits: unpack the rest, or put train.csv, val.csv and "
            "test.csv there"
        )
    return [_image_class(name, split, members[name], size) for name, split in SPLIT_OF_CLASS.items()]


def _image_class(name: str, split: str, files: Sequence[ImageFile], size: int) -> ImageClass:
    def load() -> NDArray[np.uint8]:
        return np.stack([decode(file, size, channels=3) for file in files])

    return ImageClass(name, split, len(files), load)


def _from_pickles(place: Place, tree: Tree, size: int) -> list[ImageClass]:
    found = []
    for split, path in _by_split(place, [name for name in tree if name.lower().endswith(PICKLES)], "cache").items():
        images, of_class = _read_pickle(tree[path])
        for label, members in of_class.items():
            name = label if isinstance(label, str) else f"{split}/{label}"
            found.append(ImageClass(name, split, len(members), partial(_resized, images, members, size)))
    return found


def _from_hdf5(place: Place, tree: Tree, size: int) -> list[ImageClass]:
    paths = _by_split(place, [name for name in tree if name.lower().endswith(HDF5)], "HDF5 file")
    if not paths:
        return []
    labels = _by_split(place, [name for name in tree if name.lower().endswith(".json")], "list of labels")
    return [
        ImageClass(name, split, count, partial(_read_hdf5, tree[path], name, size))
        for split, path in paths.items()
        for name, count in list_hdf5(tree[path], tree[labels[split]] if labels else None).items()
    ]


def _read_hdf5(file: ImageFile, name: str, size: int) -> NDArray[np.uint8]:
    images = read_hdf5(file, name)
    return _resized(images, range(len(images)), size)


def _resized(images: NDArray[np.uint8], members: Sequence[int], size: int) -> NDArray[np.uint8]:
    return np.stack([to_pixels(Image.fromarray(images[member]), size, channels=3) for member in members])


def _read_pickle(file: ImageFile) -> tuple[NDArray[np.uint8], Mapping[Any, list[int]]]:
    """Return the images of a pickled cache, uint8 ``[images, height, width, 3]``, and the members of each class."""
    try:
        with _opened(file) as opened:
            cache = unpickle(opened)
        if not isinstance(cache, dict):
            raise TypeError("not a dictionary")
        images = to_array(cache["image_data" if "image_data" in cache else "data"])
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(f"its images are {images.dtype} {list(images.shape)}, not uint8 [images, h, w, 3]")
        of_class: dict[Any, list[int]] = defaultdict(list)
        if "image_data" in cache:
            of_class |= {label: to_list(members, len(images)) for label, members in cache["class_dict"].items()}
        else:
            for member, label in zip(range(len(images)), to_list(cache["labels"], len(images)), strict=True):
                if not isinstance(label, int | str):
                    raise TypeError("its labels are not integers or strings")
                of_class[label].append(member)
            of_class = dict(sorted(of_class.items()))
        if not all(of_class.values()):
            raise ValueError("a class has no images")
        if not all(isinstance(member, int) for members in of_class.values() for member in members):
            raise TypeError("the images of a class are not a list of integers")
        if not all(0 <= member < len(images) for members in of_class.values() for member in members):
            raise ValueError("a class refers to images that do not exist")
    except BROKEN as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise FewShotError(f"{file.name} is not a pickled miniImageNet cache: {reason}; download it again") from error
    return images, of_class
