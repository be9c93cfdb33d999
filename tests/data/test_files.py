import gzip
import io
import os
import stat
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import damaged, nothing_touched
from fewshot.data import files
from fewshot.data.files import list_archive, list_folder, list_tar, list_zip, read_file
from fewshot.data.images import decode
from fewshot.errors import FewShotError


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name, kind=stat.S_IFREG):
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    return info


def zip_of(path, *members, contents=b"x", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member in members:
            archive.writestr(member, contents)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "reported"),
    [
        ("../a.png", stat.S_IFREG, "has a path outside the archive"),
        ("a/../../b.png", stat.S_IFREG, "has a path outside the archive"),
        ("a\\..\\..\\b.png", stat.S_IFREG, "has a path outside the archive"),
        ("/etc/passwd", stat.S_IFREG, "has a path outside the archive"),
        ("C:\\a.png", stat.S_IFREG, "has a path outside the archive"),
        ("\\\\host\\a.png", stat.S_IFREG, "has a path outside the archive"),
        ("__MACOSX/../a.png", stat.S_IFREG, "has a path outside the archive"),
        ("a.png", stat.S_IFLNK, "is a link or a device"),
        ("a.png", stat.S_IFCHR, "is a link or a device"),
        ("a.png", stat.S_IFBLK, "is a link or a device"),
        ("a.png", stat.S_IFIFO, "is a link or a device"),
    ],
)
def test_an_archive_with_a_member_that_no_honest_program_makes_is_refused(tmp_path, name, kind, reported):
    archive = zip_of(tmp_path / "a.zip", member("good.png"), member(name, kind))
    with pytest.raises(FewShotError, match=rf"a\.zip is not safe to read: its member .*{reported}"):
        list_zip(archive)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_two_members_of_one_name_is_refused(tmp_path):
    with pytest.raises(FewShotError, match=r"a\.zip is not .*: its member n01/a\.png occurs twice"):
        list_zip(zip_of(tmp_path / "a.zip", "n01/a.png", "n01/b.png", "n01/a.png"))


@pytest.mark.parametrize("kind", [0, stat.S_IFREG])
def test_names_with_dots_that_lead_nowhere_are_read(tmp_path, kind):
    names = ["a..b.png", "n01..", "x/y...png", "c:d.png"]
    archive = zip_of(tmp_path / "a.zip", *(member(name, kind) for name in names), member("x/", stat.S_IFDIR))
    assert set(list_zip(archive)) == set(names)


