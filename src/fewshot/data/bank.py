"""The image bank: every image of a data set in one memory-mapped uint8 array, with an index of its classes.

Files are read here, once; everything after that is a gather on a tensor.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from numpy.typing import NDArray
from rich.markup import escape
from rich.progress import track

from fewshot.data.audit import Audit
from fewshot.errors import FewShotError
from fewshot.text import for_terminal, say

SPLITS = ("train", "val", "test")
MakeSource = TypeVar("MakeSource", bound=Callable[..., Any])
LOADED_TOGETHER = 160  # images that a thread loads at a time: for Omniglot, the four rotations of two characters
MAX_THREADS = 8
MISSING = (FileNotFoundError, NotADirectoryError)
BROKEN = (EOFError, LookupError, OverflowError, RecursionError, TypeError, ValueError)
FORMAT = 4  # increased when the contents of banks change, so that older caches are rebuilt


@dataclass(frozen=True)
class ImageClass:
    """One class of a data set, before its images are read.

    Attributes:
        name: unique in the data set.
        split: "train", "val" or "test".
        count: how many images ``load`` returns.
        load: reads the images: uint8 ``[count, height, width, channels]``, of one shape throughout the data set. It
            may be called in any thread while other classes are loaded.
    """

    name: str
    split: str
    count: int
    load: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True)
class Source:
    """The files of a data set and how to read them: what the function of a data set returns.

    Attributes:
        files: all files the images are read from; a cached bank is stale if one of them changes.
        classes: lists the classes; only called if no bank is cached, so it may be slow.
        split: the name of the rule that assigns classes to splits, if several are in use. Results show it, and results
            of different rules are never combined.
    """

    files: Sequence[Path]
    classes: Callable[[], Sequence[ImageClass]]
    split: str | None = None


def bright_ink(data_set: MakeSource) -> MakeSource:
    """Mark the function of a data set of letters or drawings whose ink is bright on black.

    Images shown to a network of such a data set later are inverted to match, see ``read_photo``.
    """
    data_set.bright_ink = True  # type: ignore[attr-defined]
    return data_set


def has_bright_ink(data_set: Any) -> bool:
    """Return whether the function of a data set is marked with ``bright_ink``."""
    return bool(getattr(data_set, "bright_ink", False))


def of_photos(data_set: MakeSource) -> MakeSource:
    """Mark the function of a data set of photos: a network of such a data set says so when it is shown letters."""
    data_set.of_photos = True  # type: ignore[attr-defined]
    return data_set


def has_photos(data_set: Any) -> bool:
    """Return whether the function of a data set is marked with ``of_photos``."""
    return bool(getattr(data_set, "of_photos", False))


@dataclass(frozen=True)
class ImageBank:
    """All images of a data set, class after class.

    Attributes:
        images: uint8 ``[images, height, width, channels]``, memory-mapped.
        offsets: int64 ``[classes + 1]``; class ``c`` is ``images[offsets[c]:offsets[c + 1]]``.
        names: the name of each class.
        splits: the split of each class.
        split_rule: see ``Source.split``.
        images_sha256: digest of the pixels, in the order of ``images``.
        class_digests: a digest of the pixels of each class.
        findings: problems with the images, one line each; see ``Audit``.
    """

    images: torch.Tensor
    offsets: NDArray[np.int64]
    names: tuple[str, ...]
    splits: tuple[str, ...]
    split_rule: str | None = None
    images_sha256: str = ""
    class_digests: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()

    def classes(self, split: str) -> NDArray[np.int64]:
        """Return the numbers of the classes of ``split``, int64 ``[classes of the split]``."""
        return np.flatnonzero(np.array(self.splits) == split)

    def labelled(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all images of ``split``: their positions, and their classes within the split.

        Returns:
            Both int64 ``[images of the split]``, the classes numbered from 0.
        """
        classes = self.classes(split)
        spans = zip(self.offsets[classes], self.offsets[classes + 1], strict=True)
        positions = [torch.arange(int(first), int(end)) for first, end in spans]
        labels = [torch.full_like(class_positions, label) for label, class_positions in enumerate(positions)]
        return torch.cat(positions), torch.cat(labels)

    def class_names(self, split: str) -> list[str]:
        """Return the names of the classes of ``split``, in the order of ``classes``."""
        return [self.names[c] for c in self.classes(split)]

    def without(self, names: Collection[str]) -> "ImageBank":
        """Return the same images, with some classes in no split."""
        splits = tuple("" if name in names else split for name, split in zip(self.names, self.splits, strict=True))
        return replace(self, splits=splits)

    def with_validation_in_training(self) -> "ImageBank":
        """Return the same images, with the validation classes among the training classes."""
        return replace(self, splits=tuple("train" if split == "val" else split for split in self.splits))

    def record(self) -> dict[str, Any]:
        """Return what identifies the data of a result: the split rule, and counts and digests of classes and images.

        Two results with equal records were trained and tested on the same classes and the same pixels.
        """
        counts = np.diff(self.offsets)
        return {
            "split": self.split_rule,
            "classes": {split: len(self.classes(split)) for split in SPLITS},
            "images": {split: int(counts[self.classes(split)].sum()) for split in SPLITS},
            "class_names_sha256": {
                split: hashlib.sha256(json.dumps(self.class_names(split)).encode()).hexdigest() for split in SPLITS
            },
            "images_sha256": self.images_sha256,
        }


