import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import listing
from fewshot.config import ROOT
from fewshot.data import bank as module
from fewshot.data.bank import ImageClass, Source, open_bank
from fewshot.errors import FewShotError

IMAGES = {
    f"class {number}": np.full((count, 4, 4, 1), number, dtype=np.uint8) for number, count in enumerate((3, 1, 2, 4))
}
SPLITS = ("train", "test", "train", "val")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data" / "source"
    path.parent.mkdir()
    path.write_text("one")
    return path


def make_source(file, built=None):
    def classes():
        if built is not None:
            built.append(1)
        return [
            ImageClass(name, split, len(images), lambda images=images: images)
            for (name, images), split in zip(IMAGES.items(), SPLITS, strict=True)
        ]

    return Source([file], classes)


def test_a_bank_holds_what_the_source_gave(file, tmp_path):
    bank = open_bank("toy", make_source(file), {}, tmp_path / "cache")
    assert torch.equal(bank.images, torch.from_numpy(np.concatenate(list(IMAGES.values()))))
    assert bank.offsets.tolist() == [0, 3, 4, 6, 10]
    assert bank.names == tuple(IMAGES)
    assert bank.splits == SPLITS
    assert bank.classes("train").tolist() == [0, 2]
    assert bank.class_names("val") == ["class 3"]


def test_it_is_built_once_and_again_when_files_or_settings_change(file, tmp_path):
    built: list[int] = []
    source = make_source(file, built)

    def builds(settings):
        open_bank("toy", source, settings, tmp_path / "cache")
        return len(built)

    assert [builds({"size": 4}), builds({"size": 4}), builds({"size": 5})] == [1, 1, 2]
    file.write_text("two, longer")
    assert builds({"size": 4}) == 3
    os.utime(file, (1, 1))
    assert builds({"size": 4}) == 4
    file.write_text("three")
    os.utime(file, (1, 1))
    assert builds({"size": 4}) == 5


def test_another_file_or_another_format_has_a_bank_of_its_own(file, tmp_path, monkeypatch):
    built: list[int] = []
    open_bank("toy", make_source(file, built), {}, tmp_path / "cache")
    twin = shutil.copy2(file, file.with_name("twin"))
    open_bank("toy", make_source(twin, built), {}, tmp_path / "cache")
    assert len(built) == 2
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    open_bank("toy", make_source(file, built), {}, tmp_path / "cache")
    assert len(built) == 3


