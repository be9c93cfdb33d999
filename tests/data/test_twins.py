"""Near-duplicates: copies are found, and similar images are not mistaken for copies."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from fewshot.data.audit import MAX_FOUND, Audit
from fewshot.data.images import to_pixels
from fewshot.data.twins import Known, are_twins, candidates, thumbnails

RANDOM = np.random.default_rng(0)


def photo(size=160):
    """Shapes at random and some noise, in colour, without any plain ground."""
    coarse = Image.fromarray(RANDOM.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    noise = RANDOM.normal(0, 6, (size, size, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


def product():
    """A thing on a white ground."""
    image = Image.new("RGB", (160, 160), "white")
    image.paste(photo(60), (40, 50))
    return image


def drawing(size=105):
    """Strokes on white."""
    image = Image.new("L", (size, size), 255)
    points = [tuple(point) for point in RANDOM.integers(10, size - 10, (5, 2)).tolist()]
    ImageDraw.Draw(image).line(points, fill=0, width=4)
    return image


def encoded(image, kind, **options):
    content = BytesIO()
    image.save(content, kind, **options)
    return Image.open(BytesIO(content.getvalue()))


COPIES = {
    "recompressed": lambda image: encoded(image, "JPEG", quality=40),
    "webp": lambda image: encoded(image, "WEBP", quality=60),
    "smaller": lambda image: image.resize((80, 80)),
    "larger": lambda image: image.resize((400, 400)),
    "smaller and recompressed": lambda image: encoded(image.resize((110, 110)), "JPEG", quality=75),
    "in a palette": lambda image: encoded(image, "GIF"),
}
MIRRORED = {
    "mirrored": ImageOps.mirror,
    "mirrored and recompressed": lambda image: encoded(ImageOps.mirror(image), "JPEG", quality=60),
}


def seen(image):
    """As a bank holds it."""
    grey = image.mode == "L"
    return to_pixels(image.convert("L" if grey else "RGB"), 28 if grey else 84, 1 if grey else 3)


def pairs(images):
    found = candidates(thumbnails(np.stack(images)))
    return {(one, other) for one, other, mirror in found if are_twins(images[one], images[other], mirror)}


@pytest.mark.parametrize("make", [photo, product])
@pytest.mark.parametrize("copy", [*COPIES, *MIRRORED])
def test_a_copy_of_a_photo_is_found_and_no_other(make, copy):
    originals = [make() for _ in range(60)]
    images = [seen(image) for image in [*originals, *map((COPIES | MIRRORED)[copy], originals)]]
    found = pairs(images)
    assert found <= {(number, number + 60) for number in range(60)} and len(found) >= 57
    known = Known(images[:60])
    assert [known.find(image) for image in images[60:]] == list(range(60))
    assert known.find(seen(make())) is None


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_drawing_is_found_and_no_other(copy):
    originals = [drawing() for _ in range(60)]
    images = [seen(image) for image in [*originals, *(COPIES[copy](image).convert("L") for image in originals)]]
    assert {(number, number + 60) for number in range(60)} == pairs(images)


def test_a_mirrored_letter_is_another_letter():
    letter = drawing()
    images = [seen(letter), seen(ImageOps.mirror(letter))]
    assert not pairs(images) and Known(images[:1]).find(images[1]) is None


def test_hands_that_draw_the_same_letter_draw_no_twins():
    """Strokes between the same points, each time a little elsewhere."""
    images = []
    for _ in range(100):
        points = [(20, 20), (85, 30), (30, 80), (80, 85)]
        image = Image.new("L", (105, 105), 255)
        ImageDraw.Draw(image).line([tuple(np.add(p, RANDOM.integers(-5, 6, 2))) for p in points], fill=0, width=4)
        images.append(seen(image))
    assert len(pairs(images)) <= 3


def test_images_without_contrast_resemble_nothing():
    images = [np.full((28, 28, 1), value, np.uint8) for value in range(0, 250, 10)]
    assert not pairs(images) and Known(images).find(images[3]) is None


def test_very_many_copies_are_counted_no_further_than_to_a_limit():
    one = seen(photo()).astype(np.int16)
    frames = (one + RANDOM.integers(-3, 4, (MAX_FOUND, *one.shape))).clip(0, 255).astype(np.uint8)
    audit = Audit()
    audit.add("film", "train", frames)
    (line,) = audit.findings(frames.__getitem__)
    assert line.startswith("near-duplicate images (recompressed, resized or mirrored) twice in a class")
    assert line.endswith("(1,000 or more in all)")
