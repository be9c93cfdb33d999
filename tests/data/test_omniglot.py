import hashlib
import http.server
import io
import json
import shutil
import socket
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image, ImageDraw

from conftest import listing
from fewshot.data import omniglot as module
from fewshot.data.bank import SPLITS, open_bank
from fewshot.data.omniglot import omniglot, split_characters
from fewshot.errors import FewShotError

PARTS = {"images_background": 6, "images_evaluation": 4}
ALPHABETS = {  # of the small Omniglot
    "images_background": {"bac_0": 3, "bac_1": 3},
    "images_evaluation": {"eva_0": 2, "eva_1": 2},
}
SETTINGS = {"size": 28, "split": "random", "split_seed": 0, "val_characters": 2, "rotations": True}


def drawing(number: int, drawer: int) -> bytes:
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).line([(20, 20 + 5 * number), (85, 60 + drawer)], fill=0, width=4)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def small_omniglot(request, monkeypatch):
    """All but the tests on the real files pretend that Omniglot has 10 characters of 3 drawings."""
    if "real_data" not in request.fixturenames:
        monkeypatch.setattr(module, "ALPHABETS", ALPHABETS)
        monkeypatch.setattr(module, "DRAWERS", 3)
        monkeypatch.setattr(module, "TRAIN_CHARACTERS", 7)


def write(folder: Path, zipped: bool = True, part: str | None = None) -> Path:
    for name, characters in PARTS.items():
        if part not in (None, name):
            continue
        members = {
            f"{name}/{name[7:10]}_{number % 2}/character{number:02}/{number:04}_{drawer}.png": drawing(number, drawer)
            for number in range(characters)
            for drawer in range(1, 4)
        }
        folder.mkdir(parents=True, exist_ok=True)
        if zipped:
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
                for member, contents in members.items():
                    archive.writestr(member, contents)
        else:
            for member, contents in members.items():
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                (folder / member).write_bytes(contents)
    return folder.parent


def read(data_dir, **changes):
    return omniglot(str(data_dir), **SETTINGS | changes)


def test_every_layout_gives_the_same_bank(tmp_path):
    layouts = [write(tmp_path / "a" / "omniglot"), write(tmp_path / "b" / "omniglot-py", zipped=False)]
    write(tmp_path / "c" / "omniglot", part="images_background")
    layouts.append(write(tmp_path / "c" / "omniglot", zipped=False, part="images_evaluation"))
    first, *others = [open_bank("omniglot", read(data_dir), {}, tmp_path / "cache") for data_dir in layouts]
    assert first.images.shape == (10 * 4 * 3, 28, 28, 1)
    assert first.images.max() > 240 and first.images.float().mean() < 60  # bright ink on black
    for other in others:
        assert (other.names, other.splits) == (first.names, first.splits)
        assert (other.images == first.images).all()