def open_bank(
    name: str,
    source: Source,
    settings: Any,
    cache_dir: str | Path,
    check: Callable[[Sequence[ImageClass]], None] | None = None,
) -> ImageBank:
    """Open the bank of a data set from the cache; build it first if the cache has none for this source.

    A bank is built under a lock in a temporary directory, which is renamed when complete: two processes never build
    the same bank, and an interrupted build leaves nothing that could be mistaken for one. A bank may be deleted while
    it is open. It must not be truncated: its size is only checked when it is opened, and the system kills a process
    (SIGBUS) that reads beyond the end of a mapped file.

    Args:
        name: the data set's name, for the file name and messages.
        source: where the images come from.
        settings: what the images depend on in addition to the files, serialisable as JSON; a change builds a new bank.
        cache_dir: the directory of banks; ``~`` is the home directory.
        check: rejects the classes before any image is read; only called when a bank is built.

    Raises:
        FewShotError: ``check`` raises it, the cache directory is not writable or too small for the bank, an image
            cannot be read, or a file changes during the build.
    """

    def directory() -> Path:
        return Path(cache_dir).expanduser() / f"{name}-{_fingerprint(source, settings)}"

    found = directory()
    bank = _read(found)
    if bank is not None:
        return bank
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        with _lock(found.with_name(f"{found.name}.lock"), name):
            bank = _read(found)
            if bank is None:
                _build(name, source, directory, check)
                bank = _read(found)
    except OSError as error:
        if error.filename and not Path(error.filename).absolute().is_relative_to(found.parent.absolute()):
            raise FewShotError(
                f"cannot read {error.filename}: {error.strerror or error}; name the files of {name} with data_dir=PATH"
            ) from error
        raise FewShotError(
            f"cannot build the image bank of {name}: {error.filename or found.parent}: {error.strerror or error}; "
            "make it writable, or choose another directory with cache_dir=PATH"
        ) from error
    if bank is None:
        raise FewShotError(f"the image bank {found} disappeared while it was being opened; run again")
    return bank


def _fingerprint(source: Source, settings: Any) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, PIL.__version__, settings], sort_keys=True).encode())
    for path in source.files:
        try:
            status = path.stat()
        except OSError as error:
            raise FewShotError(f"cannot read {path}: {error.strerror}; restore it, or run again") from error
        digest.update(os.fsencode(path.absolute()) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _lock(path: Path, name: str) -> AcquireReturnProxy:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0.1)
    except Timeout:
        say(f"another process is building the image bank of {name}; waiting for it")
        return lock.acquire()


def _list_classes(name: str, source: Source) -> Sequence[ImageClass]:
    classes = source.classes()
    if not classes:
        raise FewShotError(f"the data set {name} has no classes")
    split_of: dict[str, str] = {}
    for image_class in classes:
        if image_class.name in split_of:
            raise FewShotError(
                f"the class {image_class.name} of {name} occurs twice, in {split_of[image_class.name]} and in "
                f"{image_class.split}: test classes must not be trained on; correct the splits"
            )
        split_of[image_class.name] = image_class.split
    return classes


