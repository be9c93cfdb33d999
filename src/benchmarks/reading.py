"""Photos of twelve megapixels, from files to labels: ours and other programs; and what reduced decoding costs.

The contest is part of ``src/bench.py``. As a program, this module measures processor time, which other programs on a
busy machine change less, and counts the labels that reduced decoding changes:

    FEWSHOT_DATA_DIR=DIR python src/benchmarks/reading.py encoder=lite0 encoder.file=PATH

The keys are those of ``conf/predict.yaml``.
"""

import io
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this folder has a module named as one of Python's, "profile"

import numpy as np
import torch
from hydra.utils import instantiate
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from benchmarks.contest import Contest, Entrant, Work
from fewshot.config import compose
from fewshot.data.files import ImageFile, file_at
from fewshot.data.miniimagenet import miniimagenet
from fewshot.data.photos import Photo, read_ahead, read_photo
from fewshot.prediction import Predictor, make_predictor
from fewshot.text import make_table, say

WIDTH, HEIGHT = 4000, 3000  # pixels of a photo
QUALITY = 90  # of its JPEG
DIFFERENT = 4  # photos in the contest that differ; the others are copies
SUPPORT = 10  # photos, of five classes
BATCH = 64
Pixels = NDArray[np.uint8]


def detail(seed: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.float32]:
    """Make an image with the statistics of a photo: as much contrast in each octave, and noise as of a camera.

    Returns:
        ``[height, width, 3]``, mean 0, in grey values.
    """
    random = np.random.default_rng(seed)
    noise = 3 * random.standard_normal((height, width, 1), dtype=np.float32)
    octaves = range(2, 10)
    grey = sum(_octave(random, octave, 20, width, height) for octave in octaves)
    colours = [sum(_octave(random, octave, 8, width, height) for octave in octaves[:3]) for _ in range(3)]
    return np.stack([grey + colour for colour in colours], -1) + noise


def _octave(random: np.random.Generator, octave: int, contrast: float, width: int, height: int) -> NDArray[np.float32]:
    shape = (max(2, height * 2**octave // 4096), max(2, width * 2**octave // 4096))
    rough = Image.fromarray(contrast * random.standard_normal(shape, dtype=np.float32))
    return np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC))


def _jpeg(pixels: NDArray[np.floating[Any]]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "jpeg", quality=QUALITY)
    return content.getvalue()


@cache
def _made(seed: int, width: int, height: int) -> bytes:
    return _jpeg(128 + detail(seed, width, height))


def _files(photos: int, width: int, height: int) -> list[ImageFile]:
    folder = Path(tempfile.mkdtemp())
    contents = [_made(seed, width, height) for seed in range(DIFFERENT)]
    paths = [folder / f"{number}.jpg" for number in range(photos)]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number % DIFFERENT])
    return [file_at(path) for path in paths]


def _predictor() -> Predictor:
    torch.manual_seed(0)
    return make_predictor(
        compose("encoder=pretrained", "encoder.weights=null", "method=protonet", "cache_dir=null", name="predict")
    )


