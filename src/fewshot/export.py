"""Export as ONNX: an encoder, from pixels to embeddings, or a classifier, from photos to probabilities."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewshot.checkpoints import NOWHERE, SHARED, save_weights
from fewshot.config import compose
from fewshot.data.images import normalise
from fewshot.embeddings import embed_mirrored
from fewshot.errors import FewShotError, reason
from fewshot.familiarity import FALSE_ALARM
from fewshot.files import write_atomically
from fewshot.learned import Learned
from fewshot.methods.auto import Linear
from fewshot.methods.base import MetricMethod
from fewshot.paths import install
from fewshot.predictor import Predictor
from fewshot.taught import load_taught
from fewshot.text import say
from fewshot.trained import Trained, load_trained

TOLERANCE = 1e-3  # allowed difference, relative to the largest embedding value: float32 sums differ in their order
LOBES = 3  # of Pillow's Lanczos filter, on each side
BATCHES = (1, 5)  # batch sizes of the check


class Embedder(nn.Module):
    """An encoder with the image normalisation of its training.

    Args:
        encoder: maps normalised images to embeddings.
        kind: see ``normalise``.
        mirror: see ``fewshot.methods.base.set_mirror``.

    Shape:
        uint8 ``[images, height, width, channels]`` to float32 ``[images, features]``.
    """

    def __init__(self, encoder: nn.Module, kind: str, mirror: bool = False) -> None:
        super().__init__()
        self.encoder, self.kind, self.mirror = encoder, kind, mirror

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed images."""
        images = normalise(pixels, self.kind)
        embeddings: torch.Tensor = embed_mirrored(self.encoder, images) if self.mirror else self.encoder(images)
        return embeddings


class Photos(nn.Module):
    """Crops and resizes photos as Pillow does for ``predict``, to the same pixels up to rounding (one of 255).

    Pillow's Lanczos filter has no operator in ONNX, so it is two matrix products, with rounding after each.

    Args:
        size: height and width of the result.
        crop: "center" or "squash", see ``fewshot.data.photos.prepare``.

    Shape:
        uint8 ``[images, height, width, channels]`` to float32 ``[images, size, size, channels]``, whole numbers.
    """

    def __init__(self, size: int, crop: str) -> None:
        super().__init__()
        self.size, self.crop = size, crop

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Crop and resize."""
        height, width = pixels.shape[1:3]
        shorter: int = torch.sym_min(height, width)  # type: ignore[assignment]  # symbolic in the export
        rows, columns = (shorter, shorter) if self.crop == "center" else (height, width)
        wide = pixels.float().movedim(3, 2) @ self._weights(width, columns).mT  # [images, height, channels, size]
        wide = wide.round().clamp(0, 255).movedim(2, 1)
        return (self._weights(height, rows) @ wide).round().clamp(0, 255).movedim(1, 3)

    def _weights(self, length: int, used: int) -> torch.Tensor:
        """Weights ``[size, length]`` of the pixels of a line, of which the middle is used."""
        scale = used / self.size
        places = torch.arange(length, dtype=torch.float32) - (length - used) // 2
        centres = (torch.arange(self.size, dtype=torch.float32) + 0.5)[:, None] * scale
        wide: Any = torch.sym_max(scale, 1.0)
        distances = (places + 0.5 - centres) / wide
        inside = (distances.abs() < LOBES) & (places >= 0) & (places < used)
        weights = torch.where(inside, torch.sinc(distances) * torch.sinc(distances / LOBES), torch.zeros(()))
        return weights / weights.sum(1, keepdim=True)


class Recogniser(nn.Module):
    """A whole classifier: photos of any size to the probabilities of classes, and to their familiarity.

    Args:
        predictor: its encoder embeds the photos.
        learned: the classes.

    Shape:
        uint8 ``[images, height, width, channels]`` to float32 ``[images, way]`` and ``[images]``.
    """

    def __init__(self, predictor: Predictor, learned: Learned) -> None:
        super().__init__()
        assert isinstance(predictor.method, MetricMethod)
        self.photos, self.method, self.kind = Photos(predictor.size, predictor.crop), predictor.method, predictor.kind
        self.familiarity = learned.familiarity
        fitted = isinstance(learned.classify, Linear)
        way = len(learned.classes)
        self.classify = learned.classify if fitted else self.method.learn(learned.examples, learned.labels, way)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify photos."""
        assert self.familiarity is not None
        embeddings = self.method.represent(normalise(self.photos(pixels), self.kind))
        return self.classify(embeddings).softmax(1), self.familiarity(embeddings)


