"""Export an encoder as ONNX, from pixels to embeddings."""

import hashlib
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewshot.checkpoints import NOWHERE, SHARED, save_weights
from fewshot.data.images import normalise
from fewshot.errors import FewShotError
from fewshot.files import write_atomically
from fewshot.methods.base import MetricMethod
from fewshot.text import say
from fewshot.trained import Trained, load_trained

TOLERANCE = 1e-3  # allowed difference, relative to the largest embedding value: float32 sums differ in their order
BATCHES = (1, 5)  # batch sizes of the check


class Embedder(nn.Module):
    """An encoder with the image normalisation of its training.

    Args:
        encoder: maps normalised images to embeddings.
        kind: see ``normalise``.

    Shape:
        uint8 ``[images, height, width, channels]`` to float32 ``[images, features]``.
    """

    def __init__(self, encoder: nn.Module, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed images."""
        embeddings: torch.Tensor = self.encoder(normalise(pixels, self.kind))
        return embeddings


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
    trained = load_trained(checkpoint, trust=trust)
    if not isinstance(trained.method, MetricMethod):
        raise FewShotError(
            f"the encoder in {trained.path} cannot be used by itself, since its method changes it for every support "
            "set; export one of method=protonet or method=matching"
        )
    dataset = trained.config.dataset
    size, channels = dataset.size, dataset.channels
    embedder = Embedder(trained.method.encoder.float(), dataset.normalise).eval()
    content = _to_onnx(embedder, (max(BATCHES), size, size, channels))
    difference = _largest_difference(embedder, content, (size, size, channels))
    if not difference <= TOLERANCE:  # also rejects NaN
        raise FewShotError(
            f"ONNX Runtime differs from PyTorch by {difference:.2g} of the largest value, more than {TOLERANCE:g}, so "
            "nothing was written; try different versions of onnxruntime and torch"
        )
    write_atomically(path, content)
    say(
        f"{path}: pixels, uint8 [images, {size}, {size}, {channels}], to embeddings, float32 [images, features]; "
        f"differs from PyTorch by {difference:.1g} of the largest value"
    )
    return difference


def _share(trained: Trained, path: Path) -> None:
    checkpoint = trained.checkpoint
    content = {"config": checkpoint["hyper_parameters"], "data": checkpoint.get("data")}
    save_weights(path, trained.method.state_dict(), {key: value for key, value in content.items() if value is not None})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    say(f"{path}: weights and configuration, {path.stat().st_size:,} bytes, SHA-256 {digest}")


def _to_onnx(embedder: Embedder, shape: tuple[int, ...]) -> bytes:
    try:
        import onnxruntime  # noqa: F401, PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise FewShotError(f"{error.name} is not installed; install the extra: pip install -e '.[export]'") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program: Any = torch.onnx.export(
            embedder,
            (torch.zeros(shape, dtype=torch.uint8),),
            input_names=["pixels"],
            output_names=["embeddings"],
            dynamic_shapes=({0: "images"},),
            dynamo=True,
            verbose=False,
        )
    content: bytes = program.model_proto.SerializeToString()
    return content


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
