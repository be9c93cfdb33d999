"""User-supplied images: from any camera, scanner or drawing program, of any shape."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fewshot.data.files import ImageFile
from fewshot.data.images import MODES, opened, to_pixels
from fewshot.errors import FewShotError

CROPS = ("auto", "center", "pad", "squash")
MAX_THREADS = 8  # each may decode an image of 90 million pixels
MAX_ASPECT = 32  # times the shorter side: of a longer strip, no crop shows anything


class Photo(NamedTuple):
    """An image that was read.

    Attributes:
        digest: SHA-256 of the bytes of its file.
        pixels: uint8 ``[size, size, channels]``.
    """

    digest: bytes
    pixels: NDArray[np.uint8]


def read_ahead(
    files: Iterable[ImageFile], read: Callable[[ImageFile], NDArray[np.uint8]], ahead: int = 256
) -> Iterator[tuple[ImageFile, Photo | FewShotError]]:
    """Read images on all cores, while the caller works on earlier ones: decoders do not hold Python's lock.

    Args:
        files: the images.
        read: reads one.
        ahead: at most so many images are read before they are taken.

    Yields:
        Each file, in order, with its image or the reason why it cannot be read.
    """

    def read_one(file: ImageFile) -> Photo | FewShotError:
        contents: list[bytes] = []  # read only once, where errors are reported

        def once() -> bytes:
            contents.append(file.read())
            return contents[0]

        try:
            pixels = read(ImageFile(file.name, once))
        except FewShotError as error:
            return error
        return Photo(hashlib.sha256(contents[0]).digest(), pixels)

    pool = ThreadPoolExecutor(min(MAX_THREADS, max(2, os.cpu_count() or 1)))
    try:
        coming = ((file, pool.submit(read_one, file)) for file in files)
        waiting = deque(islice(coming, ahead))
        while waiting:
            file, reading = waiting.popleft()
            waiting.extend(islice(coming, 1))
            yield file, reading.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_photo(
    file: ImageFile, size: int, channels: int, ink: bool = False, crop: str = "auto", reduced: bool = False
) -> NDArray[np.uint8]:
    """Read an image file and prepare it for an encoder, see ``prepare``.

    Args:
        file: the image file.
        size: height and width of the result.
        channels: 1 for grey, 3 for RGB.
        ink: see ``prepare``.
        crop: see ``prepare``.
        reduced: decode a JPEG at a reduced size, see ``opened``, but at least twice the size of the result. That takes
            a fraction of the time, and changes pixels by a few grey values.

    Raises:
        FewShotError: see ``opened``; or a side is more than ``MAX_ASPECT`` times the other.
    """
    with opened(file, 2 * size if reduced else None, channels) as image:
        return prepare(image, size, channels, ink, crop)


def prepare(image: Image.Image, size: int, channels: int, ink: bool = False, crop: str = "auto") -> NDArray[np.uint8]:
    """Convert an image of any shape and mode to the pixels that an encoder expects.

    It is rotated according to its EXIF data. Transparent pixels become white; grey values of more than 8 bits are
    stretched to the full range; only the first frame or page is used.

    Args:
        image: as decoded.
        size: height and width of the result.
        channels: 1 for grey, 3 for RGB.
        ink: the image is a letter or drawing, for a network trained on bright ink on black: an image with a bright
            background is inverted.
        crop: what becomes of an image that is not square. "center": its middle is used, at full height or width;
            "pad": it is padded with the median colour of its edges; "squash": its shape is distorted; "auto":
            "center", because squeezing would distort shapes, or with ``ink`` "pad", so that no stroke is cut off.

    Returns:
        uint8 ``[size, size, channels]``.

    Raises:
        ValueError: a side is more than ``MAX_ASPECT`` times the other.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"it is a strip of {image.width:,}x{image.height:,} pixels, which shows nothing when resized")
    image = _opaque(_eight_bits(ImageOps.exif_transpose(image)))
    if crop == "center" or (crop == "auto" and not ink):
        image = _middle(image)
    elif crop != "squash":
        image = image.convert(MODES[channels])
        edges = _background(np.asarray(image).reshape(image.height, image.width, channels))
        image = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color=tuple(edges.tolist()))
    pixels = to_pixels(image, size, channels)
    bright = ink and _background(pixels).mean() > (float(pixels.min()) + float(pixels.max())) / 2
    return 255 - pixels if bright else pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = values.min(), values.max()
    return Image.fromarray((255 * (values - low) / max(high - low, 1e-9)).round().astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _middle(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _background(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the median of the outermost pixels, uint8 ``[channels]``."""
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edges, axis=0).astype(np.uint8)
