"""Image files in folders and archives; all of them are untrusted."""

import gzip
import os
import re
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from fewshot.errors import FewShotError

MAX_BYTES = 256 * 2**20  # bytes of a file, or of a member of an archive
MEMBERS = 1_000_000  # of an archive or a folder
RATIO = 100  # maximum ratio of the unpacked size of an archive to its own size
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack to an unbounded size
HEADER = 2**20  # maximum size of a header in a tar, bytes
TARS = (".tar", ".tar.gz", ".tgz")
ARCHIVES = (".zip", *TARS)
BULK = (".pkl", ".pickle", ".hdf5", ".h5")  # files of many images, which are opened and may be larger than MAX_BYTES
BULK_RATIO = 10  # maximum ratio of the size of such a member to that of its archive


@dataclass(frozen=True)
class ImageFile:
    """One encoded image.

    Attributes:
        name: its path, or "archive.zip:member", for messages.
        read: returns the bytes of the file.
        open: opens the file, if it is not already in memory.
    """

    name: str
    read: Callable[[], bytes]
    open: Callable[[], BinaryIO] | None = None


def plain(path: Path) -> Path:
    """Return the path if it is a regular file: not a pipe or a device, which could be read without end.

    Raises:
        OSError: there is no such file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        OSError: there is no such file, or it is larger than ``MAX_BYTES``.
    """
    _refuse_bulk(plain(path).stat().st_size)
    return path.read_bytes()


def list_folder(folder: Path, enter: Callable[[str], bool] = lambda _: True) -> dict[str, ImageFile]:
    """Return every file below ``folder`` by its relative path with forward slashes; hidden files are ignored.

    The files of a folder come before those of its subfolders, sorted by name. Links are followed, except links to a
    parent folder.

    Args:
        folder: the folder; if it does not exist, there are no files.
        enter: decides by name which direct subfolders are entered.

    Raises:
        FewShotError: a subfolder cannot be listed, or there are more than ``MEMBERS`` files and folders.
    """
    found: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())] if folder.exists() else []
    seen = 0
    while waiting:
        prefix, above = waiting.pop()
        try:
            status = (folder / prefix).stat()
            identity = status.st_dev, status.st_ino
            if identity in above:
                continue
            with os.scandir(folder / prefix) as entries:
                listed = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise FewShotError(
                f"cannot list the folder {error.filename}: {error.strerror}; make it readable, or restore it"
            ) from error
        seen += len(listed)
        if seen > MEMBERS:
            raise FewShotError(f"{folder} has more than {MEMBERS:,} files; choose a smaller folder with data_dir=PATH")
        for name, is_folder in listed:
            if not is_folder:
                found.append(prefix + name)
            elif prefix or enter(name):
                waiting.append((f"{prefix}{name}/", above | {identity}))
    return {name: file_at(folder / name) for name in sorted(found, key=_sort_key)}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a broken link
        return False


def _sort_key(name: str) -> list[tuple[bool, str]]:
    """Sort the files of a folder before those of its subfolders."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def file_at(path: Path) -> ImageFile:
    """Return the file at a path; a missing file raises an error when it is read."""
    return ImageFile(str(path), partial(read_file, path), lambda: plain(path).open("rb"))


def is_archive(name: str) -> bool:
    """Return whether ``list_archive`` reads files with such a name."""
    return name.lower().endswith(ARCHIVES)


def list_archive(archive: Path) -> dict[str, ImageFile]:
    """Return every file in a zip or a tar, see ``list_zip`` and ``list_tar``."""
    return list_tar(archive) if archive.name.lower().endswith(TARS) else list_zip(archive)


def list_zip(archive: Path) -> dict[str, ImageFile]:
    """Return every file in a zip by its path in the archive, without unpacking anything.

    Raises:
        FewShotError: the file is not a zip, is broken, or is suspicious: with members outside the archive, links,
            devices, duplicate names, or contents beyond the limits above.
    """
    try:
        size = plain(archive).stat().st_size
        opened = zipfile.ZipFile(archive)
    except (OSError, ValueError, NotImplementedError, MemoryError, zipfile.BadZipFile) as error:
        raise _unreadable(archive, error) from error
    members = opened.infolist()
    _trust(archive, [_zip_member(member) for member in members], size)
    reading = threading.Lock()

    def start(member: zipfile.ZipInfo) -> BinaryIO:
        if member.compress_type not in METHODS:
            raise OSError("it is neither stored nor deflated; repack the archive")
        return cast(BinaryIO, opened.open(member))

    def read(member: zipfile.ZipInfo) -> bytes:
        _refuse_bulk(member.file_size)
        try:
            with reading, start(member) as file:
                return file.read(member.file_size)  # with a limit, because more could come out than the archive says
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:  # RuntimeError: encrypted
            raise OSError(str(error)) from error

    return {
        member.filename: ImageFile(f"{archive}:{member.filename}", partial(read, member), partial(start, member))
        for member in sorted(members, key=lambda member: member.filename)
        if not member.filename.endswith("/") and not _hidden(member.filename)
    }


def list_tar(archive: Path) -> dict[str, ImageFile]:
    """Return every file in a tar, plain or compressed by gzip, by its path in the archive.

    A compressed tar is unpacked as a whole into an unnamed temporary file, because images are read in any order.

    Raises:
        FewShotError: as for ``list_zip``.
    """
    try:
        size = plain(archive).stat().st_size
        file: BinaryIO = archive.open("rb")
        if file.read(2) == b"\x1f\x8b":
            file = _decompressed(archive, max(MAX_BYTES, RATIO * size))
        file.seek(0)
        opened, members = _headers(file)
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError, tarfile.TarError) as error:
        raise _unreadable(archive, error) from error
    names = [(re.sub(r"^(\./)+", "", member.name), member) for member in members]
    _trust(archive, [_tar_member(name, member) for name, member in names if name not in ("", ".")], size)
    reading = threading.Lock()

    def read(member: tarfile.TarInfo) -> bytes:
        _refuse_bulk(member.size)
        with reading:
            file.seek(member.offset_data)
            return file.read(member.size)

    return {
        name: ImageFile(f"{archive}:{name}", partial(read, member), partial(opened.extractfile, member))  # type: ignore[arg-type]
        for name, member in sorted(names, key=lambda named: named[0])
        if member.isreg() and not _hidden(name)
    }


def _decompressed(archive: Path, most: int) -> BinaryIO:
    """Decompress a gzip file into an unnamed temporary file."""
    unpacked = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    with gzip.open(archive) as compressed:
        try:
            while chunk := compressed.read(2**20):
                if unpacked.tell() + len(chunk) > most:
                    raise OSError(f"it unpacks to more than {most:,} bytes, {RATIO} times its own size")
                unpacked.write(chunk)
        except zlib.error as error:
            raise OSError(str(error)) from error
    return unpacked


class _Headers:
    """The file of a tar while its members are listed; it limits how much a header can make tarfile read."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER:
            raise OSError(f"it has a header of {size:,} bytes, more than {HEADER:,}")
        return self.file.read(size)