def export_classifier(model: str, out: str, trust: str | Iterable[str] | None = None) -> float:
    """Write what was taught as one ONNX file, checked against PyTorch on random photos of several sizes.

    The input ``pixels`` is uint8 ``[images, height, width, channels]`` of any size; the outputs are ``probabilities``,
    float32 ``[images, way]``, and ``familiarity``, float32 ``[images]``. The metadata hold ``classes``, a JSON list,
    and ``unknown_below``, the familiarity of an image that is like none of them.

    Args:
        model: see ``load_taught``.
        out: the file to write.
        trust: see ``load_taught``.

    Returns:
        The largest difference of a probability from PyTorch's.

    Raises:
        FewShotError: ``out`` has an ending other than .onnx; the file is broken; its classifier cannot be written as
            ONNX; the packages of the extra ``export`` are missing; or ONNX Runtime and PyTorch disagree.
    """
    path = Path(out).expanduser()
    if path.suffix != ".onnx":
        raise FewShotError(f"out={out}: a taught classifier is written as ONNX; choose out=FILE.onnx")
    taught = load_taught(model, compose("hardware=cpu", name="predict").hardware, trust)
    predictor, learned = taught.predictor, taught.learned
    obstacles = {
        "its classifier adapts a network": not isinstance(predictor.method, MetricMethod),
        "its classifier needs all queries together": predictor.method.transductive,
        "its network reads letters": predictor.ink,
    }
    why = next((obstacle for obstacle, applies in obstacles.items() if applies), None)
    if why is not None:
        raise FewShotError(f"{model} cannot be written as ONNX: {why}; teach photos with method=auto")
    if predictor.crop == "pad":
        raise FewShotError(f"{model} pads photos, which an ONNX file cannot; teach it with crop=center or squash")
    recogniser = Recogniser(predictor, learned).eval()
    try:
        program = _program(
            recogniser,
            (1, predictor.size + 1, predictor.size + 2, predictor.channels),
            ["probabilities", "familiarity"],
            {0: "images", 1: "height", 2: "width"},
        )
    except torch.onnx.errors.OnnxExporterError as error:
        name = type(predictor.method).__name__
        raise FewShotError(f"{name} cannot be written as ONNX: {reason(error)}; teach it with method=auto") from error
    found = {"classes": json.dumps(list(learned.classes))}
    if learned.familiarity is not None:
        found["unknown_below"] = str(learned.familiarity.threshold(FALSE_ALARM))
    for key, value in found.items():
        entry = program.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = program.SerializeToString()
    difference = _largest_change(recogniser, content, predictor.size, predictor.channels)
    _write(path, content, difference, f"a probability by ONNX Runtime differs from PyTorch's by {difference:.2g}")
    say(
        f"{path}: photos, uint8 [images, height, width, {predictor.channels}], to probabilities of "
        f"{len(learned.classes)} classes; differs from PyTorch by at most {difference:.1g}"
    )
    return difference


