"""Data sets of torchvision as episodes: splits of classes, public splits, downloads, and what goes wrong."""

import hashlib
import json
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from fewshot.config import compose
from fewshot.data.torchvision import DATA_SETS, torchvision
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.training import make_data, train

NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = NAMES.split()


@pytest.fixture(autouse=True)
def _formats(monkeypatch):
    """Undo what opening a data set does: PostScript is then unknown to Pillow, in the whole process."""
    Image.init()
    monkeypatch.setattr(Image, "ID", [*Image.ID])


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-100, three images per class in either part, and its archive in a folder that a server offers."""
    folder = tmp_path / "made" / "cifar-100-python"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    labels = list(range(100)) * 3
    sums = {}
    for part in ("train", "test"):
        data = random.integers(0, 256, (300, 3072), dtype=np.uint8)
        (folder / part).write_bytes(pickle.dumps({"data": data, "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": CIFAR100}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    with tarfile.open(tmp_path / "made" / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(folder, "cifar-100-python")
    archived = (tmp_path / "made" / "cifar-100-python.tar.gz").read_bytes()
    made = datasets.CIFAR100
    monkeypatch.setattr(made, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(made, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(made, "meta", {**made.meta, "md5": sums["meta"]})
    monkeypatch.setattr(made, "tgz_md5", hashlib.md5(archived).hexdigest())
    monkeypatch.setattr(made, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")  # nothing listens there
    return tmp_path / "made"


@pytest.fixture
def textures(tmp_path):
    """DTD as torchvision arranges it: files in folders, and lists of them."""
    root, random = tmp_path / "data", np.random.default_rng(0)
    (root / "dtd" / "dtd" / "labels").mkdir(parents=True)
    listed = {"train": [], "val": [], "test": []}
    for name in [f"kind{number}" for number in range(10)]:
        (root / "dtd" / "dtd" / "images" / name).mkdir(parents=True)
        for number, split in enumerate(["train", "val", "test", "test"]):
            listed[split].append(f"{name}/{name}_{number}.jpg")
            pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "dtd" / "dtd" / "images" / listed[split][-1])
    for split, names in listed.items():
        (root / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.mark.parametrize(
    ("name", "counts", "digest"),
    [
        ("cifar_fs", (64, 16, 20), "7c18"),
        ("fc100", (60, 20, 20), "6572"),
    ],
)
def test_public_splits_have_their_classes(cifar, cache_dir, name, counts, digest):
    bank = make_data(compose(f"dataset={name}", f"data_dir={cifar}", f"cache_dir={cache_dir}", "query=2", "way=2")).bank
    assert tuple(len(bank.classes(split)) for split in ("train", "val", "test")) == counts
    assert sorted(bank.names) == CIFAR100 and bank.split_rule == name
    assert bank.images.shape == (600, 32, 32, 3) and set(np.diff(bank.offsets)) == {6}
    lists = "/".join(",".join(sorted(bank.class_names(split))) for split in ("train", "val", "test"))
    assert hashlib.sha256(lists.encode()).hexdigest()[:4] == digest


def test_images_of_all_parts_are_put_together(cifar):
    classes = {one.name: one for one in torchvision(str(cifar), "CIFAR100", 32, 3).classes()}
    with (cifar / "cifar-100-python" / "train").open("rb") as file:
        first = pickle.load(file)["data"][4]  # the first beaver
    pixels = classes["beaver"].load()
    assert pixels.shape == (6, 32, 32, 3) and np.array_equal(pixels[0], first.reshape(3, 32, 32).transpose(1, 2, 0))


def test_a_data_set_of_files_is_trained_on(textures, cache_dir, tmp_path):
    settings = ["dataset=torchvision", "dataset.source.name=DTD", "dataset.size=16", f"data_dir={textures}", "way=2"]
    settings += [
        "query=2",
        "train.query=2",
        "train.way=2",
        "train.episodes=2",
        "val.every=2",
        "val.episodes=2",
        "test.episodes=3",
    ]
    settings += ["hardware=cpu", "encoder.filters=2", f"cache_dir={cache_dir}", f"run_dir={tmp_path / 'run'}"]
    assert 0 <= train(compose(*settings)) <= 1
    bank = make_data(compose(*settings)).bank
    assert bank.split_rule == "drawn, seed 0" and len(bank.names) == 10 and len(bank.images) == 40
    assert [len(bank.classes(split)) for split in ("train", "val", "test")] == [6, 2, 2]
    other = make_data(compose(*settings, "dataset.source.split_seed=1")).bank
    assert other.class_names("test") != bank.class_names("test")


def test_a_run_on_other_photos_is_tested_on_cifar_fs(cifar, textures, cache_dir, tmp_path):
    little = [
        "way=2",
        "query=2",
        "train.query=2",
        "train.way=2",
        "train.episodes=2",
        "val.episodes=2",
        "test.episodes=2",
    ]
    data = ["dataset=torchvision", "dataset.source.name=DTD", "dataset.size=20", f"data_dir={textures}"]
    places = [f"cache_dir={cache_dir}", "hardware=cpu"]
    train(compose(*data, *little, *places, "encoder.filters=2", f"run_dir={tmp_path / 'run'}"))
    tested = [f"checkpoint={tmp_path / 'run'}", "dataset=cifar_fs", f"data_dir={cifar}", "way=5", "episodes=3"]
    evaluate(compose(*tested, *places, f"out={tmp_path / 'out'}", name="evaluate"))
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result["dataset"], result["trained_on"], result["way"]) == ("cifar_fs", "torchvision", 5)
    assert (result["data"]["split"], result["data"]["classes"]["test"]) == ("cifar_fs", 20)
    assert result["config"]["dataset"]["source"]["size"] == 20 and not result["left_out_classes"]


def test_a_missing_data_set_is_downloaded(cifar, tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=cifar)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/cifar-100-python.tar.gz"
        monkeypatch.setattr(datasets.CIFAR100, "url", address)
        source = torchvision(str(tmp_path / "new"), "CIFAR100", 32, 3)
        server.shutdown()
    assert len(source.classes()) == 100 and len(source.files) == 3


@pytest.mark.usefixtures("cifar")
def test_without_a_network_the_line_says_what_to_bring(tmp_path):
    missing = r"CIFAR100 is not in .*new: .*put it into .*cifar-100-python as torchvision"
    with pytest.raises(FewShotError, match=missing):
        torchvision(str(tmp_path / "new"), "CIFAR100", 32, 3)
    with pytest.raises(FewShotError, match=r"CIFAR100 is not in .*dataset\.source\.download=true"):
        torchvision(str(tmp_path / "new"), "CIFAR100", 32, 3, download=False)


def test_damage_is_named(cifar, textures):
    with (cifar / "cifar-100-python" / "train").open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        FewShotError, match=r"CIFAR100 is incomplete or damaged in .*: .*corrupted.*; remove .*cifar-100-python to"
    ):
        torchvision(str(cifar), "CIFAR100", 32, 3).classes()
    (textures / "dtd" / "dtd" / "images" / "kind3" / "kind3_0.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    classes = {one.name: one for one in torchvision(str(textures), "DTD", 16, 3).classes()}
    assert classes["kind2"].load().shape == (4, 16, 16, 3)
    with pytest.raises(FewShotError, match=r"cannot read the images of kind3: cannot identify image file"):
        classes["kind3"].load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Cifar"}, r"dataset\.source\.name=Cifar must be one of CIFAR10, "),
        ({"name": "ImageFolder"}, r"must be one of"),
        ({"val": ["kind1"]}, "must both list classes, or both be shares"),
        ({"val": ["kind1", "sort"], "test": ["kind2"]}, "DTD has no classes sort; it has kind0, "),
        ({"val": ["kind1"], "test": ["kind1"]}, "share classes: kind1"),
        ({"val": 0.5, "test": 0.5}, r"there are 10 classes, too few .*lower dataset\.source\.val=0\.5"),
    ],
)
def test_impossible_settings_are_refused(textures, settings, message):
    with pytest.raises(FewShotError, match=message):
        torchvision(**{"data_dir": str(textures), "name": "DTD", "size": 16, "channels": 3, **settings}).classes()


def test_all_data_sets_are_in_torchvision_and_their_names_in_the_file():
    assert all(hasattr(datasets, name) for name in DATA_SETS)
    from fewshot.config import CONF  # noqa: PLC0415

    comment = (CONF / "dataset" / "torchvision.yaml").read_text().partition("name: ???  # ")[2].partition("\n")[0]
    assert comment.replace(" or ", ", ").split(", ") == list(DATA_SETS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"val": ["apple"], "test": ["bear", "bed", "bear"]},
            "dataset.source.test of CIFAR100 lists bear more than once",
        ),
        ({"val": ["apple"], "test": ["apple"]}, "share classes: apple"),
    ],
)
def test_classes_are_listed_once(cifar, settings, message):
    source = torchvision(str(cifar), "CIFAR100", 32, 3, download=False, **settings)
    with pytest.raises(FewShotError, match=message):
        source.classes()


@pytest.mark.parametrize(
    ("value", "words"),
    [("-1", "at least 0 and below 1"), ("1", "at least 0 and below 1"), ("C01", "or a list of strings")],
)
def test_shares_are_numbers_below_one(value, words, tmp_path):
    name = "dataset.source.name=EuroSAT"
    with pytest.raises(FewShotError, match=rf"dataset\.source\.val={value} must be .*{words}"):
        train(compose("dataset=torchvision", name, f"dataset.source.val={value}", f"run_dir={tmp_path / 'run'}"))
