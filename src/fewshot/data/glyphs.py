"""Glyphs: letters of many scripts, drawn from the fonts included in matplotlib, so that nothing is downloaded.

Each sample of a letter has a random face, weight, slant, size, position and distortion, as if written by a different
hand. Each script belongs to one split: the test scripts never occur in training.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import avg_pool2d, grid_sample, interpolate

from fewshot.data.bank import ImageClass, Source, bright_ink
from fewshot.errors import FewShotError

# The first words of the letters' Unicode names. Test and validation come first, because of two letters that look alike
# the first is kept.
SCRIPTS = {
    "test": ("GEORGIAN", "HEBREW", "LAO", "ARABIC"),
    "val": ("ARMENIAN", "NKO"),
    "train": ("LATIN", "GREEK", "CYRILLIC", "COPTIC", "CANADIAN", "TIFINAGH", "OLD", "LISU"),
}
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
EM = 64  # pixels of the font size that letters are set in before they are bent and scaled down
MIN_LENGTH = 0.3 * EM  # letters whose longer side is shorter are marks, not shapes
LOOK_ALIKE = 0.86  # two letters whose blurred shapes correlate more count as one


@bright_ink
def glyphs(size: int, samples: int, seed: int) -> Source:
    """Draw the letters of 14 scripts.

    Args:
        size: height and width of the images; ink is bright on black.
        samples: images of each letter.
        seed: seed of the samples' variation; the set of letters does not depend on it.

    Raises:
        FewShotError: matplotlib's fonts are missing, or ``size`` or ``samples`` is below 1.
    """
    folder = Path(mpl.get_data_path(), "fonts", "ttf")
    faces = [folder / f"{name}.ttf" for name in FACES]
    missing = [face for face in faces if not face.exists()]
    if missing:
        raise FewShotError(f"dataset=glyphs draws with fonts of matplotlib, and {missing[0]} is missing: reinstall it")
    if size < 1 or samples < 1:
        raise FewShotError(f"dataset.size={size} and dataset.source.samples={samples} must be at least 1")

    def classes() -> list[ImageClass]:
        return [
            ImageClass(unicodedata.name(letter), split, samples, partial(_draw, letter, found, size, samples, seed))
            for split, letter, found in _letters(faces)
        ]

    return Source(faces, classes, "scripts")


def _letters(faces: Sequence[Path]) -> list[tuple[str, str, list[Path]]]:
    """Return split, letter and the faces that have it, for all distinguishable letters; training comes first."""
    covered = {face: TTFont(face, lazy=True).getBestCmap() for face in faces}
    scripts = {script: split for split, names in SCRIPTS.items() for script in names}
    order = list(scripts)
    found = []
    for code in sorted(set().union(*covered.values())):
        letter = chr(code)
        script = unicodedata.name(letter, "-").split()[0]
        # Accented letters and variants of other letters have a decomposition.
        plain = unicodedata.category(letter) in ("Lo", "Lu", "Ll") and not unicodedata.decomposition(letter)
        if script in scripts and plain:
            found.append((script, letter, [face for face in faces if code in covered[face]]))
    found.sort(key=lambda entry: order.index(entry[0]))
    kept = [found[number] for number in _distinct([_render(letter, faces[0], 0) for _, letter, faces in found])]
    splits = [(scripts[script], letter, faces) for script, letter, faces in kept]
    return sorted(splits, key=lambda entry: ("train", "val", "test").index(entry[0]))


def _distinct(shapes: Sequence[Image.Image]) -> list[int]:
    """Return the numbers of the shapes that are large enough and look like no earlier one."""
    kept: list[int] = []
    side = 24
    vectors = np.zeros((len(shapes), side * side))
    for number, shape in enumerate(shapes):
        if max(shape.size) < MIN_LENGTH:
            continue
        # Scaled to one size and blurred, letters that differ only in size or slightly look alike.
        scale = (side - 6) / max(shape.size)
        scaled = shape.resize([max(1, round(length * scale)) for length in shape.size], Image.Resampling.BOX)
        canvas = Image.new("L", (side, side))
        canvas.paste(scaled, ((side - scaled.width) // 2, (side - scaled.height) // 2))
        blurred = avg_pool2d(torch.from_numpy(np.array(canvas, dtype=np.float64))[None], 5, stride=1, padding=2)
        vector = blurred.flatten().numpy() - blurred.mean().item()
        vector /= np.linalg.norm(vector)
        if not kept or (vectors[kept] @ vector).max() < LOOK_ALIKE:
            kept.append(number)
            vectors[number] = vector
    return kept


@lru_cache(len(FACES))
def _font(face: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(face, EM)


def _render(letter: str, face: Path, stroke: float) -> Image.Image:
    """Render a letter in a face, with its stroke widened by ``stroke`` pixels, cropped to its ink."""
    font = _font(face)
    box = font.getbbox(letter, stroke_width=stroke)
    image = Image.new("L", (int(box[2] - box[0]) + 2, int(box[3] - box[1]) + 2))
    ImageDraw.Draw(image).text((1 - box[0], 1 - box[1]), letter, 255, font, stroke_width=stroke)
    return image.crop(image.getbbox())


def _draw(letter: str, faces: Sequence[Path], size: int, samples: int, seed: int) -> NDArray[np.uint8]:
    """Draw samples of one letter: uint8 ``[samples, size, size, 1]``."""
    random = np.random.default_rng([seed, ord(letter)])
    canvases = np.zeros((samples, 1, 2 * EM, 2 * EM), dtype=np.float32)
    extents = np.empty(samples)
    for number in range(samples):
        image = _render(letter, faces[int(random.integers(len(faces)))], float(random.uniform(0, 3)))
        image.thumbnail((2 * EM, 2 * EM))
        x, y = (2 * EM - image.width) // 2, (2 * EM - image.height) // 2
        canvases[number, 0, y : y + image.height, x : x + image.width] = np.asarray(image)
        extents[number] = max(image.size) / (2 * EM)  # the half-width of the ink, when the canvas spans -1..1
    bent = grid_sample(torch.from_numpy(canvases), _grid(random, extents, 3 * size), align_corners=False)
    return avg_pool2d(bent, 3).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _grid(random: np.random.Generator, extents: NDArray[np.float64], size: int) -> torch.Tensor:
    """Return the sampling grid of each canvas: a random rotation, shear, stretch, shift and distortion per sample.

    Returns:
        float32 ``[samples, size, size, 2]``, x and y in -1..1.
    """
    samples = len(extents)

    def uniform(spread: float) -> torch.Tensor:
        return torch.from_numpy(random.uniform(-spread, spread, (samples, 1, 1)))

    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1
    y, x = axis[:, None] + uniform(0.12), axis[None, :] + uniform(0.12)
    coarse = torch.from_numpy(random.normal(0, 0.07, (samples, 2, 4, 4)))
    bend = interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    angle, shear = uniform(0.26), uniform(0.25)  # 15 degrees
    x, y = x * angle.cos() - y * angle.sin() + bend[:, 0], x * angle.sin() + y * angle.cos() + bend[:, 1]
    reach = torch.from_numpy(extents)[:, None, None] * 1.5
    x, y = reach * (1 + uniform(0.2)) * (x + shear * y), reach * (1 + uniform(0.2)) * y
    return torch.stack([x, y], dim=-1).float()