def test_a_bomb_is_refused_before_it_is_unpacked_and_the_limit_is_reported(tmp_path):
    bomb = zip_of(tmp_path / "a.zip", "a.png", contents=bytes(300 * 2**20), compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**20
    reported = r"a\.zip .*: its member a\.png unpacks to 314,572,800 bytes, more than 268,435,456"
    tracemalloc.start()
    with pytest.raises(FewShotError, match=reported):
        list_zip(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_bomb_of_many_small_members_is_refused_and_the_limit_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    names, contents = [f"{n}.png" for n in range(20)], bytes(2**17)
    bomb = zip_of(tmp_path / "a.zip", *names, contents=contents, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(FewShotError, match=r"it unpacks to 2,621,440 bytes, more than 100 times its own [\d,]+"):
        list_zip(bomb)
    assert (
        len(list_zip(zip_of(tmp_path / "b.zip", *names[:8], contents=contents, compression=zipfile.ZIP_DEFLATED))) == 8
    )
    assert len(list_zip(zip_of(tmp_path / "c.zip", *names, contents=contents))) == 20


def test_an_archive_of_too_many_members_is_refused_and_the_limit_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MEMBERS", 3)
    assert len(list_zip(zip_of(tmp_path / "a.zip", *"abc"))) == 3
    with pytest.raises(FewShotError, match=r"it has 4 members, more than 3"):
        list_zip(zip_of(tmp_path / "a.zip", *"abcd"))


def test_a_member_that_unpacks_to_more_than_it_says_is_cut_off_there_and_named(tmp_path):
    size = 50 * 2**20
    archive = zip_of(tmp_path / "a.zip", "x.png", contents=bytes(size), compression=zipfile.ZIP_DEFLATED)
    raw = archive.read_bytes().replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    archive.write_bytes(raw)
    file = list_zip(archive)["x.png"]
    tracemalloc.start()
    with pytest.raises(FewShotError, match=r"a\.zip:x\.png"):
        decode(file, 8, 1)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_unpacks_without_a_bound_is_refused(tmp_path, compression):
    file = list_zip(zip_of(tmp_path / "a.zip", "x.png", contents=picture(), compression=compression))["x.png"]
    with pytest.raises(FewShotError, match=r"a\.zip:x\.png: it is neither stored nor deflated"):
        decode(file, 8, 1)


@pytest.mark.parametrize("fault", ["deleted", "replaced", "shortened"])
def test_an_archive_that_changes_after_it_was_listed_is_read_as_it_was_or_named(tmp_path, fault):
    archive = zip_of(tmp_path / "a.zip", "a.png", "b.png", contents=picture())
    listed = list_zip(archive)
    if fault == "shortened":
        os.truncate(archive, 100)
        with pytest.raises(FewShotError, match=r"a\.zip:b\.png"):
            decode(listed["b.png"], 8, 1)
    else:
        archive.unlink()
        if fault == "replaced":
            zip_of(archive, "b.png", contents=b"another")
        assert decode(listed["b.png"], 8, 1).shape == (8, 8, 1)


def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(FewShotError, match=r"a\.png: not a regular file"):
        decode(list_folder(tmp_path)["a.png"], 8, 1)
    with pytest.raises(FewShotError, match=r"a\.png: not a regular file"):
        list_zip(tmp_path / "a.png")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path)


def test_a_link_to_a_device_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to("/dev/zero")
    with pytest.raises(FewShotError, match=r"a\.png: not a regular file"):
        decode(list_folder(tmp_path)["a.png"], 8, 1)


def test_a_file_too_large_to_be_an_image_is_named_with_the_limit(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(FewShotError, match=r"a\.png: it has 1,099,511,627,776 bytes; at most 268,435,456 are read"):
        decode(list_folder(tmp_path)["a.png"], 8, 1)


def test_a_folder_that_cannot_be_listed_is_named_and_not_skipped(tmp_path, monkeypatch):
    (tmp_path / "n01").mkdir()
    (tmp_path / "n02").mkdir()
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("n02"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FewShotError, match=r"cannot list the folder .*n02: Permission denied"):
        list_folder(tmp_path)


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    assert list_folder(tmp_path / "none") == {}


def test_links_to_folders_are_followed_and_loops_of_them_end(tmp_path):
    (tmp_path / "elsewhere" / "inside").mkdir(parents=True)
    for name in ("a.png", "inside/b.png"):
        (tmp_path / "elsewhere" / name).write_bytes(b"")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "inside" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "inside" / "top").symlink_to("../../data")
    assert list(list_folder(tmp_path / "data")) == ["linked/a.png", "linked/inside/b.png"]


def test_a_folder_whose_links_multiply_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MEMBERS", 1000)
    for number in range(20):
        (tmp_path / f"{number}").mkdir()
        for name in "ab":
            (tmp_path / f"{number}" / name).symlink_to(f"../{number + 1}")
    with pytest.raises(FewShotError, match=r"has more than 1,000 files"):
        list_folder(tmp_path)


def test_a_folder_of_links_to_itself_ends(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    with pytest.raises(FewShotError, match=r"dangling\.png"):
        decode(list_folder(tmp_path)["dangling.png"], 8, 1)
    assert "loop/loop" not in list_folder(tmp_path)


def tar_of(path, *members, contents=b"x", mode="w"):
    """A tar of files, each a name or a TarInfo."""
    with tarfile.open(path, mode) as archive:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(contents) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(contents))
    return path


def tar_member(name, kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_folder_a_zip_and_a_tar_of_it_list_the_same(tmp_path, mode):
    names = ["b/2.png", "a/1.png", "a/c/3.png", ".hidden/4.png", "a/.5.png"]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(name.encode())
    with tarfile.open(tmp_path / "tree.tar", mode) as archive:
        archive.add(tmp_path / "tree", ".")
    folder, tar = list_folder(tmp_path / "tree"), list_archive(tmp_path / "tree.tar")
    assert list(folder) == list(tar) == ["a/1.png", "a/c/3.png", "b/2.png"]
    for name in reversed(folder):
        assert folder[name].read() == tar[name].read() == name.encode()
        with tar[name].open() as file:
            assert file.read() == name.encode()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize(
    ("bad", "reported"),
    [
        (tar_member("../a.png"), "has a path outside the archive"),
        (tar_member("./../a.png"), "has a path outside the archive"),
        (tar_member("a/../../b.png"), "has a path outside the archive"),
        (tar_member("/etc/passwd"), "has a path outside the archive"),
        (tar_member("C:\\a.png"), "has a path outside the archive"),
        (tar_member("a.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        (tar_member("a.png", tarfile.SYMTYPE, "good.png"), "is a link or a device"),
        (tar_member("a.png", tarfile.LNKTYPE, "../secret"), "is a link or a device"),
        (tar_member("a.png", tarfile.CHRTYPE), "is a link or a device"),
        (tar_member("a.png", tarfile.BLKTYPE), "is a link or a device"),
        (tar_member("a.png", tarfile.FIFOTYPE), "is a link or a device"),
        (tar_member("good.png"), "occurs twice"),
        (tar_member("./good.png"), "occurs twice"),
    ],
)
def test_a_tar_with_a_member_that_no_honest_program_makes_is_refused(tmp_path, bad, reported, mode):
    with pytest.raises(FewShotError, match=rf"a\.tar is not safe to read: its member .*{reported}"):
        list_tar(tar_of(tmp_path / "a.tar", "good.png", bad, mode=mode))


def test_a_tar_bomb_is_refused_before_it_fills_disk_or_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    bomb = tar_of(tmp_path / "a.tar.gz", *(f"{n}.png" for n in range(50)), contents=bytes(2**20), mode="w:gz")
    written = []
    temporary = files.tempfile.TemporaryFile
    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda: written.append(temporary()) or written[-1])
    tracemalloc.start()
    with pytest.raises(FewShotError, match=r"a\.tar\.gz: it unpacks to more than [\d,]+ bytes, 100 times its own"):
        list_tar(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert written[0].tell() <= max(2**20, 100 * bomb.stat().st_size)


def test_a_tar_with_a_member_or_a_header_beyond_the_limits_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    with pytest.raises(FewShotError, match=r"its member a\.png unpacks to 1,048,577 bytes, more than 1,048,576"):
        list_tar(tar_of(tmp_path / "a.tar", "a.png", contents=bytes(2**20 + 1)))
    long = tar_member("a.png")
    long.pax_headers = {"comment": "x" * 2**21}
    with pytest.raises(FewShotError, match=r"it has a header of [\d,]+ bytes"):
        list_tar(tar_of(tmp_path / "b.tar", long))
    monkeypatch.setattr(files, "MEMBERS", 3)
    with pytest.raises(FewShotError, match=r"it has 4 members, more than 3"):
        list_tar(tar_of(tmp_path / "c.tar", *"abcd"))


@pytest.mark.parametrize("size", [-512, -1, 8**11])
def test_a_tar_whose_headers_lead_back_or_beyond_its_end_is_refused(tmp_path, size):
    info = tar_member("b.png")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tar_of(tmp_path / "a.tar", "a.png")
    path.write_bytes(path.read_bytes()[:1024] + header + bytes(2048))
    with pytest.raises(FewShotError, match=r"cannot read the archive .*a\.tar: .*; download it again"):
        list_tar(path)


@pytest.mark.parametrize("keep", [0, 700, 1024, 1100, 2000])
def test_a_tar_that_is_cut_off_or_overwritten_is_refused(tmp_path, keep):
    content = tar_of(tmp_path / "whole.tar", "a.png", "b.png", contents=picture()).read_bytes()
    cut, overwritten = tmp_path / "cut.tar", tmp_path / "overwritten.tar"
    cut.write_bytes(content[:keep])
    overwritten.write_bytes(content[:1024] + b"junk" * 128 + content[1536:])
    for path in (cut, overwritten):
        with pytest.raises(FewShotError, match=rf"cannot read the archive .*{path.name}: "):
            list_tar(path)


@st.composite
def tars(draw):
    buffer = io.BytesIO()
    kinds = st.sampled_from([*[tarfile.REGTYPE] * 4, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
    style = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
    with tarfile.open(fileobj=buffer, mode="w", format=style) as archive:
        for name, kind, contents in draw(st.lists(st.tuples(NAMES, kinds, CONTENTS), max_size=5)):
            info = tar_member((name or "a") * draw(st.sampled_from([1, 1, 30])), kind, "../secret"[:90])
            info.size = len(contents) if info.isreg() else 0
            try:
                archive.addfile(info, io.BytesIO(contents))
            except ValueError:  # a name too long for this style
                continue
    contents = buffer.getvalue()
    return gzip.compress(contents) if draw(st.booleans()) else contents


NAMES = st.sampled_from(["a.png", "n01/b.png", "n01/a.png", "../a.png", "/a.png", "x/", "", ".a", "a\nb.png", "é.png"])
KINDS = st.sampled_from([0, stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO])
CONTENTS = st.sampled_from([picture(), bytes(100_000), b"", b"../secret"])


@st.composite
def zips(draw):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, kind, contents, compression in draw(
            st.lists(st.tuples(NAMES, KINDS, CONTENTS, st.sampled_from([0, 8, 8, 12, 14])), max_size=5)
        ):
            archive.writestr(member(name or "a", kind), contents, compression)
    return buffer.getvalue()


PIECES = st.sampled_from(
    [
        b"PK\x01\x02",
        b"PK\x03\x04",
        b"PK\x05\x06" + bytes(18),
        b"PK\x06\x06" + b"\xff" * 52,
        b"PK\x06\x07" + b"\x00" * 16,
        b"\x01\x00\x1c\x00" + b"\xff" * 28,  # sizes of 64 bits
        b"\xff" * 4,
        b"\x63\x00",
        b"../",
    ]
)


TAR_PIECES = st.sampled_from(
    [b"\x80" + bytes(11), b"\xff" * 12, b"0" * 12, b"L", b"x", b"S", b"2", b"30 size=999999\n", b"../"]
)


@given(contents=damaged(tars(), TAR_PIECES))
def test_whatever_a_tar_holds_it_is_read_or_refused_in_one_line(tar, contents):
    tar.write_bytes(contents)
    try:
        listed = list_tar(tar)
    except FewShotError as error:
        assert str(tar) in str(error) and len(str(error).splitlines()) == 1  # noqa: PT017
        return
    for name, file in listed.items():
        assert ".." not in name.split("/") and not name.startswith("/")
        try:
            assert decode(file, 8, 1).shape == (8, 8, 1)
        except FewShotError as error:
            assert str(tar) in str(error) and len(str(error).splitlines()) == 1  # noqa: PT017
    assert [path.name for path in tar.parent.iterdir()] == ["images.tar"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return tmp_path_factory.mktemp("zips") / "images.zip"


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return tmp_path_factory.mktemp("tars") / "images.tar"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(contents=damaged(zips(), PIECES))
def test_whatever_an_archive_holds_it_is_read_or_refused_in_one_line(archive, contents):
    archive.write_bytes(contents)
    try:
        with nothing_touched():
            listed = list_zip(archive)
    except FewShotError as error:
        assert str(archive) in str(error) and len(str(error).splitlines()) == 1  # noqa: PT017
        return
    for name, file in listed.items():
        assert ".." not in name.split("/") and not name.startswith("/")
        try:
            with nothing_touched():
                assert decode(file, 8, 1).shape == (8, 8, 1)
        except FewShotError as error:
            assert str(archive) in str(error) and len(str(error).splitlines()) == 1  # noqa: PT017
    assert [path.name for path in archive.parent.iterdir()] == ["images.zip"]
