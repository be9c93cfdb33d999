from itertools import combinations

import numpy as np
import pytest
import torch

from fewshot.data.audit import Audit
from fewshot.data.bank import SPLITS
from fewshot.data.glyphs import SCRIPTS, glyphs
from fewshot.errors import FewShotError

SIZE, SAMPLES = 28, 20


@pytest.fixture(scope="module")
def classes():
    return glyphs(SIZE, SAMPLES, 0).classes()


@pytest.fixture(scope="module")
def images(classes):
    return {image_class.name: image_class.load() for image_class in classes}


def scripts(classes, split):
    return {image_class.name.split()[0] for image_class in classes if image_class.split == split}


def test_there_are_hundreds_of_letters_with_scripts_of_their_own_in_each_split(classes):
    names = [image_class.name for image_class in classes]
    assert len(set(names)) == len(names) >= 400
    counts = [sum(image_class.split == split for image_class in classes) for split in SPLITS]
    assert all(count >= least for count, least in zip(counts, (300, 40, 100), strict=True))
    for a, b in combinations(SPLITS, 2):
        assert not scripts(classes, a) & scripts(classes, b)
    assert all(scripts(classes, split) == set(SCRIPTS[split]) for split in ("val", "test"))


@pytest.mark.parametrize(
    "alike",
    [
        ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A"),
        ("LATIN SMALL LETTER A", "CYRILLIC SMALL LETTER A"),
        ("LATIN SMALL LETTER O", "GREEK SMALL LETTER OMICRON", "CYRILLIC SMALL LETTER O", "LATIN CAPITAL LETTER O"),
        ("LATIN CAPITAL LETTER C", "LATIN SMALL LETTER C", "CYRILLIC CAPITAL LETTER ES"),
        ("LATIN SMALL LETTER S", "LATIN CAPITAL LETTER S"),
    ],
)
def test_letters_that_look_alike_are_not_two_classes(classes, alike):
    assert sum(image_class.name in alike for image_class in classes) <= 1


def test_every_sample_is_distinct_and_legible(images):
    for name, drawn in images.items():
        assert (drawn.shape, drawn.dtype) == ((SAMPLES, SIZE, SIZE, 1), np.uint8)
        assert len({sample.tobytes() for sample in drawn}) == SAMPLES, name
        ink = drawn.mean((1, 2, 3)) / 255
        assert ink.min() > 0.01 and ink.max() < 0.6, name
        assert drawn.max((1, 2, 3)).min() > 100, name


def test_nothing_is_odd_about_the_images(classes, images):
    audit = Audit()
    for image_class in classes:
        audit.add(image_class.name, image_class.split, images[image_class.name])
    assert audit.findings(np.concatenate([images[image_class.name] for image_class in classes]).__getitem__) == []


def test_it_is_drawn_alike_alone_again_and_with_another_number_of_threads(classes, images):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for image_class in glyphs(SIZE, SAMPLES, 0).classes()[::-97]:
            assert np.array_equal(image_class.load(), images[image_class.name])
    finally:
        torch.set_num_threads(threads)
    other = glyphs(SIZE, SAMPLES, 1).classes()[5]
    assert other.name == classes[5].name
    assert not np.array_equal(other.load(), images[other.name])


def test_size_and_samples_are_honoured():
    assert glyphs(40, 3, 0).classes()[0].load().shape == (3, 40, 40, 1)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"samples": 0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(FewShotError, match=f"{next(iter(wrong))}=0"):
        glyphs(**{"size": 28, "samples": 20, "seed": 0} | wrong)


def nearest_pixels(classes, images, episodes=300):
    """Accuracy of the nearest support image by pixels, 5-way 1-shot on the test classes."""
    random = np.random.default_rng(0)
    test = np.stack([images[c.name].reshape(SAMPLES, -1) for c in classes if c.split == "test"]).astype(np.float32)
    right = 0.0
    for _ in range(episodes):
        drawn = test[random.choice(len(test), 5, replace=False)][:, random.permutation(SAMPLES)[:16]]
        support, query = drawn[:, 0], drawn[:, 1:].reshape(75, -1)
        nearest = ((query[:, None] - support) ** 2).sum(2).argmin(1)
        right += float((nearest == np.repeat(np.arange(5), 15)).mean())
    return right / episodes


def test_pixels_alone_carry_little_information(classes, images):
    """What a trained encoder's accuracy is to be compared with; see the README for that."""
    assert 0.4 < nearest_pixels(classes, images) < 0.6
