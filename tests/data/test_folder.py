"""A folder of one's own as a data set."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fewshot.config import compose
from fewshot.data.bank import SPLITS, open_bank
from fewshot.data.folder import folder
from fewshot.errors import FewShotError
from fewshot.training import train


def fill(place, classes, images=3, size=20):
    for number, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for image in range(images):
            pixels = np.full((size, size + 4, 3), 5 * image, dtype=np.uint8)
            pixels[number % size] = 255
            Image.fromarray(pixels).save(place / name / f"{image}.png")
    return place


def split_of(place, **changes):
    source = folder(str(place), **{"size": 16, "channels": 3, "val": 0.2, "test": 0.2, "split_seed": 0} | changes)
    return {
        split: [image_class.name for image_class in source.classes() if image_class.split == split] for split in SPLITS
    }


def test_the_split_of_the_classes_depends_only_on_the_seed(tmp_path):
    names = [f"class {number}" for number in range(10)]
    found = split_of(fill(tmp_path / "a", names))
    assert {split: len(members) for split, members in found.items()} == {"train": 6, "val": 2, "test": 2}
    assert sorted(name for members in found.values() for name in members) == names
    assert split_of(fill(tmp_path / "b", reversed(names))) == found
    assert split_of(tmp_path / "a", split_seed=1) != found


def test_shares_are_kept_and_every_split_has_two_classes_at_least(tmp_path):
    fill(tmp_path, [f"{number}" for number in range(6)])
    assert [len(members) for members in split_of(tmp_path, val=0.01).values()] == [2, 2, 2]
    with pytest.raises(FewShotError, match=r"lower dataset\.source\.val=0\.5 and dataset\.source\.test=0\.5"):
        split_of(tmp_path, val=0.5, test=0.5)


def test_folders_may_say_which_classes_are_for_what(tmp_path):
    for split, classes in {"train": "abc", "val": "de", "test": "fg"}.items():
        fill(tmp_path / split, classes)
    assert split_of(tmp_path) == {"train": [*"abc"], "val": [*"de"], "test": [*"fg"]}
    (tmp_path / "val" / "d").rename(tmp_path / "train" / "d")
    with pytest.raises(FewShotError, match=r"val has 1 folders with images, and at least 2 classes"):
        split_of(tmp_path)


def test_a_class_in_two_splits_is_refused(tmp_path):
    for split, classes in {"train": "abc", "val": "de", "test": "fa"}.items():
        fill(tmp_path / split, classes)
    with pytest.raises(FewShotError, match="have 1 classes in common, such as a"):
        folder(str(tmp_path), 16, 3, 0.2, 0.2, 0)


def test_too_few_classes_are_refused_with_what_can_be_done_instead(tmp_path):
    fill(tmp_path, "abcd")
    with pytest.raises(FewShotError) as caught:
        split_of(tmp_path)
    message = str(caught.value)
    assert "has 4 folders with images" in message and "encoder=pretrained" in message and "\n" not in message
    with pytest.raises(FewShotError, match=r"there is no folder .*; choose the folder .* with data_dir=PATH"):
        split_of(tmp_path / "none")


def test_other_files_are_ignored_and_reported_and_a_broken_image_is_named(tmp_path, capsys):
    fill(tmp_path, "abcdef")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / "more").mkdir()
    shutil.copy(tmp_path / "b" / "0.png", tmp_path / "a" / "more" / "UPPER.PNG")
    source = folder(str(tmp_path), 16, 1, 0.2, 0.2, 0)
    assert "ignored 1 files" in capsys.readouterr().out
    bank = open_bank("mine", source, {}, tmp_path / "cache")
    assert bank.images.shape == (19, 16, 16, 1)
    (tmp_path / "c" / "1.png").write_bytes(b"no image")
    with pytest.raises(FewShotError, match=r"c/1\.png: not an image in a known format; replace or remove it"):
        open_bank("mine", folder(str(tmp_path), 16, 1, 0.2, 0.2, 0), {}, tmp_path / "cache")


def test_it_is_trained_and_tested_on(tmp_path, cache_dir):
    fill(tmp_path / "mine", [f"class {number}" for number in range(10)], images=4)
    task = [
        "way=2",
        "shot=1",
        "query=2",
        "train.way=3",
        "train.query=2",
        "train.episodes=2",
        "val.episodes=2",
        "test.episodes=2",
    ]
    make = ["dataset=folder", "dataset.size=16", "encoder.filters=4", f"data_dir={tmp_path / 'mine'}"]
    run_dir = tmp_path / "run"
    train(compose(*make, *task, f"run_dir={run_dir}", f"cache_dir={cache_dir}"))
    assert json.loads((run_dir / "results.json").read_text())["dataset"] == "folder"
    other = [f"run_dir={tmp_path / 'other'}", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(FewShotError, match=r"way=5 is more than the 2 classes of the val split; choose way=2"):
        train(compose(*make, *task, "way=5", *other))
    next((tmp_path / "mine").rglob("*.png")).write_bytes(b"no image")  # nobody has looked at it yet
    with pytest.raises(FewShotError, match="shot=1 and query=99 need 100 images of each class"):
        train(compose(*make, *task, "query=99", *other))


@pytest.mark.parametrize(
    "names", [("train", "valid", "test"), ("Train", "Validation", "TESTING"), ("base", "val", "novel")]
)
def test_splits_may_have_other_names_that_people_use(tmp_path, names):
    for split, classes in zip(names, ("abc", "de", "fg"), strict=True):
        fill(tmp_path / split, classes)
    assert split_of(tmp_path) == {"train": [*"abc"], "val": [*"de"], "test": [*"fg"]}


def test_folders_of_splits_are_not_taken_for_classes_nor_classes_for_splits(tmp_path):
    for split in ("train", "val"):
        fill(tmp_path / split, "abc")
    with pytest.raises(FewShotError, match=r"has the folders train, val, which are splits and .* but none for test"):
        split_of(tmp_path)
    fill(tmp_path / "vehicles", ["train", "base", "bus", "car", "bike", "boat", "plane"])
    assert sum(map(len, split_of(tmp_path / "vehicles").values())) == 7