def _build(
    name: str, source: Source, find_directory: Callable[[], Path], check: Callable[[Sequence[ImageClass]], None] | None
) -> None:
    directory = find_directory()
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed build
    partial.mkdir()
    try:
        classes = _list_classes(name, source)
        if check is not None:
            check(classes)
        offsets = [0, *accumulate(c.count for c in classes)]
        audit, digest, class_digests = Audit(), hashlib.sha256(), []
        shape: tuple[int, ...] = ()
        # Written, not mapped: then a full disk raises an error instead of killing the process.
        with (partial / "images.npy").open("wb") as file, closing(_load(classes)) as all_images:
            description = escape(f"building the image bank of {for_terminal(name)}")
            for number, image_class in enumerate(track(classes, description=description, transient=True)):
                images = next(all_images)
                shape = shape or images.shape[1:]
                if images.dtype != np.uint8 or images.ndim != 4 or images.shape != (image_class.count, *shape):
                    size = ", ".join(map(str, shape)) if len(shape) == 3 else "height, width, channels"
                    raise FewShotError(
                        f"the class {image_class.name} of {name} has images of {images.dtype} {list(images.shape)}; "
                        f"its load must return uint8 [{image_class.count}, {size}]"
                    )
                if number == 0:
                    _check_room(partial, name, offsets[-1] * images[0].nbytes)
                    header = {"descr": "|u1", "fortran_order": False, "shape": (offsets[-1], *shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                pixels = np.ascontiguousarray(images).data
                file.write(pixels)
                digest.update(pixels)
                class_digests.append(hashlib.sha256(pixels).hexdigest()[:32])
                audit.add(image_class.name, image_class.split, images)
            file.flush()
            os.fsync(file.fileno())  # otherwise a crash of the machine could leave a bank with missing images
        index = {
            "offsets": offsets,
            "names": [c.name for c in classes],
            "splits": [c.split for c in classes],
            "split_rule": source.split,
            "images_sha256": digest.hexdigest(),
            "class_digests": class_digests,
            "findings": audit.findings(np.load(partial / "images.npy", mmap_mode="r").__getitem__),
        }
        (partial / "index.json").write_text(json.dumps(index), encoding="utf-8")
        if find_directory() != directory:
            raise FewShotError(f"the files of {name} changed while they were read; run again when they are complete")
        shutil.rmtree(directory, ignore_errors=True)  # an unreadable bank
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(classes: Sequence[ImageClass]) -> Generator[NDArray[np.uint8], None, None]:
    """Load classes in threads, and return their images in order.

    A thread takes some neighbouring classes at a time, since these may share files. Decoding images releases Python's
    global lock. The first classes are loaded one by one, so that a full disk is noticed before much is read.
    """
    ends = accumulate(image_class.count for image_class in classes)
    jobs = [
        list(job) for _, job in groupby(zip(classes, ends, strict=True), lambda pair: (pair[1] - 1) // LOADED_TOGETHER)
    ]
    for image_class, _ in jobs[0]:
        yield image_class.load()
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    waiting: deque[Future[list[NDArray[np.uint8]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="fewshot-bank") as pool:
        try:
            for job in jobs[1:]:
                waiting.append(pool.submit(_load_job, [image_class for image_class, _ in job]))
                if len(waiting) > threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _load_job(classes: Sequence[ImageClass]) -> list[NDArray[np.uint8]]:
    return [image_class.load() for image_class in classes]


def _check_room(directory: Path, name: str, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise FewShotError(
            f"the image bank of {name} needs {size / 1e6:,.0f} MB, and {directory.parent} has {free / 1e6:,.0f} MB "
            "free; free some space, choose another directory with cache_dir=PATH, or lower dataset.size"
        )


def _read(directory: Path) -> ImageBank | None:
    try:
        index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        # Copy-on-write, because torch has no read-only tensors: writing to it never changes the file.
        images = np.lib.format.open_memmap(directory / "images.npy", mode="c")
        bank = ImageBank(
            images=torch.from_numpy(images),
            offsets=np.array(index["offsets"], dtype=np.int64),
            names=tuple(index["names"]),
            splits=tuple(index["splits"]),
            split_rule=index["split_rule"],
            images_sha256=index["images_sha256"],
            class_digests=tuple(index["class_digests"]),
            findings=tuple(index["findings"]),
        )
        lists = bank.names, bank.splits, bank.class_digests
        texts = {type(text) for text in (bank.images_sha256, *bank.findings, *bank.names, *bank.class_digests)}
        whole = (
            images.ndim == 4,
            images.dtype == np.uint8,
            bank.offsets.ndim == 1,
            bank.offsets.tolist() == sorted(bank.offsets.tolist()),
            (bank.offsets[0], bank.offsets[-1]) == (0, len(images)),
            all(len(values) == len(bank.offsets) - 1 for values in lists),
            all(split in SPLITS for split in bank.splits),
            texts == {str},
            isinstance(bank.split_rule, str | None),
        )
        return bank if all(whole) else None
    except (*MISSING, *BROKEN):
        return None
