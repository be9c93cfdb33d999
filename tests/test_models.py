"""Models to take away: cards, names as checkpoints, and rows of the tables measured again."""

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open

import fewshot
from fewshot import models
from fewshot.cards import write_cards
from fewshot.checkpoints import load_checkpoint, read_weights
from fewshot.config import CONF, ROOT, compose
from fewshot.data.contents import Contents, contents_of
from fewshot.errors import FewShotError
from fewshot.export import export
from fewshot.metrics import Estimate
from fewshot.models import MODELS, all_models, find, require, short_names
from fewshot.reproduce import p_value, reproduce
from fewshot.results import read_episodes
from fewshot.trained import load_trained

LICENCES = OmegaConf.load(CONF / "models.yaml").licences
LINE = "glyphs/protonet_5way_1shot/0"


def test_every_card_is_what_the_command_writes_today(tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(MODELS, copy, ignore=shutil.ignore_patterns("*.png", "*.md", "*.csv", "card.json"))
    write_cards(LICENCES, copy)
    written = {path.relative_to(copy): path.read_text() for path in copy.rglob("card.json")}
    committed = {path.relative_to(MODELS): path.read_text() for path in MODELS.rglob("card.json")}
    assert committed and written == committed, "write them again: fewshot models cards=true"


def test_a_line_has_a_card_only_if_its_own_training_left_weights(tmp_path):
    lines = [tmp_path / "omniglot" / cell / "0" for cell in ("protonet_20way_1shot", "protonet_5way_5shot")]
    for line in lines:
        shutil.copytree(MODELS / line.relative_to(tmp_path), line, ignore=shutil.ignore_patterns("card.json"))
    trained, tested = lines
    assert len(write_cards(LICENCES, tmp_path)) == 2
    result = json.loads((tested / "results.json").read_text())
    result["run_config"]["train"]["episodes"] *= 3  # a longer training has the same validations, up to some episode
    (tested / "results.json").write_text(json.dumps(result))
    assert write_cards(LICENCES, tmp_path) == [trained / "card.json"]
    assert not (tested / "card.json").exists()


@pytest.mark.parametrize("name", models.names())
def test_the_command_of_a_card_has_its_settings(name):
    card = require(name).card
    program, command, *overrides = shlex.split(card["command"])
    config = compose(*overrides, "run_dir=x")
    assert (program, command, config.seed) == ("fewshot", "train", card["seed"])
    for key, value in card["settings"].items():
        assert OmegaConf.select(config, key) == value, key
    trained = dict(load_checkpoint(require(name).weights)["hyper_parameters"]["method"]["encoder"])
    encoder = OmegaConf.to_container(config.method.encoder, resolve=True)
    assert encoder == {"pool": "none", "signed": False, **trained}  # some are older than these keys
    assert (config.choices.dataset, config.choices.method) == (card["dataset"], card["method"])
    initial = config.encoder.init
    assert initial is None or find(initial) is not None


def test_the_weights_are_small_and_whole():
    files = {model.weights for model in all_models().values()}
    assert files == set(MODELS.rglob("weights.safetensors"))
    assert sum(file.stat().st_size for file in (ROOT / "notebooks" / "results").rglob("*") if file.is_file()) < 25e6
    for model in all_models().values():
        model.check()
        with safe_open(model.weights, framework="pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
            text = file.metadata()["fewshot"]
        assert kinds <= {torch.float32, torch.int64}  # the latter counts batches
        assert "/work" not in text and "/home" not in text
        right = read_episodes(model.folder / "card.json", model.card["test"])
        assert right is not None and len(right) == model.card["test"]["episodes"]


def test_the_models_with_short_names_are_in_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "fewshot.shipped"
    ]
    assert {pattern.rpartition("/")[0] for pattern in patterns} == set(short_names().values())
    for name, line in short_names().items():
        model = require(name)
        assert (model.name, model.card["weights"]) == (line, line)  # not the weights of another folder
        assert name == f"{model.card['dataset']}/{model.card['method']}"


def test_a_name_is_short_or_a_cell_or_one_seed_of_it(tmp_path, monkeypatch):
    assert find("glyphs/protonet") == find("glyphs/protonet_5way_1shot") == find(LINE)
    monkeypatch.setattr(models, "MODELS", tmp_path)
    for seed, accuracy in (("0", 0.5), ("1", 0.7), ("2", 0.6)):
        shutil.copytree(MODELS / LINE, tmp_path / "glyphs" / "cell" / seed)
        card = json.loads((MODELS / LINE / "card.json").read_text())
        card["validation"]["accuracy"] = accuracy
        (tmp_path / "glyphs" / "cell" / seed / "card.json").write_text(json.dumps(card))
    best, other = find("glyphs/cell"), find("glyphs/cell/2")
    assert best is not None and best.name == "glyphs/cell/1"
    assert other is not None and other.name == "glyphs/cell/2"
    assert models.names() == ["glyphs/cell"]
    for name in ("glyphs/protonet", "glyphs/cell/3", "glyphs", "../glyphs/cell", "/glyphs/cell", str(tmp_path)):
        assert find(name) is None


def test_a_changed_byte_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", tmp_path)
    folder = tmp_path / "glyphs" / "cell" / "0"
    shutil.copytree(MODELS / LINE, folder)
    card = json.loads((folder / "card.json").read_text()) | {"weights": "glyphs/cell/0"}
    (folder / "card.json").write_text(json.dumps(card))
    content = (folder / "weights.safetensors").read_bytes()
    load_trained("glyphs/cell")
    for position, part in ((content.index(b"conv4"), "configuration"), (len(content) - 5, "weights")):
        changed = bytearray(content)
        changed[position] ^= 1
        (folder / "weights.safetensors").write_bytes(changed)
        with pytest.raises(FewShotError, match=rf"weights\.safetensors: the {part} changed since the card"):
            load_trained("glyphs/cell")
    (folder / "weights.safetensors").unlink()
    with pytest.raises(FewShotError, match="No such file or directory; restore it"):
        load_trained("glyphs/cell")
    all_models.cache_clear()
    (folder / "card.json").write_text(json.dumps(card | {"format": 2}))
    with pytest.raises(FewShotError, match="has format 2, this version reads 1: install a newer one"):
        find("glyphs/cell")
    (folder / "card.json").write_text('{"format": 1}')
    with pytest.raises(FewShotError, match="is broken: KeyError"):
        find("glyphs/cell")


def test_a_model_is_named_where_a_checkpoint_is(cli, tmp_path):
    network = fewshot.load("glyphs/protonet").method
    weights = load_trained(str(MODELS / LINE / "weights.safetensors")).method
    assert all(map(torch.equal, network.state_dict().values(), weights.state_dict().values()))
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (28, 28), dtype=np.uint8) for _ in range(4)]
    classifier = fewshot.FewShotClassifier("glyphs/protonet").fit(images, [0, 0, 1, 1])
    assert classifier.predict(images).tolist() == [0, 0, 1, 1]
    for number, image in enumerate(images):
        file = tmp_path / "support" / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    Image.fromarray(random.integers(0, 256, (28, 28), dtype=np.uint8)).save(tmp_path / "query.png")
    small = ["hardware=cpu", f"out={tmp_path / 'out'}"]
    named = ["checkpoint=glyphs/protonet"]
    done = cli(*named, "support=support", "query=query.png", *small, script="predict.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = cli(*named, "against=glyphs/protonet_5way_1shot", "episodes=20", *small, script="evaluate.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "+0.00 ± 0.00 points" in done.stdout
    done = cli(*named, f"out={tmp_path / 'again.safetensors'}", script="export.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again, shipped = (
        read_weights(path) for path in (tmp_path / "again.safetensors", MODELS / LINE / "weights.safetensors")
    )
    assert again[0] == shipped[0] and again[1].keys() == shipped[1].keys()
    assert all(map(torch.equal, again[1].values(), shipped[1].values()))
    tiny = ["train.episodes=2", "val.every=2", "val.episodes=2", "test.episodes=2", "pictures=false"]
    done = cli("encoder.init=glyphs/protonet", *tiny, f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    start = json.loads((tmp_path / "run" / "results.json").read_text())["encoder_init"]
    assert start["sha256"] == require(LINE).card["sha256"]["file"]


def test_a_path_of_that_name_comes_first_and_a_misspelt_name_is_corrected(cli, tmp_path):
    (tmp_path / "glyphs" / "protonet").mkdir(parents=True)
    done = cli("checkpoint=glyphs/protonet", script="evaluate.py", cwd=tmp_path)
    assert "using the path glyphs/protonet, not the model of that name" in done.stdout
    assert done.stderr.startswith(f"error: there is no checkpoint {tmp_path}/glyphs/protonet/checkpoints/best.ckpt")
    done = cli("checkpoint=glyphs/protnet", script="evaluate.py", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "(did you mean glyphs/protonet?)" in done.stderr


def test_models_are_listed_with_what_they_expect(cli):
    done = cli(script="models.py")
    assert re.search(
        r"For grey letters, 28 × 28.*glyphs/protonet +│ 5-way 1-shot +│ 9\d\.\d\d ±", done.stdout, re.DOTALL
    )
    assert "For colour photos, 84 × 84; weights of 0." in done.stdout
    assert all(f"│ {name} " in done.stdout for name in models.names())  # none is wrapped
    done = cli("glyphs/protonet", script="models.py")
    assert json.loads(done.stdout) == require(LINE).card
    done = cli("glyphs/protnet", script="models.py")
    assert done.stderr.startswith("error: there is no model glyphs/protnet (did you mean glyphs/protonet?); choose one")


def test_the_line_of_the_embedded_data_set_is_reproduced(cli):
    done = cli("glyphs/protonet", "hardware=cpu", script="reproduce.py")
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(r"^glyphs/protonet +([\d.]+) +([\d.]+) +\d+  (\w+)", done.stdout, re.MULTILINE)
    assert row[2] in ("equal", "within")
    done = cli("glyphs/protonet", "episodes=100", "hardware=cpu", script="reproduce.py")
    assert done.returncode == 0, done.stderr
    (few,) = re.findall(r"^glyphs/protonet +([\d.]+) +([\d.]+) +\d+  (\w+)", done.stdout, re.MULTILINE)
    assert few[2] == row[2] and few[0] != row[0]


def batches():
    """Yield numbers of episodes, and rows to measure in one process: it takes longer to start than a row."""
    names = [name for name in models.names() if not name.startswith("glyphs")]
    # Fewer of MAML, which trains a network in each: a thousand take 20 minutes on an older processor.
    for episodes, maml in ((100, False), (20, True)):
        alike = [name for name in names if ("/maml" in name) == maml]
        yield from ((episodes, alike[start : start + 4]) for start in range(0, len(alike), 4))


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize(("episodes", "names"), list(batches()))
def test_the_first_episodes_of_every_line_are_reproduced(episodes, names, cli, real_data):
    done = cli(*names, f"episodes={episodes}", "hardware=cpu", f"data_dir={real_data}", script="reproduce.py")
    assert done.returncode == 0, done.stderr + done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith(tuple(names))] == names


def settings(cache_dir, *overrides):
    return compose("hardware=cpu", f"cache_dir={cache_dir}", *overrides, name="reproduce")


def test_changed_or_missing_data_and_unknown_lines_are_named(cache_dir, tmp_path, monkeypatch):
    def other(bank):
        contents = contents_of(bank)
        splits = {split: dict(classes) for split, classes in contents.splits.items()}
        splits["test"][next(iter(splits["test"]))] = "0" * 64
        return Contents(splits, "0" * 64)

    monkeypatch.setattr("fewshot.reproduce.contents_of", other)
    with pytest.raises(FewShotError, match=r"1 of 1 rows .*\n.*the data differ .* different images: \S+") as caught:
        reproduce(settings(cache_dir, f"rows=[{LINE}]"))
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(FewShotError, match=r"\nminiimagenet/protonet: miniImageNet is not in .*\nPut there: "):
        reproduce(settings(cache_dir, "rows=[miniimagenet/protonet]", f"data_dir={tmp_path}"))
    with pytest.raises(FewShotError, match="did you mean glyphs/protonet"):
        reproduce(settings(cache_dir, "rows=[glyphs/protnet]"))
    for wrong in ("episodes=1", "train=maybe", "rows=[]", "rows=null"):
        with pytest.raises(FewShotError, match=f"^{re.escape(wrong).replace('null', 'None')} must be "):
            reproduce(settings(cache_dir, wrong))


@pytest.fixture
def tiny(run, tmp_path, monkeypatch):
    """A folder of models with one: a short training on the built-in data set."""
    folder = tmp_path / "models" / "glyphs" / "tiny" / "0"
    folder.mkdir(parents=True)
    for name in ("results.json", "episodes.csv"):
        shutil.copy(run("protonet") / name, folder)
    export(str(run("protonet")), str(folder / "weights.safetensors"))
    write_cards(LICENCES, tmp_path / "models")
    monkeypatch.setattr(models, "MODELS", tmp_path / "models")
    return folder


@pytest.mark.usefixtures("tiny")
def test_the_command_of_a_card_trains_the_same_again(cache_dir, tmp_path, capsys):
    command = require("glyphs/tiny").card["command"]
    changed = {"train.episodes=50", "train.way=5", "query=3", "encoder.filters=8", "val.episodes=2", "test.episodes=8"}
    assert changed <= set(command.split())
    overrides = ("rows=[glyphs/tiny]", f"out={tmp_path / 'out'}", "train=true")
    reproduce(settings(cache_dir, *overrides))
    shown = capsys.readouterr().out
    assert "glyphs/tiny/0: fewshot train" in shown and "expect 0.0" in shown
    assert re.search(r"\nglyphs/tiny +[\d.]+ +[\d.]+ +\d+  equal\n", shown)
    trained = json.loads((tmp_path / "out" / "glyphs" / "tiny" / "0" / "results.json").read_text())
    assert trained["config"]["hardware"]["accelerator"] == "cpu", "the training has the hardware of the command"


def test_a_line_that_differs_fails(tiny, cache_dir):
    card = json.loads((tiny / "card.json").read_text())
    card["test"]["accuracy"], card["test"]["ci95"] = 0.99, 0.001
    (tiny / "card.json").write_text(json.dumps(card))
    all_models.cache_clear()
    with pytest.raises(FewShotError, match=r"glyphs/tiny differs: \d+(\.\d)? fewer of \d+ queries"):
        reproduce(settings(cache_dir, "rows=[glyphs/tiny]"))


def test_the_p_value():
    assert p_value(Estimate(0.0, 0.01, 100, 0)) == 1
    assert p_value(Estimate(0.0196, 0.0196, 100, 0)) == pytest.approx(0.05, abs=1e-3)
    assert p_value(Estimate(-0.0196, 0.0196, 100, 0)) == pytest.approx(0.05, abs=1e-3)
    assert p_value(Estimate(0.1, 0.0196, 100, 0)) < 1e-9
    assert p_value(Estimate(0.1, 0.0, 100, 0)) == 0


def test_weights_without_results_or_a_licence_are_errors(tiny):
    below = tiny.parents[2]
    with pytest.raises(FewShotError, match="no licence of the data set glyphs"):
        write_cards({}, below)
    (tiny / "results.json").unlink()
    with pytest.raises(FewShotError, match=r"weights\.safetensors has no valid results\.json next to it"):
        write_cards(LICENCES, below)
    (tiny / "weights.safetensors").unlink()
    with pytest.raises(FewShotError, match="has weights"):
        write_cards(LICENCES, Path(below))
