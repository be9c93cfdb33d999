"""CUB as its authors distribute it."""

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from fewshot.data.cub import cub
from fewshot.errors import FewShotError


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    root = tmp_path_factory.mktemp("birds") / "CUB_200_2011"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 9, 12, 3), dtype=np.uint8)
    for number in range(1, 201):
        folder = root / "images" / f"{number:03}.Bird_{number}"
        folder.mkdir(parents=True)
        Image.fromarray(pixels[number - 1]).save(folder / "Bird_0001.jpg")
    (root / "parts").mkdir()
    (root / "images.txt").write_text("1 001.Bird_1/Bird_0001.jpg\n")
    with tarfile.open(root.parent / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(root, "CUB_200_2011")
    return root


@pytest.mark.parametrize("place", ["", "images", "..", "../CUB_200_2011.tgz", "archive alone"])
def test_it_is_found_where_people_have_it(birds, place, tmp_path):
    where = birds / place
    if place == "archive alone":
        shutil.copy(birds.parent / "CUB_200_2011.tgz", tmp_path)
        where = tmp_path
    source = cub(str(where), 16, 3)
    classes = source.classes()
    split = {int(one.name[:3]): one.split for one in classes}
    assert [sum(one.split == part for one in classes) for part in ("train", "val", "test")] == [100, 50, 50]
    # The lists of Chen et al. begin so: 001, 003 / 002, 006 / 004, 008.
    assert [split[number] for number in range(1, 9)] == ["train", "val", "train", "test"] * 2
    assert classes[0].load().shape == (1, 16, 16, 3) and source.split == "chen"


def test_masks_are_not_images_of_their_species(birds, tmp_path):
    copy = tmp_path / "CUB_200_2011"
    shutil.copytree(birds, copy)
    shutil.copytree(birds / "images", copy / "segmentations")
    assert {one.count for one in cub(str(tmp_path), 16, 3).classes()} == {1}
    # Nor do they stand in for images that are missing.
    shutil.rmtree(copy / "images" / "007.Bird_7")
    with pytest.raises(FewShotError, match=r"lacks 1 of 200 species, such as number 007"):
        cub(str(tmp_path), 16, 3)


def test_what_is_missing_is_named(birds, tmp_path):
    copy = tmp_path / "CUB_200_2011"
    shutil.copytree(birds, copy)
    shutil.rmtree(copy / "images" / "007.Bird_7")
    with pytest.raises(
        FewShotError, match=r"lacks 1 of 200 species, such as number 007, and .* holds images.txt, images/"
    ):
        cub(str(tmp_path), 16, 3)
    with pytest.raises(FewShotError, match=r"there is no folder .*nowhere"):
        cub(str(tmp_path / "nowhere"), 16, 3)
