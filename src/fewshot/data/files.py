"""Image files where they lie: in a folder, or still in the zip they came in."""

import os
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fewshot.errors import FewShotError


@dataclass(frozen=True)
class ImageFile:
    """One encoded image.

    Attributes:
        name: where it lies, for messages: a path, or "archive.zip:member".
        read: returns the file's bytes.
    """

    name: str
    read: Callable[[], bytes]


def list_folder(folder: Path) -> dict[str, ImageFile]:
    """Every file below ``folder``, by its path in it with forward slashes; hidden files are passed over."""
    found = {}
    for directory, directories, files in os.walk(folder):
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        for file in sorted(f for f in files if not f.startswith(".")):
            path = Path(directory, file)
            found[path.relative_to(folder).as_posix()] = ImageFile(str(path), path.read_bytes)
    return found


def list_zip(archive: Path) -> dict[str, ImageFile]:
    """Every file in the zip ``archive``, by its path in it; nothing is unpacked.

    Raises:
        FewShotError: it is not a zip, or a broken one.
    """
    try:
        opened = zipfile.ZipFile(archive)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise FewShotError(f"cannot read the archive {archive}: {error}; fetch it again") from error
    reading = threading.Lock()

    def reader(member: str) -> Callable[[], bytes]:
        def read() -> bytes:
            try:
                with reading:
                    return opened.read(member)
            except (zipfile.BadZipFile, EOFError, RuntimeError) as error:  # the last: encrypted, or an odd compression
                raise OSError(str(error)) from error

        return read

    hidden = ("__MACOSX/", ".")
    return {
        name: ImageFile(f"{archive}:{name}", reader(name))
        for name in sorted(opened.namelist())
        if not name.endswith("/") and not name.startswith(hidden) and "/." not in name
    }
