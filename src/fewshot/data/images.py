"""One image: from an encoded file to uint8 pixels, and from pixels to what an encoder takes."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fewshot.data.files import ImageFile
from fewshot.errors import FewShotError
from fewshot.hardware import send

MODES = {1: "L", 3: "RGB"}
# Pillow warns of images with up to twice its limit of pixels, which ``opened`` refuses. (Turning the warning into an
# error for a while is not safe in threads.)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def opened(file: ImageFile) -> Iterator[Image.Image]:
    """Open an image file that nobody vouches for; it is decoded as it is used.

    Args:
        file: where the image lies.

    Raises:
        FewShotError: the file cannot be read, is no image, or a broken one, or has more pixels than Pillow allows; or
            what is done with it fails.
    """
    try:
        with Image.open(io.BytesIO(file.read())) as image:
            if image.format == "EPS":
                raise ValueError("PostScript is a program, and is not run")
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise ValueError(f"it has {pixels:,} pixels, and at most {limit:,} are read")
            yield image
    except FewShotError:
        raise
    except Exception as error:  # each format's decoder raises what it stumbles over
        reason = "not an image in a known format" if isinstance(error, UnidentifiedImageError) else error
        raise FewShotError(f"cannot read the image {file.name}: {reason}; replace or remove it") from error


def decode(file: ImageFile, size: int, channels: int) -> NDArray[np.uint8]:
    """Read one image file, see ``opened``.

    Args:
        file: where the image lies.
        size: height and width of the result, see ``to_pixels``.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 ``[size, size, channels]``.
    """
    with opened(file) as image:
        return to_pixels(image, size, channels)


def to_pixels(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """Bring an image to one size, resampled with antialiasing, and one number of channels.

    Returns:
        uint8 ``[size, size, channels]``.
    """
    image = image.convert(MODES[channels])
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels)


def normalise(images: torch.Tensor, kind: str) -> torch.Tensor:
    """Turn pixels into an encoder's input, each image by itself: no statistic of a data set is needed.

    Args:
        images: uint8 ``[..., height, width, channels]``.
        kind: "range": the darkest pixel becomes 0 and the brightest 1 (Omniglot: ink is 1);
            "standardise": zero mean and unit variance over the image's pixels and channels;
            "plain": 0 to 255 becomes 0 to 1, for encoders that bring a normalisation of their own.

    Returns:
        float32 ``[..., channels, height, width]``, stored with the channels last.

    Raises:
        FewShotError: ``kind`` is none of these.
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
    """The images of a bank as an encoder takes them, found by their positions.

    Where a GPU has room for all pixels, they lie there from the first call on. Where it has not, the host gathers what
    is asked for in pinned memory, and the GPU fetches it while both do other work.

    Args:
        pixels: uint8 ``[images, height, width, channels]``.
        kind: see ``normalise``.
    """

    def __init__(self, pixels: torch.Tensor, kind: str) -> None:
        self.pixels, self.kind = pixels, kind
        self._resident: dict[torch.device, torch.Tensor | None] = {}  # the pixels on each GPU, None where too many

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
            positions: of the images, int64 ``[...]``. Those on the host never make it wait for a GPU.
            transform: changes the pixels before that, uint8 ``[..., channels, height, width]``.
            device: where the images are to be; None: where the positions are.

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
