"""tieredImageNet from the training images of ImageNet."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fewshot.config import compose
from fewshot.data.tieredimagenet import split_of_classes, tieredimagenet
from fewshot.errors import FewShotError
from fewshot.training import make_data


def test_the_lists_are_the_published_ones():
    """The digests are of the first column of train.csv, val.csv and test.csv in the code of Ren et al., sorted."""
    lists = {"train": (351, "ee0e25b1"), "val": (97, "0b535a31"), "test": (160, "c487efa0")}
    splits = split_of_classes()
    assert Counter(splits.values()) == {split: count for split, (count, _) in lists.items()}
    for split, (_, digest) in lists.items():
        names = ",".join(name for name, own in splits.items() if own == split)
        assert hashlib.sha256(names.encode()).hexdigest()[:8] == digest


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Two images of each class, as people unpack them, and one of a class that does not belong to it."""
    root = tmp_path_factory.mktemp("imagenet")
    pixels = np.random.default_rng(0).integers(0, 256, (609, 2, 8, 10, 3), dtype=np.uint8)
    for name, images in zip([*split_of_classes(), "n99999999"], pixels, strict=True):
        (root / "train" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(root / "train" / name / f"{name}_{number}.JPEG")
    return root


def test_other_classes_are_left_out_and_splits_are_the_published_ones(imagenet, cache_dir):
    choice = [f"data_dir={imagenet}", f"cache_dir={cache_dir}", "dataset.size=8", "query=1", "train.query=1"]
    bank = make_data(compose("dataset=tieredimagenet", *choice, "train.way=5")).bank
    assert {name: split for split in ("train", "val", "test") for name in bank.class_names(split)} == split_of_classes()
    assert bank.images.shape == (1216, 8, 8, 3) and bank.split_rule == "ren"


def test_folders_of_the_splits_and_archives_are_read_too(imagenet, tmp_path):
    for name, split in split_of_classes().items():
        shutil.copytree(imagenet / "train" / name, tmp_path / "sorted" / split / name)
    archive = shutil.make_archive(str(tmp_path / "packed"), "tar", imagenet)
    for place in (tmp_path / "sorted", archive):
        classes = tieredimagenet(str(place), 8, 3).classes()
        assert {one.name: one.split for one in classes} == split_of_classes()
        assert {one.count for one in classes} == {2} and classes[0].load().shape == (2, 8, 8, 3)


def test_the_validation_images_of_imagenet_are_left_out(imagenet, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(imagenet / "train", tmp_path / part)
    source = tieredimagenet(str(tmp_path), 8, 3)
    assert {one.count for one in source.classes()} == {2}
    assert {path.parts[len(tmp_path.parts)] for path in source.files} == {"train"}


def test_what_is_missing_is_named(imagenet, tmp_path):
    names = list(split_of_classes())
    shutil.copytree(imagenet / "train" / names[0], tmp_path / names[0])
    with pytest.raises(FewShotError, match=rf"lacks 607 of 608 classes, such as {names[1]}, and .* holds {names[0]}/"):
        tieredimagenet(str(tmp_path), 8, 3)
    with pytest.raises(FewShotError, match=r"there is no folder .*nowhere"):
        tieredimagenet(str(tmp_path / "nowhere"), 8, 3)
