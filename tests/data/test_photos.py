"""Images as people have them."""

import hashlib
import io
import threading
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError, features

from fewshot.data import images
from fewshot.data.files import ImageFile
from fewshot.data.images import decode
from fewshot.data.photos import read_ahead, read_photo
from fewshot.errors import FewShotError

ORIENTATION = 0x0112  # of EXIF


def file_of(image: Image.Image, kind: str = "png", **options: object) -> ImageFile:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return ImageFile(f"image.{kind}", content.getvalue)


def quarters(*colours: tuple[int, ...], mode: str = "RGB", side: int = 8) -> Image.Image:
    """An image of four fields: upper left, upper right, lower left, lower right."""
    image = Image.new(mode, (2 * side, 2 * side))
    for number, colour in enumerate(colours):
        image.paste(colour, (number % 2 * side, number // 2 * side, (number % 2 + 1) * side, (number // 2 + 1) * side))
    return image


RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90)
PHOTO = quarters(RED, GREEN, BLUE, GREY)


def corners(pixels):
    return [tuple(map(int, pixels[y, x])) for y in (1, -2) for x in (1, -2)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_upright_as_its_exif_says(orientation):
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # back to how the camera stored it
    stored = PHOTO if orientation == 1 else PHOTO.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert corners(read_photo(file_of(stored, exif=exif), 16, 3)) == [RED, GREEN, BLUE, GREY]


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "tiff", "webp", "ppm", "tga", "jpeg2000", "ico", "pcx"])
def test_formats_of_pillow_are_read(kind):
    options = {"lossless": True} if kind == "webp" else {}
    pixels = read_photo(file_of(PHOTO, kind, **options), 16, 3)
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, GREY]).max() <= 6


def test_what_is_transparent_becomes_white():
    clear, half = (0, 0, 0, 0), (0, 0, 0, 128)
    image = quarters((*RED, 255), clear, half, (*BLUE, 255), mode="RGBA")
    assert corners(read_photo(file_of(image), 16, 3)) == [RED, (255,) * 3, (127,) * 3, BLUE]
    grey = quarters((40, 255), (0, 0), (0, 0), (80, 255), mode="LA")
    assert corners(read_photo(file_of(grey), 16, 1)) == [(40,), (255,), (255,), (80,)]
    palette = PHOTO.quantize(4)
    first = palette.getpixel((0, 0))
    assert corners(read_photo(file_of(palette, transparency=first), 16, 3)) == [(255,) * 3, GREEN, BLUE, GREY]


def test_grey_of_sixteen_bits_is_stretched_instead_of_clipped():
    deep = (np.arange(256, dtype=np.uint16).reshape(16, 16)) * 200
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32)), Image.fromarray(deep / np.float32(9))):
        pixels = read_photo(file_of(image, "tiff"), 16, 1)[..., 0]
        np.testing.assert_allclose(pixels, np.arange(256).reshape(16, 16), atol=1)
    broken = deep.astype(np.float32)
    broken[3, 3] = np.nan
    with pytest.raises(FewShotError, match="not finite"):
        read_photo(file_of(Image.fromarray(broken), "tiff"), 16, 1)


def test_cmyk_and_black_and_white_are_read():
    pixels = read_photo(file_of(PHOTO.convert("CMYK"), "tiff"), 16, 3)
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, GREY]).max() < 3
    line = Image.new("1", (10, 10), 1)
    assert read_photo(file_of(line), 10, 1).min() == 255


