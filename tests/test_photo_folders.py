"""Folders of photos as people have them: nested, linked, with names in any script, and with what is no photo."""

import csv
import os
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torchvision.models import get_model

import fewshot.prediction
from fewshot.config import compose
from fewshot.data.files import list_zip
from fewshot.data.kinds import is_drawn
from fewshot.data.photos import read_photo
from fewshot.errors import FewShotError
from fewshot.prediction import predict
from fewshot.text import for_csv

NAME = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(get_model(NAME, weights=None).state_dict(), path)
    return path


def photo(path, seed=0, size=(40, 40)):
    """Write a photo of coarse random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def places(tmp_path):
    for number in range(6):
        photo(tmp_path / "support" / f"class {number % 2}" / f"{number}.jpg", number)
        photo(tmp_path / "query" / f"{number}.jpg", 10 + number)
    return tmp_path


def answer(places, weights, *overrides):
    encoder = ["encoder=pretrained", f"encoder.name={NAME}", f"encoder.file={weights}", "dataset.size=32"]
    paths = [f"{name}={places / name}" for name in ("support", "query", "out")]
    predict(compose(*encoder, "method=protonet", *paths, *overrides, name="predict"))
    with (places / "out" / "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_nested_and_linked_photos_with_names_in_any_script_are_classified(places, weights, capsys):
    names = ["Ж/日本語.jpg", "عربي/קובץ.jpg", "naïve/émile & co.jpg", "emoji/🦜🦜.JPG", "rtl/\u202egpj.jpg"]
    for number, name in enumerate(names):
        photo(places / "query" / "deep" / name, 20 + number)
    photo(places / "query" / "x.jpg", 40).rename(places / "query" / os.fsdecode(b"latin1 \xe9.jpg"))  # not UTF-8
    photo(places / "elsewhere" / "a.jpg", 30)
    (places / "query" / "link.jpg").symlink_to(photo(places / "one.jpg", 31))
    (places / "query" / "folder").symlink_to(places / "elsewhere", target_is_directory=True)
    (places / "query" / "round").symlink_to(places / "query", target_is_directory=True)
    (places / "query" / "broken.jpg").symlink_to(places / "nowhere.jpg")
    (places / "support" / "class 2 – ñ").symlink_to(places / "support" / "class 1", target_is_directory=True)
    rows = answer(places, weights, "sheet=20", "shown=99")
    assert len(rows) == 6 + len(names) + 3
    assert all(any(row["file"].endswith(for_csv(name)) for row in rows) for name in names)
    message = capsys.readouterr()
    assert "left out: cannot read the image " in message.err and "broken.jpg: [Errno 2] No such file" in message.err
    assert "\u202e" not in message.out
    assert (places / "out" / "predictions.png").exists()


def test_the_crop_decides_what_the_network_sees_and_is_on_the_sheet(places, weights, monkeypatch):
    drawn, titles = [], []
    draw, title = fewshot.prediction.contact_sheet, Figure.suptitle
    monkeypatch.setattr(fewshot.prediction, "contact_sheet", lambda *given: drawn.append(given[0]) or draw(*given))
    monkeypatch.setattr(Figure, "suptitle", lambda *given, **rest: titles.append(given[1]) or title(*given, **rest))
    photo(places / "query" / "0.jpg", 10, (200, 30))
    for crop in ("center", "pad", "squash", "auto"):
        answer(places, weights, "sheet=1", f"crop={crop}")
    assert titles == ["crop=center", "crop=pad", "crop=squash", "crop=center"]
    center, pad, squash, auto = (pixels.astype(int) for ((_, pixels),) in drawn)
    assert (center == auto).all()
    assert min(np.abs(one - other).mean() for one, other in [(center, pad), (center, squash), (pad, squash)]) > 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "support" / "none").mkdir(), r"class none has no image in .*none; add one, or remove"),
        (
            lambda root: (root / "support" / "class 0").rename(root / "other"),
            "has 1 folder with files, and at least two",
        ),
        (lambda root: [file.write_text("x") for file in (root / "query").iterdir()], "there is no query left to class"),
        (lambda _: None, "crop=middle is unknown: choose auto, center, pad, squash"),
    ],
)
def test_a_mistake_is_reported_in_one_line(places, weights, spoil, message):
    spoil(places)
    with pytest.raises(FewShotError, match=message) as caught:
        answer(places, weights, *(["crop=middle"] if "crop" in message else []))
    assert "\n" not in str(caught.value)


def test_strips_and_broken_photos_are_left_out_with_one_line_each(places, weights, capsys):
    photo(places / "query" / "strip.png", size=(1, 20_000))
    whole = photo(places / "query" / "cut.jpg", 50, (400, 400))
    whole.write_bytes(whole.read_bytes()[:2_000])
    bomb = bytearray(photo(places / "query" / "bomb.bmp", 51).read_bytes())
    bomb[18:26] = (30_000).to_bytes(4, "little") * 2
    (places / "query" / "bomb.bmp").write_bytes(bomb)
    assert len(answer(places, weights)) == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("left out: cannot read the image ") for line in lines)
    for reason in ("it is a strip of 1x20,000 pixels", "image file is truncated", "900000000 pixels"):
        assert sum(reason in line for line in lines) == 1


def test_the_same_photo_in_two_classes_is_named(places, weights, capsys):
    (places / "support" / "class 1" / "again.jpg").write_bytes((places / "support" / "class 0" / "0.jpg").read_bytes())
    answer(places, weights)
    lines = [line for line in capsys.readouterr().err.splitlines() if "again.jpg" in line]
    assert len(lines) == 1 and re.search(r"is the same image as .*, so they cannot be distinguished", lines[0])


def letter(path, seed):
    """Write a drawing of one stroke."""
    image = Image.new("L", (60, 60), 255)
    ImageDraw.Draw(image).line(np.random.default_rng(seed).integers(0, 60, 6).tolist(), fill=0, width=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


PHOTOS_TO_LETTERS = "6 of the 6 {} look like photos, but this network knows letters, .*; for photos, choose encoder=pre"
LETTERS_TO_PHOTOS = "6 of the 6 {} look like letters or drawings, but this network knows photos, .*: checkpoint=omni"


@pytest.mark.parametrize("drawn", [(), ("support",), ("query",), ("support", "query")])
@pytest.mark.parametrize("network", ["letters", "photos", "trained on photos"])
def test_a_network_of_letters_that_is_shown_photos_says_so_and_the_other_way_round(
    run, places, weights, capsys, network, drawn
):
    for folder in drawn:
        for path in sorted((places / folder).rglob("*.jpg")):
            letter(path, int(path.stem) + 100 * (folder == "query"))
    if network == "photos":
        answer(places, weights)
    else:
        paths = [f"{name}={places / name}" for name in ("support", "query", "out")]
        place = run("protonet") if network == "letters" else "miniimagenet/protonet"
        predict(compose(f"checkpoint={place}", *paths, name="predict"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "look like" in line]
    message = PHOTOS_TO_LETTERS if network == "letters" else LETTERS_TO_PHOTOS
    strange = [
        name
        for folder, name in (("support", "examples"), ("query", "queries"))
        if (folder in drawn) == (network != "letters")
    ]
    assert len(warnings) == len(strange)
    for line, name in zip(warnings, strange, strict=True):
        assert re.search(message.format(name), line)


@pytest.mark.real_data
def test_characters_and_photos_are_distinguished(real_data):
    characters = list_zip(real_data / "omniglot" / "images_evaluation.zip")
    photos = list_zip(real_data / "miniimagenet" / "images_val.zip")
    for size, channels in ((28, 1), (84, 3)):
        drawn = [is_drawn(read_photo(file, size, channels)) for file in list(characters.values())[::150]]
        taken = [is_drawn(read_photo(file, size, channels)) for file in list(photos.values())[::100]]
        assert min(len(drawn), len(taken)) > 50 and all(drawn) and np.mean(taken) < 0.2
