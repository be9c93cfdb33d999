"""Image files where they lie: in a folder, or still in the zip they came in. None is trusted."""

import os
import re
import stat
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fewshot.errors import FewShotError

LARGEST = 256 * 2**20  # bytes of a file, or of a member of an archive
MEMBERS = 1_000_000  # of an archive
RATIO = 100  # of what an archive unpacks to, to its own size
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others unpack without a bound on what comes out


@dataclass(frozen=True)
class ImageFile:
    """One encoded image.

    Attributes:
        name: where it lies, for messages: a path, or "archive.zip:member".
        read: returns the file's bytes.
    """

    name: str
    read: Callable[[], bytes]


def plain(path: Path) -> Path:
    """The same path, where a file lies: not a pipe or a device, which could be read for ever.

    Raises:
        OSError: there is no such file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no plain file")
    return path


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: there is no such file, or it is larger than ``LARGEST``.
    """
    size = plain(path).stat().st_size
    if size > LARGEST:
        raise OSError(f"it has {size:,} bytes; at most {LARGEST:,} are read")
    return path.read_bytes()


def list_folder(folder: Path) -> dict[str, ImageFile]:
    """Every file below ``folder``, by its path in it with forward slashes; hidden files are passed over.

    Raises:
        FewShotError: a folder in it cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise FewShotError(
            f"cannot list the folder {error.filename}: {error.strerror}; make it readable, or put it back"
        ) from error

    found = {}
    for directory, directories, files in os.walk(folder, onerror=refuse) if folder.exists() else ():
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        for file in sorted(f for f in files if not f.startswith(".")):
            path = Path(directory, file)
            found[path.relative_to(folder).as_posix()] = ImageFile(str(path), partial(read_file, path))
    return found


def list_zip(archive: Path) -> dict[str, ImageFile]:
    """Every file in the zip ``archive``, by its path in it; nothing is unpacked.

    Raises:
        FewShotError: it is not a zip, or a broken one, or one that no honest program makes: with members outside
            itself, links, devices, two of one name, or more in it than the limits above.
    """
    try:
        size = plain(archive).stat().st_size
        opened = zipfile.ZipFile(archive)
    except (OSError, ValueError, NotImplementedError, MemoryError, zipfile.BadZipFile) as error:
        raise FewShotError(f"cannot read the archive {archive}: {error}; fetch it again") from error
    members = opened.infolist()
    suspicion = _suspicion(members, size)
    if suspicion:
        raise FewShotError(f"the archive {archive} is not to be trusted: {suspicion}; fetch it from its own home")
    reading = threading.Lock()

    def read(member: zipfile.ZipInfo) -> bytes:
        try:
            if member.compress_type not in METHODS:
                raise OSError("it is neither stored nor deflated; pack the archive anew")
            with reading, opened.open(member) as file:
                return file.read(member.file_size)  # without a size, more could come out than the archive says
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:  # RuntimeError: encrypted
            raise OSError(str(error)) from error

    hidden = ("__MACOSX/", ".")
    return {
        member.filename: ImageFile(f"{archive}:{member.filename}", partial(read, member))
        for member in sorted(members, key=lambda of: of.filename)
        if not member.filename.endswith("/") and not member.filename.startswith(hidden) and "/." not in member.filename
    }


def _suspicion(members: list[zipfile.ZipInfo], size: int) -> str | None:
    """What is wrong with the members of an archive of ``size`` bytes."""
    if len(members) > MEMBERS:
        return f"it has {len(members):,} members, more than {MEMBERS:,}"
    seen: set[str] = set()
    for member in members:
        name = member.filename
        wrong = "occurs twice" if name in seen else _wrong(member)
        if wrong:
            return f"its member {name} {wrong}"
        seen.add(name)
    unpacked = sum(member.file_size for member in members)
    if unpacked > max(LARGEST, RATIO * size):
        return f"it unpacks to {unpacked:,} bytes, more than {RATIO} times its own {size:,}"
    return None


def _wrong(member: zipfile.ZipInfo) -> str | None:
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", member.filename) or ".." in re.split(r"[/\\]", member.filename):
        return "would lie outside it"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.file_size > LARGEST:
        return f"unpacks to {member.file_size:,} bytes, more than {LARGEST:,}"
    return None
