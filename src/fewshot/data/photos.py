"""Images as people have them: from any camera, scanner or drawing program, of any shape."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fewshot.data.files import ImageFile
from fewshot.data.images import MODES, opened, to_pixels


def read_photo(file: ImageFile, size: int, channels: int, ink: bool = False) -> NDArray[np.uint8]:
    """Read an image file as an encoder is to see it; see ``prepare``.

    Raises:
        FewShotError: see ``opened``.
    """
    with opened(file) as image:
        return prepare(image, size, channels, ink)


def prepare(image: Image.Image, size: int, channels: int, ink: bool = False) -> NDArray[np.uint8]:
    """Bring an image of any shape and mode to what an encoder takes.

    It is turned upright as its EXIF data says. What is transparent becomes white; grey of more than 8 bits is stretched
    from its darkest to its brightest; of an animation the first picture counts. Of a photo that is not square the
    middle is taken, at its full height or width, since to squeeze it would change every shape in it.

    Args:
        image: as decoded.
        size: height and width of the result.
        channels: 1 for grey, 3 for RGB.
        ink: it is a letter or a drawing, for a network that knows such as bright on black: what has a bright background
            is inverted, and what is not square is filled up with its background, so that no stroke is cut off.

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
    """The median of the outermost pixels, uint8 ``[channels]``."""
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(edges, axis=0).astype(np.uint8)