def test_a_source_without_classes_is_refused(file, tmp_path):
    with pytest.raises(FewShotError, match="toy has no classes"):
        open_bank("toy", Source([file], list), {}, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_class_in_two_splits_is_refused(file, tmp_path):
    good = make_source(file).classes()
    leak = ImageClass("class 0", "test", 1, good[1].load)
    with pytest.raises(FewShotError, match="class 0 of toy occurs twice, in train and in test"):
        open_bank("toy", Source([file], lambda: [*good, leak]), {}, tmp_path / "cache")


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_many_classes_are_loaded_by_threads_in_order(file, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(module.os, "cpu_count", lambda: cores)
    count = module.LOADED_TOGETHER  # each class is a job
    images = [np.full((count, 2, 2, 1), number, dtype=np.uint8) for number in range(12)]
    together, loading = threading.Barrier(min(cores, 2)), threading.Semaphore(cores)

    def load(number):
        assert loading.acquire(blocking=False)
        if number in (4, 5):  # with several cores, both are loaded at the same time
            together.wait(60)
        loading.release()
        return images[number]

    classes = [ImageClass(str(number), SPLITS[number % 4], count, partial(load, number)) for number in range(12)]
    bank = open_bank("toy", Source([file], lambda: classes), {}, tmp_path / "cache")
    assert torch.equal(bank.images, torch.from_numpy(np.concatenate(images)))


def test_a_class_that_cannot_be_loaded_by_a_thread_is_named(file, tmp_path):
    def broken():
        raise FewShotError("cannot read the image x.png")

    good = [ImageClass(str(number), "train", 50, lambda: np.zeros((50, 4, 4, 1), np.uint8)) for number in range(30)]
    source = Source([file], lambda: [*good, ImageClass("broken", "val", 1, broken)])
    with pytest.raises(FewShotError, match=r"^cannot read the image x\.png$"):
        open_bank("toy", source, {}, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_writing_to_the_images_never_reaches_the_disk(file, tmp_path):
    open_bank("toy", make_source(file), {}, tmp_path / "cache").images.fill_(9)
    assert open_bank("toy", make_source(file), {}, tmp_path / "cache").images.max() == 3


def test_nothing_is_written_next_to_the_data(file, tmp_path):
    before = listing(file.parent)
    open_bank("toy", make_source(file), {}, tmp_path / "cache")
    assert listing(file.parent) == before


def test_a_build_that_fails_leaves_nothing_and_the_next_one_works(file, tmp_path):
    def broken():
        raise FewShotError("cannot read the image x.png")

    good = make_source(file)
    source = Source([file], lambda: [*good.classes(), ImageClass("broken", "val", 1, broken)])
    with pytest.raises(FewShotError, match=r"x\.png"):
        open_bank("toy", source, {}, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(open_bank("toy", good, {}, tmp_path / "cache").names) == 4


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("images.npy", b"\x93NUMPY"),
        ("images.npy", b""),
        ("images.npy", None),
        ("index.json", b""),
        ("index.json", b"{"),
        ("index.json", b"{}"),
        ("index.json", b"[]"),
        ("index.json", b"[" * 10**5),
        ("index.json", None),
    ],
)
def test_a_damaged_bank_is_built_again(file, tmp_path, name, contents):
    open_bank("toy", make_source(file), {}, tmp_path / "cache")
    (damaged,) = (tmp_path / "cache").glob(f"*/{name}")
    if contents is None:
        damaged.unlink()
    else:
        damaged.write_bytes(contents)
    assert open_bank("toy", make_source(file), {}, tmp_path / "cache").images.max() == 3


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_bank_is_built_again(file, tmp_path, kept):
    whole = open_bank("toy", make_source(file), {}, tmp_path / "cache").images.clone()
    (images,) = (tmp_path / "cache").glob("*/images.npy")
    os.truncate(images, int(kept * images.stat().st_size))
    assert torch.equal(open_bank("toy", make_source(file), {}, tmp_path / "cache").images, whole)


def test_the_index_of_a_different_bank_is_not_used(file, tmp_path):
    open_bank("toy", make_source(file), {}, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*/index.json")
    index = json.loads(path.read_text())
    for wrong in (
        *({"offsets": [0, 3, 4, 6, 9]}, {"names": ["a"]}, {"splits": ["train"] * 5}, {"offsets": [2**70] * 5}),
        {"offsets": [0, 10**9, *index["offsets"][2:]]},
        {"offsets": [-1, *index["offsets"][1:]]},
        {"offsets": [[offset] for offset in index["offsets"]]},
        *({"names": [[]] * len(index["names"])}, {"splits": [{}] * len(index["splits"])}, {"findings": [3]}),
        *({"splits": ["other"] * len(index["splits"])}, {"images_sha256": []}, {"split_rule": 3}),
        {"class_digests": [None] * len(index["names"])},
    ):
        path.write_text(json.dumps(index | wrong))
        assert open_bank("toy", make_source(file), {}, tmp_path / "cache").names == tuple(IMAGES)
        assert json.loads(path.read_text()) == index


def test_what_is_odd_about_the_images_is_kept_with_them(file, tmp_path):
    def classes():
        listed = make_source(file).classes()
        return [*listed, ImageClass("class 9", "test", 3, listed[0].load)]

    for _ in ("built", "opened"):
        findings = open_bank("toy", Source([file], classes), {}, tmp_path / "cache").findings
        assert any(
            "more than one split" in finding and "class 9 number 3 (test) = class 0 number 1 (train)" in finding
            for finding in findings
        )


def test_files_that_are_gone_when_a_bank_is_opened_are_named(file, tmp_path):
    source = make_source(file)
    file.unlink()
    with pytest.raises(FewShotError, match=rf"cannot read {file}: No such file"):
        open_bank("toy", source, {}, tmp_path / "cache")


@pytest.mark.parametrize("fault", ["changed", "removed"])
def test_files_that_change_while_a_bank_is_built_leave_no_bank(file, tmp_path, fault):
    good = make_source(file)

    def change():
        file.write_text("two, longer") if fault == "changed" else file.unlink()
        return np.zeros((1, 4, 4, 1), dtype=np.uint8)

    source = Source([file], lambda: [*good.classes(), ImageClass("late", "val", 1, change)])
    with pytest.raises(FewShotError, match="changed while they were read" if fault == "changed" else str(file)):
        open_bank("toy", source, {}, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_files_may_have_names_that_are_no_text(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.touch()
    assert open_bank("toy", make_source(path), {}, tmp_path / "cache").names == tuple(IMAGES)


def test_a_cache_that_is_removed_while_a_bank_is_built_is_reported(file, tmp_path):
    def remove():
        shutil.rmtree(tmp_path / "cache")
        return np.zeros((1, 4, 4, 1), dtype=np.uint8)

    source = Source([file], lambda: [*make_source(file).classes(), ImageClass("late", "val", 1, remove)])
    with pytest.raises(FewShotError, match=r"cannot build the image bank of toy: .*cache.*cache_dir=PATH"):
        open_bank("toy", source, {}, tmp_path / "cache")


def test_a_cache_may_be_removed_while_a_bank_is_open(file, tmp_path):
    bank = open_bank("toy", make_source(file), {}, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(bank.images, torch.from_numpy(np.concatenate(list(IMAGES.values()))))


SHORTENED = """
import os, sys
from pathlib import Path
import numpy as np
from fewshot.data.bank import ImageClass, Source, open_bank
load = lambda: np.full((64, 64, 64, 1), 7, dtype=np.uint8)
bank = open_bank("toy", Source([], lambda: [ImageClass("a", "train", 64, load)]), {}, sys.argv[1])
(images,) = Path(sys.argv[1]).glob("*/images.npy")
os.truncate(images, 4096)
print("shortened", flush=True)
print(bank.images[32:].sum())
"""


def test_a_bank_that_is_shortened_while_it_is_open_ends_the_process_rather_than_lie(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", SHORTENED, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert done.stdout.split() == ["shortened"]


@pytest.mark.parametrize("place", ["/proc/none", "{file}/cache"])
def test_a_cache_that_cannot_be_written_is_named(file, place):
    place = place.format(file=file)
    with pytest.raises(FewShotError, match=rf"{place}.*cache_dir=PATH"):
        open_bank("toy", make_source(file), {}, place)


SLOW_BUILD = """
import os, sys, time
from pathlib import Path
import numpy as np
from fewshot.data.bank import ImageClass, Source, open_bank
folder = Path(sys.argv[1])
(folder / f"ready {os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
def load():
    with (folder / "log").open("a") as log:
        log.write("built\\n")
    time.sleep(float(sys.argv[2]))
    return np.full((5, 4, 4, 1), 7, dtype=np.uint8)
source = Source([folder / "source"], lambda: [ImageClass("a", "train", 5, load)])
print(int(open_bank("toy", source, {}, folder / "cache").images.sum()))
"""


def start_build(folder, seconds):
    command = [sys.executable, "-c", SLOW_BUILD, str(folder), str(seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_build_one_bank(tmp_path):
    (tmp_path / "source").touch()
    processes = [start_build(tmp_path, 1) for _ in range(2)]
    while len(list(tmp_path.glob("ready *"))) < 2:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [out.split()[-1] for out, _ in outputs] == [str(5 * 16 * 7)] * 2
    assert sum("waiting for it" in out for out, _ in outputs) == 1
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_is_no_obstacle_and_no_bank(tmp_path):
    for name in ("source", "go"):
        (tmp_path / name).touch()
    killed = start_build(tmp_path, 60)
    while not (tmp_path / "log").exists():
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert list((tmp_path / "cache").glob("*.partial"))
    out, error = start_build(tmp_path, 0).communicate(timeout=120)
    assert out.split()[-1] == str(5 * 16 * 7), error
    (bank,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert json.loads((bank / "index.json").read_text())["names"] == ["a"]


FULL_DISK = """
mount -t tmpfs -o size=256k none "$1" || exit 77
exec "$0" -c '
import sys
import numpy as np
from fewshot.data.bank import ImageClass, Source, open_bank
from fewshot.errors import FewShotError
loaded = []
def load():
    loaded.append(1)
    if len(loaded) == 2:  # meanwhile, somebody else takes the room
        open(sys.argv[1] + "/other", "wb").write(bytes(150_000))
    return np.full((1, 256, 256, 1), 7, dtype=np.uint8)
try:
    open_bank("toy", Source([], lambda: [ImageClass(name, "train", 1, load) for name in "abc"]), {}, sys.argv[1])
except FewShotError as error:
    print(error)
' "$1"
"""


def test_a_bank_that_is_larger_than_the_free_space_is_refused_before_it_is_written(file, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 159))
    with pytest.raises(FewShotError, match=r"bank of toy needs 0 MB, and .*cache has 0 MB free; free some space"):
        open_bank("toy", make_source(file), {}, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("toy*/*"))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 160))
    assert len(open_bank("toy", make_source(file), {}, tmp_path / "cache").images) == 10


def test_a_full_disk_is_reported(tmp_path):
    command = ["unshare", "-rm", "sh", "-c", FULL_DISK, sys.executable, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no private file system to fill")
    assert "No space left on device" in done.stdout, (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            np.zeros((3, 4, 4, 1), np.float32),
            r"class 0 of toy has images of float32 \[3, 4, 4, 1\]; .* uint8 \[3, 4, 4, 1\]",
        ),
        (np.zeros((2, 4, 4, 1), np.uint8), r"uint8 \[2, 4, 4, 1\]; its load must return uint8 \[3, 4, 4, 1\]"),
        (
            np.zeros((3, 4, 4), np.uint8),
            r"uint8 \[3, 4, 4\]; its load must return uint8 \[3, height, width, channels\]",
        ),
    ],
)
def test_images_of_another_type_or_shape_are_refused(file, tmp_path, wrong, message):
    def classes():
        listed = make_source(file).classes()
        return [ImageClass("class 0", "train", 3, lambda: wrong), *listed[1:]]

    with pytest.raises(FewShotError, match=message):
        open_bank("toy", Source([file], classes), {}, tmp_path / "cache")


def test_a_source_that_cannot_be_read_is_not_taken_for_the_cache(file, tmp_path):
    def classes():
        Path(tmp_path / "data").read_bytes()

    with pytest.raises(FewShotError, match=rf"cannot read {tmp_path / 'data'}: Is a directory; .* with data_dir=PATH"):
        open_bank("toy", Source([file], classes), {}, tmp_path / "cache")