@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_of_a_photo_that_is_not_square_the_middle_is_taken(shape):
    image = Image.new("RGB", shape, RED)
    middle = ((shape[0] - 20) // 2, (shape[1] - 20) // 2)
    image.paste(PHOTO.resize((20, 20), Image.Resampling.NEAREST), middle)
    pixels = read_photo(file_of(image), 20, 3)
    assert corners(pixels) == [RED, GREEN, BLUE, GREY]


def test_letters_become_bright_on_black_whatever_they_were_and_none_is_cut():
    letter = np.full((30, 60), 255, dtype=np.uint8)
    letter[10:20, 2:58] = 0  # a dark stroke from edge to edge
    dark, bright = (read_photo(file_of(Image.fromarray(image)), 30, 1, ink=True) for image in (letter, 255 - letter))
    np.testing.assert_allclose(dark.astype(int), bright.astype(int), atol=1)
    assert dark[15, 2:-2].min() > 200 and dark[:8].max() < 40 and dark[-8:].max() < 40
    assert read_photo(file_of(Image.fromarray(letter)), 30, 1)[15].max() < 40  # as it is, without ink


def test_a_square_drawing_is_read_as_omniglot_reads_it():
    random = np.random.default_rng(0)
    drawing = file_of(Image.fromarray(np.where(random.random((105, 105)) < 0.1, 0, 255).astype(np.uint8)))
    np.testing.assert_array_equal(read_photo(drawing, 28, 1, ink=True), 255 - decode(drawing, 28, 1))


@pytest.mark.parametrize("orientation", [1, 6])
def test_pad_and_squash_keep_the_whole_panorama(orientation):
    panorama = Image.new("RGB", (80, 20), RED)
    panorama.paste(GREEN, (20, 0, 60, 20))
    panorama.paste(BLUE, (60, 0, 80, 20))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = panorama.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else panorama
    center, pad, squash = (
        read_photo(file_of(stored, exif=exif), 40, 3, crop=crop).astype(int) for crop in ("center", "pad", "squash")
    )
    assert (np.abs(center - GREEN) < 2).all()
    assert np.abs(squash[:, [2, 20, 37]] - [RED, GREEN, BLUE]).max() < 3
    assert np.abs(pad[20, [2, 20, 37]] - [RED, GREEN, BLUE]).max() < 3
    assert len(np.unique(pad[:14].reshape(-1, 3), axis=0)) == 1  # one colour above
    np.testing.assert_array_equal(read_photo(file_of(stored, exif=exif), 40, 3), center)


@pytest.mark.parametrize(("ink", "crop"), [(False, "center"), (True, "pad"), (False, "squash")])
@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_strip_is_named(shape, ink, crop):
    with pytest.raises(FewShotError, match=rf"it is a strip of {shape[0]:,}x{shape[1]:,} pixels, .*; replace or rem"):
        read_photo(file_of(Image.new("L", shape)), 28, 1, ink, crop)


def test_a_long_drawing_is_padded_at_the_size_of_the_result(monkeypatch):
    wide = file_of(Image.new("L", (8_000, 400), 255))
    made, new = [], Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *colour: made.append(size) or new(mode, size, *colour))
    assert read_photo(wide, 64, 1, ink=True).shape == (64, 64, 1)
    assert max(made) == (64, 64)  # not 8,000 x 8,000


@pytest.mark.parametrize("kind", ["heif", "avif"])
def test_photos_of_phones_are_read_and_turned_upright(kind):
    pytest.importorskip("pillow_heif", reason="no pillow-heif: pip install -e '.[photos]'")
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    file = file_of(PHOTO.transpose(Image.Transpose.ROTATE_90), kind, exif=exif.tobytes(), quality=100)
    assert np.abs(np.array(corners(read_photo(file, 16, 3))) - [RED, GREEN, BLUE, GREY]).max() <= 12
    with pytest.raises(FewShotError, match=r"cannot read the image x\.heic: "):
        read_photo(ImageFile("x.heic", lambda: file.read()[:300]), 16, 3)


@pytest.mark.parametrize(("brand", "fix"), [(b"heic", r"\.\[photos\]"), (b"avif", r"pillow>=11\.3")])
def test_without_a_decoder_for_photos_of_phones_the_error_names_the_package(brand, fix, monkeypatch):
    def unknown(*_):
        raise UnidentifiedImageError

    monkeypatch.setattr(Image, "open", unknown)
    content = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1"
    with pytest.raises(FewShotError, match=rf"x\.heic: nothing installed reads {brand.decode().upper()}; pip .*{fix}"):
        read_photo(ImageFile("x.heic", lambda: content), 16, 3)


