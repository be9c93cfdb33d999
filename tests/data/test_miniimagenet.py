import csv
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import damaged, listing, nothing_touched
from fewshot.data.bank import SPLITS, open_bank
from fewshot.data.episodes import EpisodeDataset
from fewshot.data.miniimagenet import miniimagenet
from fewshot.errors import FewShotError

FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
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


def write_one_zip(folder: Path) -> None:
    write_tables(folder)
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for split in SPLITS:
            for name, (_, contents) in members(split).items():
                archive.writestr(name, contents)


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


def of_python_2(value) -> bytes:
    """The opcodes with which a pickle of Python 2 holds nested dictionaries, lists and arrays of bytes."""
    if isinstance(value, dict):
        return b"}(" + b"".join(of_python_2(key) + of_python_2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(of_python_2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + value.to_bytes(4, "little", signed=True)
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    shape = b"(" + b"".join(map(of_python_2, value.shape)) + b"t"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    contents = b"T" + value.nbytes.to_bytes(4, "little") + value.tobytes()
    return empty + b"(K\x01" + shape + dtype + b"\x89" + contents + b"tb"


def write_python_2_caches(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        contents = b"\x80\x02" + of_python_2(cache_of(split)) + b"."
        (folder / f"mini-imagenet-cache-{split}.pkl").write_bytes(contents)


def write_labelled_caches(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test", "train_phase_val", "train_phase_test"):
        cache = cache_of(split if split in SPLITS else "train")
        labels = [number for number in range(len(cache["class_dict"])) for _ in range(COUNT)]
        name = "train_phase_train" if split == "train" else split
        contents = pickle.dumps({"data": cache["image_data"], "labels": labels})
        (folder / f"miniImageNet_category_split_{name}.pickle").write_bytes(contents)


LAYOUTS = {
    "images": write_images,
    "zips": write_zips,
    "one zip": write_one_zip,
    "folders": write_folders,
    "caches": write_caches,
    "caches, newest protocol": lambda folder: write_caches(folder, pickle.HIGHEST_PROTOCOL),
    "caches of Python 2": write_python_2_caches,
    "labelled caches": write_labelled_caches,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "data" / "miniimagenet")
    before = listing(tmp_path / "data")
    source = miniimagenet(str(tmp_path / "data"), 84)
    bank = open_bank("miniimagenet", source, {}, tmp_path / "cache")
    assert listing(tmp_path / "data") == before
    files = {name for name in before if Path(name).is_file() and "train_phase_val" not in name}
    assert {str(path) for path in source.files} == {name for name in files if "train_phase_test" not in name}
    assert len(set(bank.names)) == 5
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


@pytest.mark.parametrize("name", ["miniimagenet", "mini-imagenet", "mini_imagenet", "miniImageNet"])
def test_the_folder_may_have_any_of_its_usual_names(tmp_path, name):
    write_folders(tmp_path / name)
    assert len(read(tmp_path).classes()) == 5


@pytest.mark.parametrize("layout", ["images", "caches"])
def test_images_come_in_the_size_asked_for(tmp_path, layout):
    LAYOUTS[layout](tmp_path / "miniimagenet")
    for image_class in miniimagenet(str(tmp_path), 42).classes():
        images = image_class.load()
        assert images.shape == (COUNT, 42, 42, 3)
        assert np.abs(images[0].astype(int) - photo(image_class.split, 0, 42)).mean() < 4


def test_arrays_of_a_cache_may_have_any_order_of_bytes_and_axes(tmp_path):
    write_caches(tmp_path / "miniimagenet")
    images = np.random.default_rng(0).integers(0, 256, (4, 84, 84, 3), dtype=np.uint8)
    cache = {"image_data": np.asfortranarray(images), "class_dict": {"n03": np.array([3, 1], dtype=">i8")}}
    (tmp_path / "miniimagenet" / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(cache, 2))
    (of_val,) = (c for c in read(tmp_path).classes() if c.split == "val")
    assert np.array_equal(of_val.load(), images[[3, 1]])


def test_files_that_are_no_image_of_a_class_are_ignored(tmp_path):
    folder = tmp_path / "miniimagenet"
    write_folders(folder)
    for name in ("n03/notes.txt", "stray.jpg"):
        (folder / "val" / name).write_bytes(b"no image")
    (folder / "val" / "n03" / "n0300000001.jpg").rename(folder / "val" / "n03" / "n0300000001.JPEG")
    (of_val,) = (c for c in read(tmp_path).classes() if c.split == "val")
    assert of_val.name == "n03" and of_val.load().shape == (COUNT, 84, 84, 3)


def test_a_split_without_images_is_named(tmp_path):
    write_folders(tmp_path / "miniimagenet")
    for path in (tmp_path / "miniimagenet" / "val" / "n03").iterdir():
        path.unlink()
    with pytest.raises(FewShotError, match=r"miniimagenet/val contains no folder with images"):
        read(tmp_path).classes()


def test_an_unpacked_image_is_preferred_to_one_in_a_zip(tmp_path):
    write_zips(tmp_path / "miniimagenet")
    (tmp_path / "miniimagenet" / "images").mkdir()
    (tmp_path / "miniimagenet" / "images" / "n0300000000.jpg").write_bytes(as_jpeg(np.full((84, 84, 3), 250, np.uint8)))
    (of_val,) = (c for c in read(tmp_path).classes() if c.split == "val")
    assert of_val.load()[0].min() > 240


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


@pytest.mark.parametrize(
    ("table", "reported"),
    [
        (b"", "has no rows"),
        (b"filename,label\n", "has no rows"),
        (b"filename,label\nx.jpg\n", "rows without an image or a label"),
        (b"filename,kind\nx.jpg,n03\n", r"has no column of labels \(such as label\), only filename, kind: rename one"),
        (b"id;label\nx.jpg;n03\n", r"has no column of images \(such as filename\), only id, label"),
        ("filename,label\nx.jpg,n03\n".encode("utf-16"), "is not UTF-8 at byte 0: save it as UTF-8"),
        ("filename,label\nx.jpg,für\n".encode("latin1"), "is not UTF-8 at byte 22"),
        (b"filename,label\nx.jpg," + b"n" * 200_000 + b"\n", "field larger than field limit"),
        (b'filename,label\n"n0300000000.jpg,n03\nn0300000001.jpg,n03\n', "unexpected end of data"),
        (b"filename,label\nx.jpg\0,n03\n", "1 of the 1 images"),
        (b"filename,label\n\x1b[2J.jpg,n03\n", r"for example \\x1b\[2J\.jpg"),
    ],
)
def test_what_is_wrong_with_a_table_is_reported_in_one_line(tmp_path, table, reported):
    write_images(tmp_path / "miniimagenet")
    (tmp_path / "miniimagenet" / "val.csv").write_bytes(table)
    with pytest.raises(FewShotError, match=reported) as caught:
        read(tmp_path).classes()
    assert "val.csv" in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("split", ["val", "train"])
def test_an_image_that_is_listed_twice_is_refused(tmp_path, split):
    write_images(tmp_path / "miniimagenet")
    with (tmp_path / "miniimagenet" / f"{split}.csv").open("a") as file:
        file.write("n0300000001.jpg,n03\n")
    with pytest.raises(FewShotError, match=r"1 images are listed more than once .*for example n0300000001\.jpg"):
        read(tmp_path).classes()


@pytest.mark.parametrize("layout", ["images", "zips"])
def test_two_files_of_one_name_are_refused_since_a_table_cannot_tell_them_apart(tmp_path, layout):
    folder = tmp_path / "miniimagenet"
    LAYOUTS[layout](folder)
    if layout == "images":
        (folder / "images" / "more").mkdir()
        (folder / "images" / "more" / "n0300000001.jpg").write_bytes(as_jpeg(photo("val", 0)))
    else:
        with zipfile.ZipFile(folder / "images_val.zip", "a") as archive:
            archive.writestr("more/n0300000001.jpg", as_jpeg(photo("val", 0)))
            archive.writestr("README", b"")
            archive.writestr("more/README", b"")
    with pytest.raises(FewShotError, match=r"two files n0300000001\.jpg, .*more/n0300000001\.jpg"):
        read(tmp_path).classes()


def test_a_table_of_one_label_leaves_nothing_to_tell_apart(tmp_path):
    write_images(tmp_path / "miniimagenet")
    table = tmp_path / "miniimagenet" / "train.csv"
    table.write_text(table.read_text().replace(",n02", ",n01"))
    bank = open_bank("miniimagenet", read(tmp_path), {}, tmp_path / "cache")
    with pytest.raises(FewShotError, match="the train split has only the class n01"):
        EpisodeDataset(bank, "train", way=2, shot=1, query=1, seed=0)


def test_the_same_photo_under_two_names_in_two_splits_is_reported(tmp_path):
    write_images(tmp_path / "miniimagenet")
    images = tmp_path / "miniimagenet" / "images"
    for name in members("train") | members("val") | members("test"):
        noise = np.random.default_rng(int(name[1:11])).integers(0, 256, (84, 84, 3), dtype=np.uint8)
        (images / name).write_bytes(as_jpeg(noise))
    (images / "n0400000001.jpg").write_bytes((images / "n0100000002.jpg").read_bytes())
    (finding,) = open_bank("miniimagenet", read(tmp_path), {}, tmp_path / "cache").findings
    assert "in more than one split" in finding and "n04 number 2 (test) = n01 number 3 (train)" in finding


def test_photos_that_vanish_after_they_were_listed_are_named(tmp_path):
    write_images(tmp_path / "miniimagenet")
    source = read(tmp_path)
    listed = source.classes()
    (tmp_path / "miniimagenet" / "images" / "n0400000002.jpg").unlink()
    with pytest.raises(FewShotError, match=r"n0400000002\.jpg: .*No such file"):
        next(image_class for image_class in listed if image_class.name == "n04").load()
    with pytest.raises(FewShotError, match=r"cannot read .*n0400000002\.jpg: No such file"):
        open_bank("miniimagenet", source, {}, tmp_path / "cache")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "miniimagenet"
    write_images(folder)
    (folder.parent / "secret.jpg").write_bytes(as_jpeg(photo("val", 0)))
    return folder


FIELDS = st.sampled_from(
    [
        *(
            "n0300000000.jpg",
            "n0300000001.jpg",
            "n0300000002.jpg",
            "n0100000000.jpg",
            "n03",
            "n03",
            "n01",
            "../secret.jpg",
        ),
        *("/etc/passwd", "", '"', "a\0", "\x1b[2J", "x" * 140_000, "é", "\ufeff", "\u2028", "filename", "label"),
    ]
)


@st.composite
def csv_files(draw):
    """Tables that are often good, in a good encoding or another."""
    names = st.sampled_from([f"n030000000{number}.jpg" for number in range(COUNT)])
    good = st.tuples(names, st.sampled_from(["n03", "n03", "n30", "n01"]))
    rows = draw(
        st.lists(good, max_size=4, unique_by=lambda row: row[0]) | st.lists(st.lists(FIELDS, max_size=4), max_size=5)
    )
    header = draw(
        st.just(["filename", "label"]) | st.permutations(["filename", "label", "x"]) | st.lists(FIELDS, max_size=3)
    )
    comma, end = draw(st.sampled_from([",", ",", ",", ";", "\t"])), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    text = end.join(comma.join(row) for row in [header, *rows])
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-7", "cp1252"])), "replace")


@given(table=damaged(csv_files(), FIELDS.map(str.encode)))
def test_whatever_a_table_holds_it_is_read_or_refused_in_one_line(tables, table):
    (tables / "val.csv").write_bytes(table)
    before = listing(tables.parent)
    try:
        with nothing_touched():
            of_val = [c for c in read(tables.parent).classes() if c.split == "val"]
            images = [c.load() for c in of_val]
    except FewShotError as error:
        assert str(tables) in str(error) and len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert of_val and len({c.name for c in of_val}) == len(of_val)
        assert [image.shape for image in images] == [(c.count, 84, 84, 3) for c in of_val]
    assert listing(tables.parent) == before


def test_a_table_saved_by_a_spreadsheet_is_read(tmp_path):
    write_images(tmp_path / "miniimagenet")
    table = tmp_path / "miniimagenet" / "val.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert len(read(tmp_path).classes()) == 5


@pytest.mark.parametrize("layout", ["images", "caches"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_in_place_of_a_file_is_named(tmp_path, layout, make):
    LAYOUTS[layout](tmp_path / "miniimagenet")
    file = tmp_path / "miniimagenet" / ("val.csv" if layout == "images" else "mini-imagenet-cache-val.pkl")
    file.unlink()
    make(file)
    with pytest.raises(FewShotError, match=str(file)):
        open_bank("miniimagenet", read(tmp_path), {}, tmp_path / "cache")


@pytest.mark.parametrize("name", ["../secret.jpg", "../../etc/passwd", "../n0300000001.jpg", "{}/secret.jpg"])
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


def test_a_corrupt_photo_is_named(tmp_path):
    write_images(tmp_path / "miniimagenet")
    broken = tmp_path / "miniimagenet" / "images" / "n0400000002.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(FewShotError, match=str(broken)):
        open_bank("miniimagenet", read(tmp_path), {}, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


class Exploit:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["system", "eval", "getattr", "open", "memmap", "hidden in an array"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, kind):
    marker = tmp_path / "owned"
    exploit = {
        "system": Exploit(os.system, f"touch {marker}"),
        "eval": Exploit(eval, f"open({str(marker)!r}, 'w')"),
        "getattr": Exploit(getattr, np.zeros(1), "dump"),
        "open": Exploit(open, str(marker), "w"),
        "memmap": Exploit(np.memmap, str(marker), "uint8", "w+", 0, (1,)),
        "hidden in an array": np.array([Exploit(os.system, f"touch {marker}")], dtype=object),
    }[kind]
    write_caches(tmp_path / "miniimagenet")
    cache = cache_of("val") | {"extra": exploit}
    (tmp_path / "miniimagenet" / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(cache))
    with pytest.raises(FewShotError, match=r"cache-val\.pkl is not .*which (is not an array|are not numbers)"):
        read(tmp_path).classes()
    assert not marker.exists()


class Forged:
    """A dtype of objects that tells numpy it is none, so that bytes of the file become addresses."""

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


def test_a_pickle_that_would_pass_bytes_off_as_objects_is_refused(tmp_path):
    write_caches(tmp_path / "miniimagenet")
    cache = cache_of("val") | {"extra": Exploit(FROM_BUFFER, bytes(8), Forged(), (1,), "C")}
    (tmp_path / "miniimagenet" / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(cache))
    with pytest.raises(FewShotError, match=r"cache-val\.pkl"):
        read(tmp_path).classes()


@pytest.mark.parametrize(
    "contents",
    [
        pickle.dumps(cache_of("val"))[:5000],
        b"not a pickle",
        b"",
        pickle.dumps(cache_of("val"), 2)[:5000],
        pickle.dumps(7),
        pickle.dumps({"data": np.zeros((3, 84, 84, 3), np.uint8)}),
        pickle.dumps({"data": np.zeros((3, 84, 84, 3), np.uint8), "labels": [0, 1]}),
        pickle.dumps({"data": np.zeros((3, 84, 84, 3), np.uint8), "labels": [0] * 4}),
        pickle.dumps(cache_of("val") | {"image_data": np.zeros((3, 84, 84), np.uint8)}),
        pickle.dumps(cache_of("val") | {"image_data": np.zeros((3, 84, 84, 4), np.uint8)}),
        pickle.dumps(cache_of("val") | {"class_dict": {"n03": [0, -1]}}),
        pickle.dumps(cache_of("val") | {"class_dict": {"n03": [0, 0.5]}}),
        pickle.dumps(cache_of("val") | {"class_dict": {"n03": [[0, 1]]}}),
        pickle.dumps(cache_of("val") | {"class_dict": {"n03": 1}}),
        pickle.dumps(cache_of("val") | {"class_dict": [0, 1]}),
        pickle.dumps("x").replace(b"\x8c\x01x", b"\x8e" + b"\xff" * 8),  # a length beyond all bounds
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
    before = listing(real_data)
    classes = miniimagenet(str(real_data), 84).classes()
    assert [sum(c.split == split for c in classes) for split in SPLITS] == [64, 16, 20]
    assert len({c.name for c in classes}) == 100
    assert {c.count for c in classes if c.split != "train"} == {600}
    assert {c.count for c in classes if c.split == "train"} <= {300, 600}
    images = classes[70].load()
    assert images.shape == (600, 84, 84, 3)
    assert 60 < images.mean() < 180 and images.std() > 30
    assert listing(real_data) == before