def _headers(file: BinaryIO) -> tuple[tarfile.TarFile, list[tarfile.TarInfo]]:
    opened = tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:", errors="surrogateescape")  # noqa: SIM115
    members: list[tarfile.TarInfo] = []
    for member in opened:
        if member.size < 0 or (members and member.offset <= members[-1].offset):
            raise OSError("one of its headers points backwards")  # which would loop forever
        members.append(member)
        if len(members) > MEMBERS:
            break
    else:  # tarfile ends at a broken header
        file.seek(opened.offset)
        if file.read(tarfile.BLOCKSIZE).count(0) != tarfile.BLOCKSIZE:
            raise OSError(f"it is truncated or broken after {opened.offset:,} bytes")
    opened.fileobj = file
    return opened, members


def _unreadable(archive: Path, error: Exception) -> FewShotError:
    return FewShotError(f"cannot read the archive {archive}: {error or type(error).__name__}; download it again")


def _refuse_bulk(size: int) -> None:
    if size > MAX_BYTES:
        raise OSError(f"it has {size:,} bytes; at most {MAX_BYTES:,} are read")


def _hidden(name: str) -> bool:
    return name.startswith(("__MACOSX/", ".")) or "/." in name


@dataclass(frozen=True)
class _Member:
    """The checked properties of a member of an archive: name, unpacked size, and whether it is a file or a folder."""

    name: str
    size: int
    plain: bool


def _zip_member(member: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(member.external_attr >> 16)
    return _Member(member.filename, member.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR))


def _tar_member(name: str, member: tarfile.TarInfo) -> _Member:
    return _Member(name, member.size, member.isdir() or (member.isreg() and not member.issparse()))


def _trust(archive: Path, members: Sequence[_Member], size: int) -> None:
    """Reject a suspicious archive of ``size`` bytes."""
    suspicion = _suspicion(members, size)
    if suspicion:
        raise FewShotError(f"the archive {archive} is not safe to read: {suspicion}; download it from its own site")


def _suspicion(members: Sequence[_Member], size: int) -> str | None:
    if len(members) > MEMBERS:
        return f"it has {len(members):,} members, more than {MEMBERS:,}"
    seen: set[str] = set()
    for member in members:
        wrong = "occurs twice" if member.name in seen else _wrong(member, size)
        if wrong:
            return f"its member {member.name} {wrong}"
        seen.add(member.name)
    unpacked = sum(member.size for member in members)
    if unpacked > max(MAX_BYTES, RATIO * size):
        return f"it unpacks to {unpacked:,} bytes, more than {RATIO} times its own {size:,}"
    return None


def _wrong(member: _Member, archive_size: int) -> str | None:
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", member.name) or ".." in re.split(r"[/\\]", member.name):
        return "has a path outside the archive"
    if not member.plain:
        return "is a link or a device"
    most = max(MAX_BYTES, BULK_RATIO * archive_size) if member.name.lower().endswith(BULK) else MAX_BYTES
    if member.size > most:
        return f"unpacks to {member.size:,} bytes, more than {most:,}"
    return None