def _largest_change(recogniser: Recogniser, content: bytes, size: int, channels: int) -> float:
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for number, (height, width) in enumerate([(size, size), (2 * size + 1, 3 * size), (size + 5, size // 2 + 1)]):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.randint(256, (2, channels, 8, 8), generator=generator).float()
        photos = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        pixels = photos.movedim(1, 3).to(torch.uint8).contiguous()
        with torch.no_grad():
            expected, _ = recogniser(pixels)
        probabilities, _ = session.run(None, {"pixels": pixels.numpy()})
        largest = max(largest, float((torch.from_numpy(probabilities) - expected).abs().max()))
    return largest


def export(checkpoint: str | None, out: str, trust: str | Iterable[str] | None = None) -> float:
    """Write the encoder of a checkpoint as ONNX, checked against PyTorch on random images; or its weights.

    The input ``pixels`` is uint8 ``[images, size, size, channels]``, with any number of images; the output
    ``embeddings`` is float32 ``[images, features]``.

    If the file ends in .safetensors, it contains the weights of the method, its configuration, and digests of the
    classes it was trained on: what others need to use it like a checkpoint, except to resume. No code is in it.

    Args:
        checkpoint: see ``load_trained``.
        out: the file to write.
        trust: see ``load_trained``.

    Returns:
        The largest difference from PyTorch in the check, as a share of the largest value; 0 for weights.

    Raises:
        FewShotError: the checkpoint is broken; its method changes the encoder for every support set; the packages of
            the extra ``export`` are missing; or ONNX Runtime and PyTorch disagree.
    """
    if checkpoint is None:
        raise FewShotError("no checkpoint is given; specify the directory of a run with checkpoint=RUN_DIR")
    path = Path(out).expanduser()
    if path.suffix == SHARED:
        _share(load_trained(checkpoint, trust=trust, places=NOWHERE), path)
        return 0.0
    if path.suffix != ".onnx":
        raise FewShotError(f"out={out}: choose out=FILE.onnx for the encoder, or out=FILE{SHARED} for the weights")
    trained = load_trained(checkpoint, trust=trust)
    if not isinstance(trained.method, MetricMethod):
        raise FewShotError(
            f"the encoder in {trained.path} cannot be used by itself, since its method changes it for every support "
            "set; export one of method=protonet or method=matching"
        )
    dataset = trained.config.dataset
    size, channels = dataset.size, dataset.channels
    embedder = Embedder(trained.method.encoder.float(), dataset.normalise, bool(trained.config.get("mirror"))).eval()
    program = _program(embedder, (max(BATCHES), size, size, channels), ["embeddings"], {0: "images"})
    content: bytes = program.SerializeToString()
    difference = _largest_difference(embedder, content, (size, size, channels))
    _write(path, content, difference, f"ONNX Runtime differs from PyTorch by {difference:.2g} of the largest value")
    say(
        f"{path}: pixels, uint8 [images, {size}, {size}, {channels}], to embeddings, float32 [images, features]; "
        f"differs from PyTorch by {difference:.1g} of the largest value"
    )
    return difference


def _write(path: Path, content: bytes, difference: float, words: str) -> None:
    """Write an ONNX file, unless its check found too large a difference."""
    if not difference <= TOLERANCE:  # also rejects NaN
        raise FewShotError(
            f"{words}, more than {TOLERANCE:g}, so nothing was written; try different versions of onnxruntime and torch"
        )
    write_atomically(path, content)


def _share(trained: Trained, path: Path) -> None:
    checkpoint = trained.checkpoint
    content = {"config": checkpoint["hyper_parameters"]} | {
        key: checkpoint.get(key) for key in ("data", "trained_before")
    }
    save_weights(path, trained.method.state_dict(), {key: value for key, value in content.items() if value is not None})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    say(f"{path}: weights and configuration, {path.stat().st_size:,} bytes, SHA-256 {digest}")


def _program(module: nn.Module, shape: tuple[int, ...], outputs: list[str], dynamic: dict[int, str]) -> Any:
    try:
        import onnxruntime  # noqa: F401, PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise FewShotError(f"{error.name} is not installed; install the extra: {install('export')}") from error
    for logger in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program: Any = torch.onnx.export(
            module,
            (torch.zeros(shape, dtype=torch.uint8),),
            input_names=["pixels"],
            output_names=outputs,
            dynamic_shapes=(dynamic,),
            dynamo=True,
            verbose=False,
        )
    return program.model_proto


def _largest_difference(embedder: Embedder, content: bytes, shape: tuple[int, ...]) -> float:
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for number, images in enumerate(BATCHES):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(256, (images, *shape), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = embedder(pixels)
        if not expected.isfinite().all():
            raise FewShotError(
                "the embeddings of random images are not finite, so nothing was written; train again with a lower "
                "optimizer.lr"
            )
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        largest = max(largest, float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()))
    return largest