def test_colours_of_sixteen_bits_and_of_print_are_read():
    deep = np.zeros((2, 2, 3), np.uint16)
    deep[0, 1], deep[1, 0] = (65_535, 32_768, 0), (0, 0, 65_535)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    chunks = [(b"IHDR", (2).to_bytes(4) * 2 + b"\x10\x02\0\0\0"), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4) for kind, data in chunks
    )
    pixels = read_photo(ImageFile("deep.png", lambda: content), 2, 3)
    assert pixels.tolist() == [[[0, 0, 0], [255, 128, 0]], [[0, 0, 255], [0, 0, 0]]]
    printed = file_of(PHOTO.convert("CMYK"), "jpeg", quality=100)
    assert np.abs(np.array(corners(read_photo(printed, 16, 3))) - [RED, GREEN, BLUE, GREY]).max() < 12


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_or_many_pages_the_first_is_read(kind):
    others = [Image.new("RGB", PHOTO.size, colour) for colour in ("black", "white")]
    options = {"lossless": True} if kind == "webp" else {}
    pixels = read_photo(file_of(PHOTO, kind, save_all=True, append_images=others, **options), 16, 3)
    assert np.abs(np.array(corners(pixels)) - [RED, GREEN, BLUE, GREY]).max() <= 6


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("ink", [False, True])
def test_a_jpeg_decoded_at_reduced_size_is_nearly_the_same(mode, ink):
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (16, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    photo = file_of(coarse.resize((800, 640), Image.Resampling.BICUBIC).convert(mode), "jpeg", quality=95, exif=exif)
    full, fast = (read_photo(photo, 28, 3, ink, reduced=reduced).astype(int) for reduced in (False, True))
    assert 0 < np.abs(full - fast).mean() < 1.5


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_named(content):
    with pytest.raises(FewShotError, match=r"cannot read the image holiday\.jpg: .*; replace or remove it"):
        read_photo(ImageFile("holiday.jpg", lambda: content), 8, 3)


def test_a_file_that_cannot_be_read_or_is_cut_short_or_too_large_is_named(monkeypatch):
    def fail() -> bytes:
        raise PermissionError(13, "Permission denied")

    short = file_of(PHOTO).read()[:-40]
    for read in (fail, lambda: short):
        with pytest.raises(FewShotError, match=r"cannot read the image x\.png"):
            read_photo(ImageFile("x.png", read), 8, 3)
    for limit, message in ((100, "decompression bomb"), (PHOTO.width * PHOTO.height - 1, "at most [0-9,]+ are read")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(FewShotError, match=message):
            read_photo(file_of(PHOTO), 8, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_more_pixels_than_pillow_allows_is_read_at_a_reduced_size(mode, monkeypatch):
    photo = file_of(PHOTO.resize((800, 640)).convert(mode), "jpeg", quality=95)
    expected = read_photo(photo, 28, 3, reduced=True)
    for limit in (300_000, 100_000):  # Pillow itself refuses twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(read_photo(photo, 28, 3, reduced=True), expected)
        with pytest.raises(FewShotError, match=f"it has 512,000 pixels, and at most {limit:,} are read; replace"):
            read_photo(photo, 28, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # more than a quarter of the sides
    with pytest.raises(FewShotError, match=r"it has 512,000 pixels, and at most 10,000 are read"):
        read_photo(photo, 64, 3, reduced=True)


def test_a_jpeg_that_would_need_memory_for_all_of_its_pixels_is_refused(monkeypatch):
    large = PHOTO.resize((800, 640))
    content = file_of(large, "jpeg").read()
    start = content.index(b"\xff\xda\x00\x0c\x03")
    one_channel = content[:start] + b"\xff\xda\x00\x08\x01" + content[start + 5 : start + 7] + content[start + 11 :]
    progressive = file_of(large, "jpeg", progressive=True).read()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    for hostile in (one_channel, progressive):
        with pytest.raises(FewShotError, match=r"x: it has 512,000 pixels, .* \(256,000,000 of a JPEG that is not pro"):
            read_photo(ImageFile("x", lambda hostile=hostile: hostile), 28, 3, reduced=True)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 511_999)
    with pytest.raises(FewShotError, match=r"x: it has 512,000 pixels, .* \(511,999 of a JPEG"):
        read_photo(ImageFile("x", lambda: content), 28, 3, reduced=True)


def test_images_are_read_ahead_in_order_and_on_several_threads():
    started, blocked = [], threading.Event()

    def read(file):
        started.append((file.name, threading.get_ident()))
        if file.name == "0":
            assert blocked.wait(60)  # the others are read meanwhile
        if file.name == "3":
            raise FewShotError("3 is broken")
        return np.full((1, 1, 1), int(file.read()), np.uint8)

    def contents(number):
        if number == 2 and not blocked.is_set():
            blocked.set()
        return str(number).encode()

    files = [ImageFile(str(number), partial(contents, number)) for number in range(20)]
    reading = read_ahead(files, read, ahead=5)
    file, photo = next(reading)
    assert (file, photo.digest) == (files[0], hashlib.sha256(b"0").digest())
    assert len({thread for _, thread in started}) > 1
    rest = list(reading)
    assert [file for file, _ in rest] == files[1:]
    assert str(rest[2][1]) == "3 is broken"
    assert [int(photo.pixels.item()) for _, photo in rest if not isinstance(photo, FewShotError)] == [
        number for number in range(1, 20) if number != 3
    ]


def test_what_is_not_taken_is_not_read():
    read = []
    files = [ImageFile(str(number), lambda: b"") for number in range(1000)]
    reading = read_ahead(files, lambda file: read.append(file.read()) or np.zeros((1, 1, 1), np.uint8), ahead=10)
    next(reading)
    reading.close()
    assert 1 <= len(read) <= 11
