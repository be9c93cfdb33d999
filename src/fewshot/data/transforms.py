"""Random changes of training images, made on the device, one batch at a time.

A transform maps the pixels of any number of images, uint8 ``[images, channels, height, width]``, to the same shape. It
draws from PyTorch's random numbers, separately for each image; ``seeded`` makes them depend only on the number of the
training episode.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Le
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2 import functional

from fewshot.checks import Natural, checked
from fewshot.errors import FewShotError

Transform = Callable[[torch.Tensor], torch.Tensor]
Fraction = Annotated[float, Ge(0), Le(1)]


def seeded(transform: Transform, seeds: Sequence[Sequence[int]]) -> Transform:
    """Apply a transform to several training episodes, each with its own seed; the global random state stays unchanged.

    Args:
        transform: changes the images of one episode.
        seeds: the seed of each episode, a sequence of integers of at least 0.

    Returns:
        A function from ``[episodes, images, channels, height, width]`` to the same.
    """
    states = [int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1) for seed in seeds]

    def apply(episodes: torch.Tensor) -> torch.Tensor:
        changed = []
        with torch.random.fork_rng([episodes.device] if episodes.is_cuda else []):
            for state, images in zip(states, episodes, strict=True):
                torch.manual_seed(state)
                changed.append(transform(images))
                _check(transform, images, changed[-1])
        return torch.stack(changed)

    return apply


class Chain:
    """Several transforms, one after the other.

    Args:
        transforms: the transforms, under any names, in this order.
    """

    def __init__(self, **transforms: Transform) -> None:
        self.transforms = tuple(transforms.values())

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Apply all of them."""
        for transform in self.transforms:
            images = transform(images)
        return images


class EachImage:
    """Applies a transform of torchvision.transforms.v2, which draws once per call, to each image separately.

    Args:
        transform: from uint8 ``[channels, height, width]`` to the same.
    """

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Apply it to one image after another."""
        return torch.stack([self.transform(image) for image in images])


class RandomFlip:
    """Mirror images left to right.

    Args:
        p: the probability that an image is mirrored.

    Raises:
        FewShotError: the probability is not between 0 and 1.
    """

    @checked("transform")
    def __init__(self, p: Fraction = 0.5) -> None:
        self.p = p

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Mirror some of them."""
        flipped = _draw(images, 0, 1) < self.p
        return torch.where(flipped, images.flip(-1), images)


class RandomCrop:
    """Shift images: pad them on all sides, and cut each to its size at a random place.

    Args:
        padding: pixels on each side, which is also the largest shift.
        mode: "constant" pads with black, "edge" with the outermost pixels, "reflect" with a mirror image of
            the border.

    Raises:
        FewShotError: the padding is negative, or the mode unknown.
    """

    @checked("transform")
    def __init__(self, padding: Natural, mode: Literal["constant", "edge", "reflect"] = "constant") -> None:
        self.padding, self.mode = padding, mode

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Shift each of them."""
        count, _, height, width = images.shape
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise FewShotError(
                f"the padding={self.padding} of the transform must be less than the size of the images, {height} x "
                f"{width}, to be reflected"
            )
        padded = functional.pad(images, [self.padding], padding_mode=self.mode)
        offsets = torch.randint(2 * self.padding + 1, (2, count, 1)).to(images.device)
        rows, columns = (
            offset + torch.arange(size, device=images.device)
            for offset, size in zip(offsets, (height, width), strict=True)
        )
        image = torch.arange(count, device=images.device)[:, None, None]
        return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None]].movedim(-1, 1)


class RandomResizedCrop:
    """Cut a part out of each image and resize it bilinearly to the size of the image.

    Like torchvision's transform of that name, with the same settings.

    Args:
        scale: smallest and largest fraction of the image's area.
        ratio: smallest and largest ratio of the part's width to its height.

    Raises:
        FewShotError: the numbers are not such ranges.
    """

    def __init__(self, scale: list[float], ratio: list[float]) -> None:
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise FewShotError(f"the scale={scale} of the transform must be two numbers above 0 and up to 1, ascending")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise FewShotError(f"the ratio={ratio} of the transform must be two positive numbers, ascending")
        self.scale, self.log_ratio = tuple(scale), tuple(map(math.log, ratio))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Resize a part of each of them."""
        area = _draw(images, *self.scale)
        root = _draw(images, *self.log_ratio).exp().sqrt()
        # A part wider or higher than the image is clipped to the image.
        width, height = (area.sqrt() * root).clamp_max(1), (area.sqrt() / root).clamp_max(1)
        left, top = _draw(images, 0, 1) * (1 - width), _draw(images, 0, 1) * (1 - height)
        nothing = torch.zeros_like(width)
        # In the coordinates of affine_grid an image extends from -1 to 1.
        x, y = 2 * left + width - 1, 2 * top + height - 1
        affine = torch.cat([width, nothing, x, nothing, height, y], dim=1).reshape(-1, 2, 3)
        grid = affine_grid(affine, list(images.shape), align_corners=False)
        pixels = grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        return pixels.round().to(images.dtype)


class RandomColour:
    """Change brightness, contrast and saturation of each image, in this order.

    Like torchvision's ColorJitter, with the same settings: 0.4 multiplies by 0.6 to 1.4.

    Args:
        brightness: of the pixels.
        contrast: their distance from the mean grey of the image.
        saturation: their distance from their own grey; no effect on grey images.

    Raises:
        FewShotError: a number is not between 0 and 1.
    """

    @checked("transform")
    def __init__(self, brightness: Fraction, contrast: Fraction, saturation: Fraction) -> None:
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Change each of them."""
        coloured = images.shape[1] == 3
        pixels = (images.float() * _around_one(images, self.brightness)).clamp(0, 255)
        grey = functional.rgb_to_grayscale(pixels) if coloured else pixels
        mean = grey.mean((1, 2, 3), keepdim=True)
        pixels = mean.lerp(pixels, _around_one(images, self.contrast)).clamp(0, 255)
        saturation = _around_one(images, self.saturation)
        if coloured:
            pixels = functional.rgb_to_grayscale(pixels).lerp(pixels, saturation).clamp(0, 255)
        return pixels.round().to(images.dtype)


def _draw(images: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Draw a number for each image, ``[images, 1, 1, 1]``, on its device; the same numbers on every device."""
    return (low + (high - low) * torch.rand(len(images))).to(images.device)[:, None, None, None]


def _around_one(images: torch.Tensor, most: float) -> torch.Tensor:
    return _draw(images, 1 - most, 1 + most)


def _check(transform: Transform, images: torch.Tensor, changed: torch.Tensor) -> None:
    if changed.shape != images.shape or changed.dtype != images.dtype:
        raise FewShotError(
            f"transform: {getattr(transform, '__name__', type(transform).__name__)} made {changed.dtype} "
            f"{list(changed.shape)} of {images.dtype} {list(images.shape)}; it must keep type and shape"
        )
