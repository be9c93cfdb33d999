"""Read HDF5 files with one dataset of images per class, without following links to other files."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot.data.files import MAX_BYTES, RATIO, ImageFile
from fewshot.errors import FewShotError, shortened
from fewshot.paths import install


def list_hdf5(file: ImageFile, labels: ImageFile | None) -> dict[str, int]:
    """Return the classes of an HDF5 file with their numbers of images.

    Args:
        file: has one dataset per class, in the group "datasets" or in the root group.
        labels: a JSON list of the classes; None if all datasets are classes.

    Raises:
        FewShotError: a file is broken, has no classes, or lacks classes that ``labels`` lists; or h5py is missing.
    """
    with _datasets(file) as group:
        names = sorted(group) if labels is None else _read_labels(labels)
        lacking = [name for name in names if name not in group]
        if lacking or not names:
            what = f"lacks {shortened(lacking)}, which {labels.name} lists" if lacking and labels else "has no classes"
            raise FewShotError(f"{file.name} {what}; download it again")
        return {name: len(_images(group, name)) for name in names}


def read_hdf5(file: ImageFile, name: str) -> NDArray[np.uint8]:
    """Return the images of one class: uint8 ``[images, height, width, 3]``.

    Raises:
        FewShotError: see ``list_hdf5``.
    """
    with _datasets(file) as group:
        images: NDArray[np.uint8] = _images(group, name)[:]
        return images


def _read_labels(labels: ImageFile) -> list[str]:
    try:
        names = json.loads(labels.read())
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError("not a list of strings")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FewShotError(f"{labels.name} is not a JSON list of labels: {error}; download it again") from error
    return names


@contextmanager
def _datasets(file: ImageFile) -> Iterator[Any]:
    try:
        import h5py  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise FewShotError(f"{file.name} is read with h5py: {install('hdf5')}") from error
    try:
        with file.open() if file.open else io.BytesIO(file.read()) as raw:
            size = raw.seek(0, io.SEEK_END)
            with h5py.File(raw, "r") as opened:
                group = _own(opened, "datasets", h5py.Group) if "datasets" in opened else opened
                claimed = sum(_images(group, name).nbytes for name in group)
                if claimed > max(MAX_BYTES, RATIO * size):
                    raise ValueError(f"it claims {claimed:,} bytes of images, more than {RATIO} times its own {size:,}")
                yield group
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError, OverflowError) as error:
        raise FewShotError(f"cannot read the HDF5 file {file.name}: {error}; download it again") from error


def _own(group: Any, name: str, kind: type) -> Any:
    """Return an object in the file itself; links could lead to other files."""
    import h5py  # noqa: PLC0415

    if not isinstance(group.get(name, getlink=True), h5py.HardLink) or not isinstance(group[name], kind):
        raise ValueError(f"{name} is a link, or not a {kind.__name__.lower()}")
    return group[name]


def _images(group: Any, name: str) -> Any:
    import h5py  # noqa: PLC0415

    images = _own(group, name, h5py.Dataset)
    if images.external or images.is_virtual:
        raise ValueError(f"the images of {name} are in a different file")
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"the images of {name} are {images.dtype} {list(images.shape)}, not uint8 [images, h, w, 3]")
    if images.nbytes > MAX_BYTES:
        raise ValueError(f"the images of {name} have {images.nbytes:,} bytes, more than {MAX_BYTES:,}")
    return images