def test_turned_characters_are_classes_of_the_same_split(tmp_path):
    classes = {c.name: c for c in read(write(tmp_path / "omniglot")).classes()}
    assert len(classes) == 40
    for name, image_class in classes.items():
        character, angle = name.split("@")
        upright = classes[f"{character}@0"]
        assert image_class.split == upright.split
        assert np.array_equal(image_class.load(), np.rot90(upright.load(), int(angle) // 90, axes=(1, 2)))
    assert len(read(tmp_path, rotations=False).classes()) == 10


@pytest.mark.parametrize(("split", "counts"), [("random", [5, 2, 3]), ("lake", [4, 2, 4])])
def test_drawn_characters_are_the_same_whatever_order_they_are_listed_in(split, counts):
    background, evaluation = [f"b/{n}" for n in range(6)], [f"e/{n}" for n in range(4)]
    draw = partial(split_characters, split=split, val_characters=2)
    drawn = draw(background, evaluation, seed=0)
    assert sorted(sum(drawn.values(), [])) == sorted(background + evaluation)
    assert [len(drawn[s]) for s in SPLITS] == counts
    assert drawn == draw(background[::-1], evaluation[::-1], seed=0) == draw(background, evaluation)
    assert any(drawn != draw(background, evaluation, seed=seed) for seed in (1, 2))
    if split == "lake":
        assert drawn["test"] == evaluation


def test_the_vinyals_split_is_alphabetical_in_whatever_order_files_are_listed():
    # In this order as texts, "A-b/1" stands before "A/1": an alphabet whose name begins another one comes first.
    background, evaluation = ["A/1", "A/2", "A-b/1", "Hebrew/1", "Hebrew/2"], ["B/1", "B/2", "B/3", "C/1", "C/2"]
    drawn = split_characters(background, evaluation, "vinyals")
    assert drawn == {
        "train": ["A/1", "A/2", "A-b/1", "B/1", "B/2"],
        "val": ["Hebrew/1", "Hebrew/2"],
        "test": ["B/3", "C/1", "C/2"],
    }
    assert drawn == split_characters(background[::-1], evaluation[::-1], "vinyals")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "mine"}, "split=mine"),
        ({"val_characters": 7}, "val_characters=7 must lie between 1 and 6"),
        ({"val_characters": 0}, "val_characters=0"),
        ({"val_characters": 6, "split": "lake"}, "val_characters=6 must lie between 1 and 5"),
        ({"split": "vinyals", "split_seed": None}, "split=vinyals is a fixed list"),
        ({"split": "vinyals", "val_characters": None}, "split=vinyals is a fixed list"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(FewShotError, match=message):
        read(write(tmp_path / "omniglot"), **changes).classes()


def test_validation_takes_from_the_training_characters_alone():
    names = [f"b/{n}" for n in range(20)]
    few, many = (split_characters(names[:12], names[12:], "random", 3, count) for count in (1, 5))
    assert few["test"] == many["test"]
    assert set(few["val"]) < set(many["val"])
    assert set(few["train"]) | set(few["val"]) == set(many["train"]) | set(many["val"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_bank_depends_on_every_file_and_nothing_is_written_next_to_them(tmp_path, zipped):
    data_dir = write(tmp_path / "data" / "omniglot", zipped)
    before = listing(data_dir)
    source = read(data_dir)
    assert {str(path) for path in source.files} == {name for name in before if Path(name).is_file()}
    open_bank("omniglot", source, {}, tmp_path / "cache")
    assert listing(data_dir) == before


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("bac_0/character02", r"images_background.* has 5 of the 6 characters of images_background: 2 of 3 of bac_0"),
        ("bac_1", r"images_background.* has 3 of the 6 characters of images_background: 0 of 3 of bac_1"),
        ("bac_1/character03/0003_2.png", r"images_background.* has 2 of 3 drawings of bac_1/character03"),
    ],
)
def test_a_copy_that_lacks_characters_names_how_many_and_of_which_alphabet(tmp_path, zipped, lost, named):
    write(tmp_path / "whole" / "omniglot", zipped=False)
    place = tmp_path / "whole" / "omniglot" / "images_background"
    if (place / lost).is_dir():
        shutil.rmtree(place / lost)
    else:
        (place / lost).unlink()
    if zipped:
        shutil.make_archive(str(place), "zip", place.parent, place.name)
        shutil.rmtree(place)
    with pytest.raises(FewShotError, match=named + ("; fetch it again" if zipped else "; unpack it again")):
        read(tmp_path / "whole").classes()


def test_alphabets_that_omniglot_does_not_have_are_ignored(tmp_path):
    write(tmp_path / "omniglot", zipped=False)
    place = tmp_path / "omniglot" / "images_background"
    shutil.copytree(place / "bac_0", place / "mine")
    assert len(read(tmp_path).classes()) == 40


def test_a_corrupt_image_is_named_and_no_cache_is_left(tmp_path):
    write(tmp_path / "omniglot", zipped=False)
    broken = next((tmp_path / "omniglot").rglob("0001_2.png"))
    broken.write_bytes(b"broken")
    with pytest.raises(FewShotError, match=str(broken)):
        open_bank("omniglot", read(tmp_path), {}, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the zips from the loopback address instead of their official one.

    ``server.cut`` says how answers are cut off, and ``server.cut_first`` how many of them; 0 for all. A download's
    first answer only shows whether there is a redirection.
    """
    write(tmp_path / "served" / "omniglot")
    served = tmp_path / "served" / "omniglot"

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            started.gets += 1
            if started.cut_first and started.gets > started.cut_first:
                started.cut = ""
            if started.cut == "silence":
                time.sleep(2)
            if started.cut == "in a chunk":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"FF\r\nonly a little of it")
            else:
                super().do_GET()

        def copyfile(self, source, outputfile):
            contents = source.read()
            outputfile.write(contents[: len(contents) // 2] if started.cut == "half way" else contents)

    started = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served)))
    started.cut, started.gets, started.cut_first = "", 0, 0
    threading.Thread(target=started.serve_forever, daemon=True).start()
    checksums = {part: hashlib.md5((served / f"{part}.zip").read_bytes()).hexdigest() for part in PARTS}
    home = f"http://127.0.0.1:{started.server_address[1]}"
    monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", home)
    monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", checksums)
    monkeypatch.setattr(module, "PAUSES", (0, 0.01))
    yield started
    started.shutdown()


def test_it_is_downloaded_where_it_is_absent(server, tmp_path):
    assert len(read(tmp_path / "data").classes()) == 40
    server.shutdown()
    assert len(read(tmp_path / "data").classes()) == 40
    assert {p.name for p in (tmp_path / "data" / "omniglot").iterdir()} == {f"{part}.zip" for part in PARTS}


@pytest.mark.parametrize("fault", ["half way", "in a chunk", "silence"])
def test_a_download_that_breaks_off_is_tried_again(server, tmp_path, monkeypatch, capsys, fault):
    if fault == "silence":
        monkeypatch.setattr(module, "SILENCE", 0.5)
    server.cut, server.cut_first = fault, 2
    assert len(read(tmp_path / "data").classes()) == 40
    assert capsys.readouterr().out.count("trying again in") == (2 if fault == "silence" else 1)
    assert {p.name for p in (tmp_path / "data" / "omniglot").iterdir()} == {f"{part}.zip" for part in PARTS}


@pytest.mark.parametrize("fault", ["wrong checksum", "half way", "in a chunk", "silence", "no server"])
def test_a_failed_download_is_reported_and_leaves_nothing_behind(server, tmp_path, monkeypatch, capsys, fault):
    if fault == "wrong checksum":
        monkeypatch.setattr(torchvision.datasets.Omniglot, "zips_md5", dict.fromkeys(PARTS, "0" * 32))
    elif fault != "no server":
        server.cut = fault
        monkeypatch.setattr(module, "SILENCE", 0.5)
    else:
        monkeypatch.setattr(torchvision.datasets.Omniglot, "download_url_prefix", "http://127.0.0.1:9")
    message = r"cannot be downloaded from http://127\.0\.0\.1.*data_dir=PATH"
    with pytest.raises(FewShotError, match=message) as caught:
        read(tmp_path / "data")
    assert "<urlopen" not in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert capsys.readouterr().out.count("trying again in") == 2
    assert socket.getdefaulttimeout() is None
    assert not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()  # one that was there stays, and nothing is in it
    with pytest.raises(FewShotError, match=message):
        read(tmp_path / "data")
    assert list(tmp_path.joinpath("data").iterdir()) == []


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("split", "characters", "digest"),
    [
        ("vinyals", (1028, 172, 423), "0baa5b8975b75d0d6957611a28bcba83b328567056d5779fe3864f918b871c54"),
        ("lake", (792, 172, 659), "0c5685d8b842f97667bacc63b76d1d21bb772fc8aec12efbb970c904ae34ffb6"),
        ("random", (1028, 172, 423), "b45f6852be81f0883ab9338d5fadb72cb8c89c6d77c9f66dbb8c79251243fdcc"),
    ],
)
def test_the_real_files_split_as_the_papers_do(real_data, split, characters, digest):
    before = listing(real_data)
    source = omniglot(str(real_data), 28, split, None, None, rotations=True)
    classes = source.classes()
    named = {s: list(dict.fromkeys(c.name.split("@")[0] for c in classes if c.split == s)) for s in SPLITS}
    assert tuple(len(named[s]) for s in SPLITS) == characters
    assert len(set().union(*named.values())) == 1623 and len(classes) == 4 * 1623 and source.split == split
    assert hashlib.sha256(json.dumps(named).encode()).hexdigest() == digest
    if split == "vinyals":
        assert named["test"][0] == "Gurmukhi/character42" and named["test"][-1] == "ULOG/character26"
        assert named["train"][0] == "Alphabet_of_the_Magi/character01" and named["train"][-1] == "Gurmukhi/character41"
        alphabets = {name.split("/")[0] for name in named["val"]}
        assert alphabets == {"Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"}
        train, test = ({name.split("/")[0] for name in named[s]} for s in ("train", "test"))
        assert train & test == {"Gurmukhi"}
    for image_class in classes[::1300]:
        images = image_class.load()
        assert images.shape == (20, 28, 28, 1)
        assert 5 < images.mean() < 80 and images.max() > 200
    assert listing(real_data) == before
