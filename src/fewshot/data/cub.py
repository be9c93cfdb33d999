"""CUB: photos of 200 species of birds (Wah et al., 2011, Caltech-UCSD Birds-200-2011)."""

import re
from functools import partial
from pathlib import Path

from fewshot.data.bank import SPLITS, ImageClass, Source, of_photos
from fewshot.data.folder import by_parent, list_files, load_images, only_images
from fewshot.data.locate import holds
from fewshot.errors import FewShotError

SPECIES = 200
# Of each four species in order of number: Chen et al., 2019, arXiv 1904.04232, with the lists of their code.
RULE = ("train", "val", "train", "test")


@of_photos
def cub(data_dir: str, size: int, channels: int) -> Source:
    """Find CUB as its authors distribute it, and divide it into 100 species to train, 50 to validate and 50 to test.

    Args:
        data_dir: ``CUB_200_2011``, its ``images``, an archive of either, or the folder that contains it.
        size: height and width of the images, see ``read_photo``.
        channels: 1 for grey, 3 for RGB.

    Raises:
        FewShotError: the folder is not there or lacks species.
    """
    root = Path(data_dir).expanduser()
    below = sorted(root.glob("[Cc][Uu][Bb]*")) if root.is_dir() and not root.name.lower().startswith("cub") else []
    where = next((path for path in below if path.is_dir()), next(iter(below), root))
    found = by_parent(only_images(list_files(where)), "images")  # not the masks in segmentations
    numbered = {int(match[1]): name for name in found if (match := re.match(r"(\d{3})\.", name))}
    lacking = [number for number in range(1, SPECIES + 1) if number not in numbered]
    if lacking:
        raise FewShotError(
            f"CUB is incomplete in {where}, which lacks {len(lacking)} of {SPECIES} species, such as number "
            f"{lacking[0]:03}, and {holds(where)}; choose the folder CUB_200_2011 or its archive with data_dir=PATH"
        )

    def classes() -> list[ImageClass]:
        return [
            ImageClass(name, split, len(found[name]), partial(load_images, found[name], size, channels))
            for split in SPLITS
            for number, name in sorted(numbered.items())
            if RULE[(number - 1) % len(RULE)] == split
        ]

    used = [Path(file.name) for name in numbered.values() for file in found[name]]
    return Source(used if where.is_dir() else [where], classes, "chen")
