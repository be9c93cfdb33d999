import csv
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot.data.bank import SPLITS, open_bank
from fewshot.data.miniimagenet import miniimagenet
from fewshot.errors import FewShotError

CLASSES = {"train": ("n01", "n02"), "val": ("n03",), "test": ("n04", "n05")}
COUNT = 3


def photo(split: str, number: int, size: int = 84) -> np.ndarray:
    # Smooth, so that JPEG keeps it nearly as it is.
    ramp = np.linspace(0, 100 + 40 * number, size * size).reshape(size, size, 1)
    return (ramp + np.array([10, 40, 20 * len(split)])).astype(np.uint8)


def as_jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=98)
    return buffer.getvalue()


def members(split: str) -> dict[str, tuple[str, bytes]]:
    """File name to label and contents; one image is not 84 pixels wide."""
    return {
        f"{label}{number:08}.jpg": (label, as_jpeg(photo(split, number, 84 if number else 120)))
        for label in CLASSES[split]
        for number in range(COUNT)
    }


def write_tables(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [("filename", "label"), *((n, label) for n, (label, _) in members(split).items())]
            )


def write_images(folder: Path) -> None:
    write_tables(folder)
    (folder / "images").mkdir()
    for split in SPLITS:
        for name, (_, contents) in members(split).items():
            (folder / "images" / name).write_bytes(contents)


def write_zips(folder: Path) -> None:
    write_tables(folder)
    for split in SPLITS:
        with zipfile.ZipFile(folder / f"images_{split}.zip", "w") as archive:
            for name, (_, contents) in members(split).items():
                archive.writestr(f"images/{name}", contents)


def write_folders(folder: Path) -> None:
    for split in SPLITS:
        for name, (label, contents) in members(split).items():
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            (folder / split / label / name).write_bytes(contents)


def cache_of(split: str) -> dict:
    images = np.stack([photo(split, number) for _ in CLASSES[split] for number in range(COUNT)])
    positions = {label: list(range(n * COUNT, (n + 1) * COUNT)) for n, label in enumerate(CLASSES[split])}
    return {"image_data": images, "class_dict": positions}


def write_caches(folder: Path, protocol: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(cache_of(split), protocol))


