"""Images: from encoded files to uint8 pixels, and from pixels to the input of an encoder."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from fewshot.data.files import ImageFile
from fewshot.errors import FewShotError
from fewshot.hardware import send
from fewshot.paths import install

with suppress(ImportError):  # the extra "photos"
    import pillow_heif

    pillow_heif.register_heif_opener()

MODES = {1: "L", 3: "RGB"}
MAX_JPEG_PIXELS = 256 * 10**6  # pixels of a JPEG decoded at a reduced size: phones have sensors of 200 million
# By the brand in the first bytes of a file: the format, and what reads it.
BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), ("HEIC", install("photos"))),
    **dict.fromkeys((b"avif", b"avis"), ("AVIF", "pip install 'pillow>=11.3'")),
}
# Pillow warns of images with up to twice its limit of pixels, which ``opened`` refuses. (Turning the warning into an
# error for a while is not safe in threads.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def opened(file: ImageFile, least: int | None = None, channels: int = 3) -> Iterator[Image.Image]:
    """Open an untrusted image file; it is decoded on use.

    Args:
        file: the image file.
        least: decode a JPEG at a half, a quarter or an eighth of its size, but with sides of at least so many pixels.
            Then it may have ``MAX_JPEG_PIXELS`` pixels, if that takes no memory for all of them. None: at its own size.
        channels: of the result: 1 for grey, 3 for RGB.

    Raises:
        FewShotError: the file cannot be read, is not an image or a broken one, or has more pixels than Pillow allows;
            or an operation on the image fails.
    """
    content = b""
    try:
        content = file.read()
        with _open(content) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program and is not run")
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS or math.inf
            if least is not None and (
                pixels <= limit or (pixels <= MAX_JPEG_PIXELS and _is_row_by_row(image, content))
            ):
                image.draft(MODES[channels], (least, least))
            if image.width * image.height > limit:
                more = f" ({MAX_JPEG_PIXELS:,} of a JPEG that is not progressive)" if least is not None else ""
                raise ValueError(f"it has {pixels:,} pixels, and at most {limit:,} are read{more}")
            yield image
    except FewShotError:
        raise
    except Exception as error:  # decoders raise many types
        reason, fix = str(error), "replace or remove it"
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
            if content[4:8] == b"ftyp" and content[8:12] in BRANDS:
                format_, fix = BRANDS[content[8:12]]
                reason = f"nothing installed reads {format_}"
        raise FewShotError(f"cannot read the image {file.name}: {reason}; {fix}") from error


def _open(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content))
    except Image.DecompressionBombError:
        if not content.startswith(b"\xff\xd8\xff"):
            raise
        return JpegImageFile(io.BytesIO(content))  # ``opened`` counts the pixels


def _is_row_by_row(image: Image.Image, content: bytes) -> bool:
    """Return whether a JPEG has all channels in one scan; of others, the decoder keeps the coefficients of all pixels.

    Args:
        image: opened, but not decoded: the decoder is at the end of the header of the first scan.
        content: of the file.
    """
    if not isinstance(image, JpegImageFile) or image.fp is None or image.info.get("progressive"):
        return False
    # Length of a start-of-scan header for all channels, including its marker (two bytes) and its length field (two).
    header = 8 + 2 * image.layers
    return content[image.fp.tell() - header :][:2] == b"\xff\xda"


def decode(file: ImageFile, size: int, channels: int) -> NDArray[np.uint8]:
    """Read one image file, see ``opened``.

    Args:
        file: the image file.
        size: height and width of the result, see ``to_pixels``.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 ``[size, size, channels]``.
    """
    with opened(file) as image:
        return to_pixels(image, size, channels)


def to_pixels(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """Convert an image to a size, resampled with antialiasing, and a number of channels.

    Returns:
        uint8 ``[size, size, channels]``.
    """
    image = image.convert(MODES[channels])
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels)


def normalise(images: torch.Tensor, kind: str) -> torch.Tensor:
    """Convert pixels to the input of an encoder, each image independently: no statistics of a data set are needed.

    Args:
        images: uint8 ``[..., height, width, channels]``.
        kind: "range": the darkest pixel becomes 0 and the brightest 1 (Omniglot: ink is 1);
            "standardise": zero mean and unit variance over the image's pixels and channels;
            "plain": 0 to 255 becomes 0 to 1, for encoders that normalise images themselves.

    Returns:
        float32 ``[..., channels, height, width]``, stored with the channels last.

    Raises:
        FewShotError: ``kind`` is unknown.
    """
    pixels = images.float()
    whole = (-3, -2, -1)
    if kind == "range":
        low, high = pixels.amin(whole, keepdim=True), pixels.amax(whole, keepdim=True)
        pixels = (pixels - low) / (high - low).clamp_min(1)
    elif kind == "standardise":
        variance, mean = torch.var_mean(pixels, whole, correction=0, keepdim=True)
        pixels = (pixels - mean) * variance.clamp_min(1).rsqrt()
    elif kind == "plain":
        pixels = pixels / 255
    else:
        raise FewShotError(f"dataset.normalise={kind} is unknown: choose range, standardise or plain")
    return pixels.movedim(-1, -3)


class ImageTable:
    """The normalised images of a bank, by position.

    If a GPU has room for all pixels, they stay there from the first call on. Otherwise the host gathers the requested
    ones in pinned memory, and the GPU copies them while both do other work.

    Args:
        pixels: uint8 ``[images, height, width, channels]``.
        kind: see ``normalise``.
    """

    def __init__(self, pixels: torch.Tensor, kind: str) -> None:
        self.pixels, self.kind = pixels, kind
        self._resident: dict[torch.device, torch.Tensor | None] = {}  # the pixels on each GPU, None if they do not fit

    def __len__(self) -> int:
        return len(self.pixels)

    def __call__(
        self,
        positions: torch.Tensor,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Gather and normalise images.

        Args:
            positions: the positions of the images, int64 ``[...]``. If they are on the host, it never waits for a GPU.
            transform: changes the pixels first, uint8 ``[..., channels, height, width]``.
            device: the device of the images; None for that of the positions.

        Returns:
            ``[..., channels, height, width]`` of PyTorch's default type, which is the trainer's precision in a step.
        """
        device = positions.device if device is None else device
        pixels = self._to_gpu(positions, device) if device.type == "cuda" else self.pixels[positions.cpu()].to(device)
        if transform is not None:
            pixels = transform(pixels.movedim(-1, -3)).movedim(-3, -1)
        return normalise(pixels, self.kind).to(torch.get_default_dtype())

    def _to_gpu(self, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
        if device not in self._resident:
            fits = 4 * self.pixels.nbytes < torch.cuda.mem_get_info(device)[0]
            self._resident[device] = self.pixels.to(device) if fits else None
        resident = self._resident[device]
        return send(self.pixels[positions.cpu()], device) if resident is None else resident[send(positions, device)]
