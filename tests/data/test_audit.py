import numpy as np
import pytest
from PIL import Image

from fewshot.data.audit import EXAMPLES, Audit

RANDOM = np.random.default_rng(0)


def pictures(count):
    return RANDOM.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)


def findings(*classes):
    audit = Audit()
    for name, split, images in classes:
        audit.add(name, split, images)
    every = np.concatenate([images for _, _, images in classes])
    return audit.findings(every.__getitem__)


def test_a_data_set_in_order_has_no_findings():
    assert findings(("a", "train", pictures(5)), ("b", "val", pictures(1)), ("c", "test", pictures(5))) == []


@pytest.mark.parametrize(
    ("names", "splits", "reported"),
    [
        (
            "ab",
            ("train", "test"),
            "duplicate images in more than one split, .*: b number 2 (test) = a number 4 (train)",
        ),
        ("ab", ("val", "val"), "duplicate images in two classes of a split, .*: a number 4 (val) = b number 2 (val)"),
        ("a", ("val",), "duplicate images twice in a class, .*: a number 4 (val) = a number 6 (val)"),
    ],
)
def test_a_picture_that_occurs_twice_is_reported(names, splits, reported):
    images = pictures(8)
    images[5] = images[3]
    images[0, 0, 0] = images[6, 0, 0]  # one pixel in common is none
    parts = np.split(images, len(names))
    (found,) = findings(*zip(names, splits, parts, strict=True))
    begin, end = reported.split(".*")
    assert found.startswith(begin) and found.endswith(f"{end} (1 in all)")


def test_a_picture_in_many_places_counts_once_for_each_kind_of_oddity():
    twin = pictures(1)
    classes = [
        (f"{n}", split, np.concatenate([pictures(2), twin, twin])) for n, split in enumerate(["train"] * 2 + ["val"])
    ]
    found = findings(*classes)
    assert len(found) == 3 and all(line.endswith("(1 in all)") for line in found)


def test_a_few_examples_are_named_and_the_rest_counted():
    shared = pictures(1000)
    (line,) = findings(("a", "train", shared), ("b", "test", shared))
    assert line.count("=") == EXAMPLES and line.endswith(", ... (1,000 in all)")


def test_classes_without_content_are_reported():
    blank = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 6, 6, 3), dtype=np.uint8)
    alike = np.repeat(pictures(1), 3, axis=0)
    found = findings(
        ("a", "train", blank), ("b", "train", alike), ("c", "val", pictures(1)), ("d", "test", pictures(3))
    )
    assert "blank classes, in which every image has one colour: a (train) (1 in all)" in found
    assert "classes that consist of one repeated image: b (train) (1 in all)" in found
    assert len(found) == 3  # the last: a picture that is in a class twice


@pytest.mark.parametrize(
    ("splits", "names", "reported"),
    [
        (("train", "test"), "ab", "in more than one split, so that the network is tested on what it was trained on"),
        (("val", "val"), "ab", "in two classes of a split, so that nothing distinguishes these"),
        (("val", "val"), "aa", "twice in a class, so that a query may be among its own support samples"),
    ],
)
def test_near_duplicates_are_reported_with_their_positions(splits, names, reported):
    noise = RANDOM.integers(0, 256, (6, 10, 10, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((40, 40), Image.BICUBIC)) for image in noise])
    images[4] = (images[1].astype(np.int16) + RANDOM.integers(-2, 3, images[1].shape)).clip(0, 255)[:, ::-1]
    parts = (
        [("a", splits[0], images)] if names == "aa" else [("a", splits[0], images[:3]), ("b", splits[1], images[3:])]
    )
    (line,) = findings(*parts)
    first, other = f"a number 2 ({splits[0]})", "a number 5 (val)" if names == "aa" else f"b number 2 ({splits[1]})"
    assert line.startswith(f"near-duplicate images (recompressed, resized or mirrored) {reported}: ")
    assert f"{first} ~ {other}" in line or f"{other} ~ {first}" in line
    assert line.endswith("(1 in all)")