def write_labelled_caches(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test", "train_phase_val", "train_phase_test"):
        of = cache_of(split if split in SPLITS else "train")
        labels = [number for number in range(len(of["class_dict"])) for _ in range(COUNT)]
        name = "train_phase_train" if split == "train" else split
        contents = pickle.dumps({"data": of["image_data"], "labels": labels})
        (folder / f"miniImageNet_category_split_{name}.pickle").write_bytes(contents)


LAYOUTS = {
    "images": write_images,
    "zips": write_zips,
    "folders": write_folders,
    "caches": write_caches,
    "caches, newest protocol": lambda folder: write_caches(folder, pickle.HIGHEST_PROTOCOL),
    "labelled caches": write_labelled_caches,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["miniimagenet", "mini-imagenet"])
def test_every_layout_is_read(tmp_path, layout, name):
    LAYOUTS[layout](tmp_path / "data" / name)
    bank = open_bank("miniimagenet", miniimagenet(str(tmp_path / "data"), 84), {}, tmp_path / "cache")
    assert bank.images.shape == (5 * COUNT, 84, 84, 3)
    assert bank.splits == ("train", "train", "val", "test", "test")
    if "labelled" not in layout:
        assert bank.names == ("n01", "n02", "n03", "n04", "n05")
    for number, split in enumerate(bank.splits):
        images = bank.images[bank.offsets[number] : bank.offsets[number + 1]].numpy().astype(int)
        for position, image in enumerate(images):
            assert np.abs(image - photo(split, position)).mean() < 4, (split, position)


def read(tmp_path):
    return miniimagenet(str(tmp_path), 84)


def test_where_it_is_absent_three_lines_say_what_to_put_where(tmp_path):
    with pytest.raises(FewShotError) as caught:
        read(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for word in (str(tmp_path / "miniimagenet"), "images/", "train.csv", "mini-imagenet-cache", "data_dir=PATH"):
        assert word in str(caught.value)


def test_a_half_unpacked_folder_is_refused(tmp_path):
    write_images(tmp_path / "miniimagenet")
    (tmp_path / "miniimagenet" / "images" / "n0200000001.jpg").unlink()
    with pytest.raises(FewShotError, match=r"1 of the 6 images .*train\.csv.* n0200000001\.jpg"):
        read(tmp_path).classes()


@pytest.mark.parametrize("table", ["", "a,b\n1,2\n", "filename,label\n", "filename,label\nx.jpg\n", "\xff\xfe\x00"])
def test_a_broken_table_is_named(tmp_path, table):
    write_images(tmp_path / "miniimagenet")
    (tmp_path / "miniimagenet" / "val.csv").write_bytes(table.encode("latin1"))
    with pytest.raises(FewShotError, match=r"val\.csv"):
        read(tmp_path).classes()


@pytest.mark.parametrize("name", ["../secret.jpg", "{}/secret.jpg"])
def test_a_table_cannot_reach_outside_the_folder(tmp_path, name):
    write_images(tmp_path / "miniimagenet")
    (tmp_path / "secret.jpg").write_bytes(as_jpeg(photo("val", 0)))
    (tmp_path / "miniimagenet" / "val.csv").write_text(f"filename,label\n{name.format(tmp_path)},n03\n")
    with pytest.raises(FewShotError, match="1 of the 1 images"):
        read(tmp_path).classes()


def test_a_corrupt_image_is_named(tmp_path):
    write_zips(tmp_path / "miniimagenet")
    with zipfile.ZipFile(tmp_path / "miniimagenet" / "images_val.zip", "w") as archive:
        for number in range(COUNT):
            archive.writestr(f"images/n03{number:08}.jpg", b"broken")
    with pytest.raises(FewShotError, match=r"images_val\.zip:images/n0300000000\.jpg"):
        open_bank("miniimagenet", read(tmp_path), {}, tmp_path / "cache")


class Exploit:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["system", "eval", "getattr", "open"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, kind):
    marker = tmp_path / "owned"
    exploit = {
        "system": Exploit(os.system, f"touch {marker}"),
        "eval": Exploit(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Exploit(getattr, np.zeros(1), "dump"),
        "open": Exploit(open, str(marker), "w"),
    }[kind]
    write_caches(tmp_path / "miniimagenet")
    cache = cache_of("val") | {"extra": exploit}
    (tmp_path / "miniimagenet" / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(cache))
    with pytest.raises(FewShotError, match=r"cache-val\.pkl is not .*which is no array"):
        read(tmp_path).classes()
    assert not marker.exists()


@pytest.mark.parametrize(
    "contents",
    [
        pickle.dumps(cache_of("val"))[:5000],
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"image_data": np.zeros((3, 84, 84))}),
        pickle.dumps(cache_of("val") | {"image_data": np.zeros((3, 84, 84, 3))}),
        pickle.dumps(cache_of("val") | {"class_dict": {"n03": [0, 99]}}),
        pickle.dumps(cache_of("val") | {"class_dict": {"n03": []}}),
    ],
)
def test_a_broken_cache_is_named(tmp_path, contents):
    write_caches(tmp_path / "miniimagenet")
    (tmp_path / "miniimagenet" / "mini-imagenet-cache-val.pkl").write_bytes(contents)
    with pytest.raises(FewShotError, match=r"cache-val\.pkl"):
        read(tmp_path).classes()


@pytest.mark.real_data
def test_the_real_files_have_100_disjoint_classes(real_data):
    classes = miniimagenet(str(real_data), 84).classes()
    assert [sum(c.split == split for c in classes) for split in SPLITS] == [64, 16, 20]
    assert len({c.name for c in classes}) == 100
    assert {c.count for c in classes if c.split != "train"} == {600}
    assert classes[70].load().shape == (600, 84, 84, 3)
