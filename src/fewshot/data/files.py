"""Image files where they lie: in a folder, or still in the archive they came in. None is trusted."""

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

LARGEST = 256 * 2**20  # bytes of a file, or of a member of an archive
MEMBERS = 1_000_000  # of an archive or a folder
RATIO = 100  # of what an archive unpacks to, to its own size
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others unpack without a bound on what comes out
HEADER = 2**20  # bytes of a tar's header, at most
TARS = (".tar", ".tar.gz", ".tgz")
ARCHIVES = (".zip", *TARS)
BULK = (".pkl", ".pickle", ".hdf5", ".h5")  # many images in a file: it is opened, and may be larger than LARGEST
BULK_RATIO = 10  # of such a member, to the size of its archive


@dataclass(frozen=True)
class ImageFile:
    """One encoded image.

    Attributes:
        name: where it lies, for messages: a path, or "archive.zip:member".
        read: returns the file's bytes.
        open: opens the file, where it is not in memory already.
    """

    name: str
    read: Callable[[], bytes]
    open: Callable[[], BinaryIO] | None = None


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


def list_folder(folder: Path, enter: Callable[[str], bool] = lambda _: True) -> dict[str, ImageFile]:
    """Every file below ``folder``, by its path in it with forward slashes; hidden files are passed over.

    The files of a folder come before those of the folders in it, each in the order of their names. Links are followed,
    except those that lead back to a folder they lie in.

    Args:
        folder: where to begin; one that is not there holds nothing.
        enter: which of the folders that lie in it directly are entered, by name.

    Raises:
        FewShotError: a folder in it cannot be listed, or it holds more than ``MEMBERS`` files and folders.
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
                f"cannot list the folder {error.filename}: {error.strerror}; make it readable, or put it back"
            ) from error
        seen += len(listed)
        if seen > MEMBERS:
            raise FewShotError(f"{folder} holds more than {MEMBERS:,} files; name a folder of fewer by data_dir=PATH")
        for name, is_folder in listed:
            if not is_folder:
                found.append(prefix + name)
            elif prefix or enter(name):
                waiting.append((f"{prefix}{name}/", above | {identity}))
    return {name: file_at(folder / name) for name in sorted(found, key=_place)}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def _place(name: str) -> list[tuple[bool, str]]:
    """Where a path stands in a listing: the files of a folder before those of the folders in it."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]


def file_at(path: Path) -> ImageFile:
    """The file at a path; whether there is one shows when it is read."""
    return ImageFile(str(path), partial(read_file, path), lambda: plain(path).open("rb"))


def is_archive(name: str) -> bool:
    """Whether ``list_archive`` reads what has such a name."""
    return name.lower().endswith(ARCHIVES)


def list_archive(archive: Path) -> dict[str, ImageFile]:
    """Every file in a zip or a tar, see ``list_zip`` and ``list_tar``."""
    return list_tar(archive) if archive.name.lower().endswith(TARS) else list_zip(archive)


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
        raise _unreadable(archive, error) from error
    members = opened.infolist()
    _trust(archive, [_zip_member(member) for member in members], size)
    reading = threading.Lock()

    def start(member: zipfile.ZipInfo) -> BinaryIO:
        if member.compress_type not in METHODS:
            raise OSError("it is neither stored nor deflated; pack the archive anew")
        return cast(BinaryIO, opened.open(member))

    def read(member: zipfile.ZipInfo) -> bytes:
        _refuse_bulk(member.file_size)
        try:
            with reading, start(member) as file:
                return file.read(member.file_size)  # without a size, more could come out than the archive says
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:  # RuntimeError: encrypted
            raise OSError(str(error)) from error

    return {
        member.filename: ImageFile(f"{archive}:{member.filename}", partial(read, member), partial(start, member))
        for member in sorted(members, key=lambda member: member.filename)
        if not member.filename.endswith("/") and not _hidden(member.filename)
    }


def list_tar(archive: Path) -> dict[str, ImageFile]:
    """Every file in a tar, plain or compressed by gzip, by its path in it.

    What is compressed is unpacked as a whole into a temporary file that has no name: images are read in any order.

    Raises:
        FewShotError: as for ``list_zip``.
    """
    try:
        size = plain(archive).stat().st_size
        file: BinaryIO = archive.open("rb")
        if file.read(2) == b"\x1f\x8b":
            file = _decompressed(archive, max(LARGEST, RATIO * size))
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
    """What a file compressed by gzip unpacks to, in a temporary file without a name."""
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
    """The file of a tar while its members are listed: what a header claims to hold is read up to a bound."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER:
            raise OSError(f"it has a header of {size:,} bytes, and none may have more than {HEADER:,}")
        return self.file.read(size)


def _headers(file: BinaryIO) -> tuple[tarfile.TarFile, list[tarfile.TarInfo]]:
    opened = tarfile.open(fileobj=cast(BinaryIO, _Headers(file)), mode="r:", errors="surrogateescape")  # noqa: SIM115
    members: list[tarfile.TarInfo] = []
    for member in opened:
        if member.size < 0 or (members and member.offset <= members[-1].offset):
            raise OSError("a header of it leads back")  # for ever
        members.append(member)
        if len(members) > MEMBERS:
            break
    else:  # tarfile takes a broken header for the end
        file.seek(opened.offset)
        if file.read(tarfile.BLOCKSIZE).count(0) != tarfile.BLOCKSIZE:
            raise OSError(f"it is cut off or broken after {opened.offset:,} bytes")
    opened.fileobj = file
    return opened, members


def _unreadable(archive: Path, error: Exception) -> FewShotError:
    return FewShotError(f"cannot read the archive {archive}: {error or type(error).__name__}; fetch it again")


def _refuse_bulk(size: int) -> None:
    if size > LARGEST:
        raise OSError(f"it has {size:,} bytes; at most {LARGEST:,} are read")


def _hidden(name: str) -> bool:
    return name.startswith(("__MACOSX/", ".")) or "/." in name


@dataclass(frozen=True)
class _Member:
    """What is checked of a member of an archive: its name, what it unpacks to, and whether it is a file or a folder."""

    name: str
    size: int
    plain: bool


def _zip_member(member: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(member.external_attr >> 16)
    return _Member(member.filename, member.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR))


def _tar_member(name: str, member: tarfile.TarInfo) -> _Member:
    return _Member(name, member.size, member.isdir() or (member.isreg() and not member.issparse()))


def _trust(archive: Path, members: Sequence[_Member], size: int) -> None:
    """Refuse an archive of ``size`` bytes that no honest program makes."""
    suspicion = _suspicion(members, size)
    if suspicion:
        raise FewShotError(f"the archive {archive} is not to be trusted: {suspicion}; fetch it from its own home")


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
    if unpacked > max(LARGEST, RATIO * size):
        return f"it unpacks to {unpacked:,} bytes, more than {RATIO} times its own {size:,}"
    return None


def _wrong(member: _Member, archive_size: int) -> str | None:
    if re.match(r"[/\\]|[A-Za-z]:[/\\]", member.name) or ".." in re.split(r"[/\\]", member.name):
        return "would lie outside it"
    if not member.plain:
        return "is a link or a device"
    most = max(LARGEST, BULK_RATIO * archive_size) if member.name.lower().endswith(BULK) else LARGEST
    if member.size > most:
        return f"unpacks to {member.size:,} bytes, more than {most:,}"
    return None
