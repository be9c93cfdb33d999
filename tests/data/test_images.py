import io
import zipfile
import zlib
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, features

from conftest import damaged, nothing_touched
from fewshot.data.files import ImageFile, list_folder, list_zip
from fewshot.data.images import decode, normalise
from fewshot.errors import FewShotError


def encoded(mode="RGB", size=(10, 10), kind="PNG", colour=None):
    buffer = io.BytesIO()
    Image.new(mode, size, colour if colour is not None else 0).save(buffer, kind)
    return buffer.getvalue()


def test_a_folder_and_a_zip_of_it_list_the_same(tmp_path):
    tree = tmp_path / "tree"
    for name in ("b/2.png", "a/1.png", "a/c/3.png", ".hidden/4.png", "a/.5.png"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(name.encode())
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        archive.writestr("__MACOSX/a/1.png", "")
        for path in tree.rglob("*.png"):
            archive.write(path, path.relative_to(tree))
    folder, zipped = list_folder(tree), list_zip(tmp_path / "tree.zip")
    assert set(folder) == set(zipped) == {"a/1.png", "a/c/3.png", "b/2.png"}
    assert all(folder[name].read() == zipped[name].read() == name.encode() for name in folder)
    assert zipped["a/1.png"].name == f"{tmp_path / 'tree.zip'}:a/1.png"


def test_files_are_listed_in_the_order_of_their_names(tmp_path):
    names = [f"{number % 7}/{number:02}.png" for number in range(42)]
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for number in np.random.default_rng(0).permutation(42):
            path = tmp_path / "tree" / names[number]
            if not path.parent.exists():
                path.parent.mkdir(parents=True)
                archive.write(path.parent, path.parent.name)
            path.write_bytes(b"")
            archive.write(path, names[number])
    assert list(list_folder(tmp_path / "tree")) == list(list_zip(tmp_path / "tree.zip")) == sorted(names)


def zip_of(path, contents, compression=zipfile.ZIP_STORED, **bytes_of_both_headers):
    """A zip of one file x.png; both its headers can be changed, at so many bytes after their versions."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.png", contents)
    raw = bytearray(path.read_bytes())
    places = {"version": 0, "flags": 2, "method": 4}
    for start in (4, raw.index(b"PK\x01\x02") + 6):
        for name, value in bytes_of_both_headers.items():
            raw[start + places[name]] = value
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("headers", [{"flags": 1}, {"method": 9}])  # encrypted; Deflate64, as Windows has it
def test_a_member_that_cannot_be_unpacked_is_named(tmp_path, headers):
    archive = zip_of(tmp_path / "a.zip", encoded(), **headers)
    with pytest.raises(FewShotError, match=r"a\.zip:x\.png"):
        decode(list_zip(archive)["x.png"], 8, 3)


def test_a_member_whose_compressed_bytes_are_broken_is_named(tmp_path):
    archive = zip_of(tmp_path / "a.zip", encoded(size=(99, 99)), zipfile.ZIP_DEFLATED)
    raw = bytearray(archive.read_bytes())
    raw[30 + len("x.png")] = 7  # a kind of block that there is not
    archive.write_bytes(raw)
    with pytest.raises(FewShotError, match=r"a\.zip:x\.png"):
        decode(list_zip(archive)["x.png"], 8, 3)


@pytest.mark.parametrize("contents", [b"", b"PK nonsense", None])
def test_a_broken_zip_is_named(tmp_path, contents):
    if contents is None:
        zip_of(tmp_path / "broken.zip", b"", version=99)
    else:
        (tmp_path / "broken.zip").write_bytes(contents)
    with pytest.raises(FewShotError, match=r"broken\.zip"):
        list_zip(tmp_path / "broken.zip")


def test_a_member_with_a_wrong_checksum_is_named(tmp_path):
    contents = encoded(size=(60, 60))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", contents)
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[raw.index(contents) + 60] ^= 255
    (tmp_path / "a.zip").write_bytes(raw)
    with pytest.raises(FewShotError, match=r"a\.zip:x\.png"):
        decode(list_zip(tmp_path / "a.zip")["x.png"], 10, 3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
def test_any_kind_of_image_comes_out_in_the_size_and_channels_asked_for(mode, channels):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    file = ImageFile("x", lambda: encoded(mode, (21, 13), kind))
    pixels = decode(file, 8, channels)
    assert (pixels.shape, pixels.dtype) == ((8, 8, channels), np.uint8)


def test_pixels_of_the_right_size_are_kept_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert np.array_equal(decode(ImageFile("x", buffer.getvalue), 8, 3), pixels)


@pytest.mark.parametrize("mode", ["1", "P", "L", "RGB"])
def test_a_smaller_image_is_smooth_whatever_its_kind(mode):
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (32, 16))).convert(mode)
    buffer = io.BytesIO()
    stripes.save(buffer, "PNG")
    pixels = decode(ImageFile("x", buffer.getvalue), 8, 1)[:, 1:-1]
    assert np.abs(pixels.astype(int) - 128).max() < 20


@pytest.mark.parametrize(
    ("mode", "colour"), [("1", 1), ("L", 255), ("RGB", (255, 255, 255)), ("RGBA", (255, 255, 255, 255))]
)
def test_white_is_white_in_every_kind_of_image(mode, colour):
    for channels in (1, 3):
        assert (decode(ImageFile("x", lambda: encoded(mode, colour=colour)), 8, channels) == 255).all()


def test_colours_are_kept():
    pixels = decode(ImageFile("x", lambda: encoded(colour=(200, 100, 50))), 8, 3)
    assert pixels[4, 4].tolist() == [200, 100, 50]


@cache
def noisy(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("1" if kind in ("MSP", "XBM") else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}
KINDS = [
    *("BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "IM", "JPEG", "JPEG2000", "MSP"),
    *("PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP", "XBM", "AVIF"),
]
KINDS = [kind for kind in KINDS if kind not in OPTIONAL or features.check(OPTIONAL[kind])]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what is odd about a file
@given(contents=damaged(st.sampled_from(KINDS).map(noisy), st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff"])))
def test_whatever_bytes_are_changed_an_image_is_read_or_named_in_one_line(contents):
    try:
        with nothing_touched():
            assert decode(ImageFile("bird.jpg", lambda: contents), 8, 3).shape == (8, 8, 3)
    except FewShotError as error:
        assert "bird.jpg" in str(error) and len(str(error).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_rejected_before_it_is_unpacked(size):
    """Pillow only warns of the first, and rejects the others; all are a few bytes."""
    header = b"IHDR" + b"".join(length.to_bytes(4, "big") for length in size) + b"\x08\x00\x00\x00\x00"
    whole = encoded("L")
    contents = whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:]
    pixels = size[0] * size[1]
    message = (
        rf"(it has {pixels:,} pixels, and at most [\d,]+|Image size \({pixels} pixels\) exceeds limit of \d+ pixels)"
    )
    with pytest.raises(FewShotError, match=rf"bird\.jpg: {message}") as caught:
        decode(ImageFile("bird.jpg", lambda: contents), 8, 3)
    assert len(str(caught.value).splitlines()) == 1


def test_a_picture_that_is_a_program_is_not_run(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    contents = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch owned) (w) file\n"
    with pytest.raises(FewShotError, match=r"bird\.jpg: PostScript is a program and is not run"):
        decode(ImageFile("bird.jpg", lambda: contents), 8, 3)


@pytest.mark.parametrize("contents", [b"", b"not an image", encoded(size=(99, 99))[:60], encoded(kind="JPEG")[:400]])
def test_a_broken_image_is_named(contents):
    with pytest.raises(FewShotError, match=r"bird\.jpg"):
        decode(ImageFile("bird.jpg", lambda: contents), 8, 3)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FewShotError, match=r"gone\.png"):
        decode(ImageFile("gone.png", (tmp_path / "gone.png").read_bytes), 8, 3)


@pytest.fixture
def noise():
    return torch.randint(3, 200, (6, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_range_spans_0_to_1_in_each_image(noise):
    images = normalise(noise, "range")
    assert images.shape == (6, 3, 8, 8)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.amin((1, 2, 3)).tolist() == [0] * 6
    assert images.amax((1, 2, 3)).tolist() == [1] * 6


def test_standardise_gives_zero_mean_and_unit_variance_in_each_image(noise):
    images = normalise(noise, "standardise")
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.var((1, 2, 3), correction=0), torch.ones(6))


@pytest.mark.parametrize("kind", ["range", "standardise"])
def test_each_image_is_normalised_by_itself_and_a_blank_one_stays_finite(noise, kind):
    noise[2] = 77
    images = normalise(noise, kind)
    assert images[2].eq(0).all()
    torch.testing.assert_close(images[4], normalise(noise[4:5], kind)[0])
    torch.testing.assert_close(normalise(noise.view(2, 3, 8, 8, 3), kind).view(6, 3, 8, 8), images)


@pytest.mark.parametrize("kind", ["range", "standardise"])
def test_the_channels_of_an_image_share_one_scale(noise, kind):
    noise[..., 0] //= 10
    images = normalise(noise, kind)
    assert (images[:, 0].amax((1, 2)) < images[:, 1].mean((1, 2))).all()


def test_plain_pixels_go_from_0_to_1(noise):
    images = normalise(noise, "plain")
    torch.testing.assert_close(images, noise.movedim(-1, -3) / 255)


def test_an_unknown_normalisation_is_refused(noise):
    with pytest.raises(FewShotError, match=r"dataset\.normalise=mine is unknown: choose range, standardise or plain"):
        normalise(noise, "mine")
