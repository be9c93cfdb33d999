"""tieredImageNet: 608 classes of ImageNet, divided by category (Ren et al., 2018, arXiv 1803.00676)."""

from functools import cache, partial
from pathlib import Path

from fewshot.data.bank import ImageClass, Source, of_photos
from fewshot.data.folder import by_parent, list_files, load_images, only_images
from fewshot.data.locate import holds
from fewshot.errors import FewShotError

LISTS = Path(__file__).with_suffix(".txt")  # of their code: a split and its classes, WordNet numbers, in each line


@of_photos
def tieredimagenet(data_dir: str, size: int, channels: int) -> Source:
    """Find ImageNet's training images, and divide 608 of its classes: 351 to train, 97 to validate, 160 to test.

    Args:
        data_dir: a folder or an archive with one folder per class, named by its WordNet number, at any depth; other
            classes are left out. With ImageNet's ``train`` and ``val``, only ``train`` is read.
        size: height and width of the images, see ``read_photo``.
        channels: 1 for grey, 3 for RGB.

    Raises:
        FewShotError: the folder is not there or lacks classes.
    """
    where, splits = Path(data_dir).expanduser(), split_of_classes()
    found = by_parent(only_images(list_files(where)), "train")
    lacking = [name for name in splits if name not in found]
    if lacking:
        raise FewShotError(
            f"tieredImageNet is incomplete in {where}, which lacks {len(lacking)} of {len(splits)} classes, such as "
            f"{lacking[0]}, and {holds(where)}; choose the folder of ImageNet's training images, or its archive, with "
            "data_dir=PATH"
        )

    def classes() -> list[ImageClass]:
        return [
            ImageClass(name, split, len(found[name]), partial(load_images, found[name], size, channels))
            for name, split in splits.items()
        ]

    used = [Path(file.name) for name in splits for file in found[name]]
    return Source(used if where.is_dir() else [where], classes, "ren")


@cache
def split_of_classes() -> dict[str, str]:
    """Return the split of each class."""
    lines = [line.split() for line in LISTS.read_text(encoding="ascii").splitlines()]
    return {name: split for split, *names in lines for name in names}