def _support(predictor: Predictor) -> dict[str, list[Pixels]]:
    shape = (SUPPORT, predictor.size, predictor.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return {str(number): list(images[number::5]) for number in range(5)}


def ours(**shape: int) -> Work:
    """What ``fewshot predict`` does: reduced decoding on all cores while the last batch is embedded."""
    predictor, files = _predictor(), _files(**shape)
    classify = predictor.learn(_support(predictor))

    def work() -> NDArray[Any]:
        reading = read_ahead(files, predictor.read)
        batches = iter(partial(_taken, reading), [])
        return torch.cat([classify(batch) for batch in batches]).numpy()

    return work


def _taken(reading: Iterator[tuple[ImageFile, Any]]) -> list[Pixels]:
    return [photo.pixels for _, photo in islice(reading, BATCH) if isinstance(photo, Photo)]


def plain_loop(**shape: int) -> Work:
    """What is usually written: open, crop, resize and embed one photo after the other."""
    predictor, files = _predictor(), _files(**shape)
    encoder = predictor.method.encoder
    embed = torch.inference_mode()(lambda pixels: encoder(torch.from_numpy(pixels / np.float32(255)).movedim(-1, 1)))
    prototypes = torch.stack([embed(np.stack(images)).mean(0) for images in _support(predictor).values()])

    def logits_of(file: ImageFile) -> torch.Tensor:
        image = Image.open(Path(file.name)).convert("RGB")
        side, size = min(image.size), predictor.size
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
        return -(embed(np.asarray(image)[None]) - prototypes).square().sum(1)

    return lambda: torch.stack([logits_of(file) for file in files]).numpy()


def encoder_alone(**shape: int) -> Work:
    """Our classifier on photos that are already decoded."""
    predictor = _predictor()
    images = [predictor.read(file) for file in _files(**shape)]
    classify = predictor.learn(_support(predictor))
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return lambda: torch.cat([classify(batch) for batch in batches]).numpy()


def decoder_alone(**shape: int) -> Work:
    """Our reading, of which nothing is embedded."""
    predictor, files = _predictor(), _files(**shape)
    known = encoder_alone(**shape)()

    def work() -> NDArray[Any]:
        assert all(isinstance(photo, Photo) for _, photo in read_ahead(files, predictor.read))
        return known

    return work


def one_core(encoder: str, photos: int) -> Work:
    """Embed photos on one core. The weights are random, which changes no time."""
    torch.set_num_threads(1)
    weights = "encoder.weights=null" if encoder == "pretrained" else "encoder.pretrained=false"
    network = instantiate(compose(f"encoder={encoder}", weights, name="predict").encoder).eval()
    images = torch.rand(photos, 3, network.size, network.size, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def work() -> NDArray[Any]:
        return np.array([len(network(images))])  # embeddings of different encoders cannot be compared

    return work


def contests() -> dict[str, Contest]:
    """Photos from files to labels; and encoders, if timm is installed."""
    shape = {"photos": 128, "width": WIDTH, "height": HEIGHT}
    entrants = [
        Entrant("ours", ours, shape, keep_memory=True),
        Entrant("plain loop", plain_loop, shape),
        Entrant("encoder alone", encoder_alone, shape, keep_memory=True),
        Entrant("decoder alone", decoder_alone, shape, keep_memory=True),
    ]
    title = f"Classifying JPEGs of {WIDTH}x{HEIGHT} pixels by ResNet-18"
    found = {"photos": Contest(title, entrants, (shape["photos"], "photos"), tolerance=0.1)}
    if find_spec("timm"):
        encoders = [
            Entrant(f"encoder={name}", one_core, {"encoder": name, "photos": 8}, keep_memory=True)
            for name in ("pretrained", "fast", "lite0", "best")
        ]
        found["encoders"] = Contest("Embedding photos on one core", encoders, (8, "photos"))
    return found


def processor_times(name: str, **settings: int) -> None:
    """Print the processor time that each program of a contest takes for a photo, in turns, the median of 3.

    Args:
        name: of the contest.
        settings: for all programs, instead of their own.
    """
    torch.set_num_threads(1)  # threads that wait for each other would count, too
    contest = contests()[name]
    made = [{**entrant.settings, **settings} for entrant in contest.entrants]
    works = [entrant.build(**each) for entrant, each in zip(contest.entrants, made, strict=True)]
    seconds = np.empty((3, len(works)))
    for row in track(seconds, contest.title, transient=True):
        for column, work in enumerate(works):
            start = time.process_time()
            work()  # type: ignore[operator]
            row[column] = time.process_time() - start
    photo = 1e3 * np.median(seconds, axis=0) / made[0]["photos"]
    rows = [
        [entrant.name, f"{ms:.1f}", f"{ms / photo[0]:.2f}"] for entrant, ms in zip(contest.entrants, photo, strict=True)
    ]
    numbers = ("ms of one core for a photo", "times ours")
    say(make_table(f"{contest.title}, measured with {made[0]['photos']}", ["", *numbers], rows, numbers))


def count_changed(arguments: Sequence[str], classes: int = 5, shot: int = 5, queries: int = 10) -> None:
    """Print how many labels reduced decoding changes, for test photos of miniImageNet that were enlarged to 3000x3000.

    They have 84x84 pixels, so detail is added, with the contrast of an octave in a photo.

    Args:
        arguments: overrides of ``conf/predict.yaml``.
        classes: of miniImageNet's test classes, the first ones.
        shot: examples of each.
        queries: of each.
    """
    predictor = make_predictor(compose("method=protonet", *arguments, name="predict"))
    data_dir = compose("dataset=miniimagenet", "run_dir=.").data_dir
    rough = [detail(seed, HEIGHT, HEIGHT) / 4 for seed in range(DIFFERENT)]
    names = [named for named in miniimagenet(data_dir, 84).classes() if named.split == "test"][:classes]
    seen: dict[bool, list[list[Pixels]]] = {False: [], True: []}
    for named in track(names, "decoding", transient=True):
        of_class: dict[bool, list[Pixels]] = {False: [], True: []}
        for number, pixels in enumerate(named.load()[: shot + queries]):
            large = np.asarray(Image.fromarray(pixels).resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC))
            content = _jpeg(large + rough[number % DIFFERENT])
            for reduced, images in of_class.items():
                file = ImageFile("photo", partial(bytes, content))
                images.append(read_photo(file, predictor.size, 3, reduced=reduced))
        for reduced, images in of_class.items():
            seen[reduced].append(images)
    labels = {}
    for reduced, found in seen.items():
        classify = predictor.learn({str(number): images[:shot] for number, images in enumerate(found)})
        logits = [classify(images[shot:]) for images in found]
        labels[reduced] = torch.stack(logits).argmax(-1)
    truth = torch.arange(len(names))[:, None]
    apart = np.abs(np.subtract(seen[True], seen[False], dtype=np.float32)).mean()
    changed, count = int((labels[True] != labels[False]).sum()), labels[True].numel()
    full, fast = (int((labels[reduced] == truth).sum()) for reduced in (False, True))
    say(
        f"reduced decoding changes {changed:,} of {count:,} labels; {full:,} are right without it, {fast:,} with it; "
        f"a pixel differs by {apart:.2f} of 255 on average"
    )


if __name__ == "__main__":
    processor_times("photos", photos=16)
    processor_times("encoders")
    count_changed(sys.argv[1:])
