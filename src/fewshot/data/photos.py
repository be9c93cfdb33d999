"""User-supplied images: from any camera, scanner or drawing program, of any shape."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fewshot.data.files import ImageFile
from fewshot.data.images import MODES, opened, to_pixels


def read_photo(file: ImageFile, size: int, channels: int, ink: bool = False) -> NDArray[np.uint8]:
    """Read an image file and prepare it for an encoder, see ``prepare``.

    Raises:
        FewShotError: see ``opened``.
    """
    with opened(file) as image:
        return prepare(image, size, channels, ink)


def prepare(image: Image.Image, size: int, channels: int, ink: bool = False) -> NDArray[np.uint8]:
    """Convert an image of any shape and mode to the pixels that an encoder expects.

    It is rotated according to its EXIF data. Transparent pixels become white; grey values of more than 8 bits are
    stretched to the full range; only the first frame of an animation is used. A photo that is not square is cropped to
    its middle, at full height or width, because squeezing would distort shapes.

    Args:
        image: as decoded.
        size: height and width of the result.
        channels: 1 for grey, 3 for RGB.
        ink: the image is a letter or drawing, for a network trained on bright ink on black: an image with a bright
            background is inverted, and one that is not square is padded with its background, so that no stroke is
            cut off.

    Returns:
        uint8 ``[size, size, channels]``.
    """
    upright = _opaque(_eight_bits(ImageOps.exif_transpose(image)))
    return _bright_ink(upright, size, channels) if ink else to_pixels(_middle(upright), size, channels)


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


def _bright_ink(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    image = image.convert(MODES[channels])
    sides = (max(image.size),) * 2
    background = _background(np.asarray(image).reshape(image.height, image.width, channels))
    pixels = to_pixels(ImageOps.pad(image, sides, color=tuple(background.tolist())), size, channels)
    bright = _background(pixels).mean() > (float(pixels.min()) + float(pixels.max())) / 2
    return 255 - pixels if bright else pixels


def _background(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the median of the outermost pixels, uint8 ``[channels]``."""
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edges, axis=0).astype(np.uint8)
