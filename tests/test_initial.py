"""Encoders that start with the weights of another run."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot.config import compose
from fewshot.data.contents import Contents, known_to_any
from fewshot.encoders.adaptable import make_adaptable
from fewshot.encoders.resnet12 import ResNet12
from fewshot.errors import FewShotError
from fewshot.evaluation import evaluate
from fewshot.export import export
from fewshot.initial import InitialEncoder, read_encoder
from fewshot.results import read_results, settings
from fewshot.training import make_data, train

TINY = ["train.episodes=2", "way=3", "train.way=3", "train.query=2", "query=2", "val.episodes=2", "test.episodes=8"]
TINY += ["encoder.filters=4", "hardware=cpu", "pictures=false", "train.meta_batch=1", "val.every=2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory, cache_dir):
    """A complete run."""
    path = tmp_path_factory.mktemp("source")
    train(compose(*TINY, f"run_dir={path}", f"cache_dir={cache_dir}"))
    return path


@pytest.fixture
def configure(tmp_path, cache_dir):
    return lambda *more, run="run": compose(*TINY, f"run_dir={tmp_path / run}", f"cache_dir={cache_dir}", *more)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("method", ["matching_fce", "maml"])
def test_any_method_can_start_with_the_encoder_of_another_run(method, source, configure, tmp_path):
    # A learning rate so small that the weights do not change.
    train(configure(f"method={method}", *TINY, f"encoder.init={source}", "optimizer.lr=1e-30"))
    begun = weights(source / "checkpoints" / "best.ckpt")
    trained = weights(tmp_path / "run" / "checkpoints" / "last.ckpt")
    parameters = [name for name in trained if name.startswith("encoder.") and name.endswith(("weight", "bias"))]
    assert parameters and all(torch.equal(trained[name], begun[name]) for name in parameters)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("encoder.signed=true", "1 ReLU; here none"),
        ("encoder.pool=mean", "none; here 1 AdaptiveAvgPool2d"),
        ("method=maml", None),
    ],
)
def test_an_encoder_with_the_same_weights_and_other_layers_is_noticed(change, named, source, configure, capfd):
    train(configure(change, *TINY, f"encoder.init={source}"))
    warned = " ".join(capfd.readouterr().err.split())
    if named is None:
        assert "encoder.init" not in warned
    else:
        assert f"has different layers without weights ({named}), so the same weights compute something" in warned


@pytest.mark.parametrize("method", ["protonet", "maml"])
def test_dropout_makes_no_other_encoder(method, capfd):
    with_dropout, without = ResNet12(1, 16, drop=0.1), ResNet12(1, 16)
    if method == "maml":
        make_adaptable(without, twice=True)
    InitialEncoder(with_dropout, Path("there"), "", []).copy_to(without)
    assert "warning" not in capfd.readouterr().err


def test_the_results_name_the_checkpoint_by_its_digest_resumed_or_not(source, configure, tmp_path):
    init = f"encoder.init={source}"
    path = source / "checkpoints" / "best.ckpt"
    begun = {"checkpoint": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    train(configure(init))
    whole = json.loads((tmp_path / "run" / "results.json").read_text())
    assert whole["encoder_init"] == begun
    train(configure(init, "train.episodes=4", run="longer"))
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run", moved)
    (moved / "results.json").unlink()
    # The initial weights are not read again, and need not exist any more.
    train(configure("encoder.init=nowhere", "resume=auto", "train.episodes=4", run="moved"))
    resumed, longer = (tmp_path / run / "checkpoints" / "last.ckpt" for run in ("moved", "longer"))
    assert all(torch.equal(tensor, weights(longer)[name]) for name, tensor in weights(resumed).items())
    (first,), (second,) = (read_results(str(tmp_path / run)) for run in ("moved", "longer"))
    assert first["encoder_init"] == begun and settings(first) == settings(second)
    evaluated = compose(f"checkpoint={moved}", f"out={tmp_path / 'out'}", "hardware=cpu", name="evaluate")
    evaluate(evaluated)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["encoder_init"] == begun


def test_runs_with_different_initial_weights_share_no_line_of_the_report(source, configure, tmp_path):
    train(configure())
    train(configure(f"encoder.init={source}", run="begun"))
    (first,), (second,) = (read_results(str(tmp_path / run)) for run in ("run", "begun"))
    assert first["encoder_init"] is None and settings(first) != settings(second)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("encoder.filters=5", r"\S+ is \[4, 1, 3, 3\], and must be \[5, 1, 3, 3\]"),
        ("encoder=resnet12", "it is a Conv4, and must be a ResNet12"),
    ],
)
def test_a_different_architecture_is_rejected_with_its_first_difference(override, difference, source, configure):
    tiny = [key for key in TINY if not key.startswith("encoder.")] if "resnet12" in override else []
    config = configure(override, f"encoder.init={source}") if not tiny else None
    if config is None:
        config = compose(*tiny, override, f"encoder.init={source}", f"run_dir={source}-other")
    with pytest.raises(FewShotError, match=f"encoder.init=.*different architecture: {difference}") as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_an_incomplete_run_is_rejected(source, configure, tmp_path):
    incomplete = tmp_path / "incomplete"
    shutil.copytree(source, incomplete)
    (incomplete / "results.json").unlink()
    for init in (incomplete, incomplete / "checkpoints" / "last.ckpt"):
        with pytest.raises(FewShotError, match=re.escape(f"encoder.init={init}: the run is not complete")):
            train(configure(f"encoder.init={init}"))


@pytest.mark.parametrize(
    ("init", "why"),
    [
        ("nowhere", "there is no checkpoint nowhere"),
        ("3", "encoder.init=3 must be the directory of a run"),
        ("''", "encoder.init= must be the directory of a run"),
        ("/usr", "there is no checkpoint /usr"),
    ],
)
def test_what_is_not_a_run_is_rejected_in_one_line(init, why, configure):
    with pytest.raises(FewShotError, match=why):
        train(configure(f"encoder.init={init}"))


@pytest.mark.parametrize(("held_out", "renamed"), [("test", False), ("val", False), ("test", True)])
def test_a_run_that_knows_a_validation_or_test_class_is_rejected(held_out, renamed, source, configure):
    config = configure(f"encoder.init={source}")
    bank = make_data(config).bank
    read_encoder(config, bank)
    splits, names = list(bank.splits), list(bank.names)
    moved = splits.index("train")
    splits[moved] = held_out
    names[moved] = "other" if renamed else names[moved]
    bank.__dict__.update(splits=tuple(splits), names=tuple(names))
    with pytest.raises(FewShotError, match=f"1 of the {held_out} classes: {names[moved]}; .*same split") as caught:
        read_encoder(config, bank)
    assert "\n" not in str(caught.value)


def test_names_mean_nothing_in_another_data_set(source, configure):
    config = configure(f"encoder.init={source}")
    bank = make_data(config).bank
    splits = list(bank.splits)
    splits[splits.index("train")] = "test"
    digests = tuple(f"other {number}" for number in range(len(splits)))
    bank.__dict__.update(splits=tuple(splits), class_digests=digests)
    config.dataset.source._target_ = "fewshot.data.folder.folder"
    read_encoder(config, bank)


def test_names_of_wordnet_mean_the_same_in_every_data_set():
    images = {"n01532829": "a1", "n07613480": "a2", "cat": "a3"}
    then = Contents({"train": images, "val": {}, "test": {}})
    now = Contents({"train": {}, "val": {}, "test": {"animals/n01532829": "b1", "n02120079": "b2", "cat": "b3"}})
    assert known_to_any([("miniimagenet", then)], now, "folder", "test") == ["animals/n01532829"]
    assert known_to_any([("folder", then)], now, "folder", "test") == ["cat"]


@pytest.fixture(scope="module")
def chain(source, tmp_path_factory, cache_dir):
    """A run on other data that started from ``source``, its shared weights, and a copy that was resumed."""
    path = tmp_path_factory.mktemp("chain")
    for number in range(18):
        for name in ("one.png", "two.png", "three.png"):
            pixels = np.random.default_rng([number, len(name)]).integers(0, 255, (28, 28), np.uint8)
            (path / "photos" / f"class {number}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path / "photos" / f"class {number}" / name)
    data = ["dataset=folder", f"dataset.source.data_dir={path / 'photos'}", "dataset.size=28", "dataset.channels=1"]
    begin = [*TINY, *data, f"encoder.init={source}", f"cache_dir={cache_dir}"]
    train(compose(*begin, f"run_dir={path / 'run'}"))
    shutil.copytree(path / "run", path / "resumed")
    (path / "resumed" / "results.json").unlink()
    train(compose(*begin, f"run_dir={path / 'resumed'}", "resume=auto", "train.episodes=4"))
    export(str(path / "run"), str(path / "shared.safetensors"))
    return path


@pytest.mark.parametrize("init", ["run", "resumed", "shared.safetensors"])
def test_an_encoder_still_knows_what_it_was_trained_on_before(init, chain, configure, tmp_path, cache_dir, capsys):
    config = configure(f"encoder.init={chain / init}")
    bank = make_data(config).bank
    assert len(read_encoder(config, bank).trained_before) == 2
    splits = list(bank.splits)
    moved = splits.index("train")
    splits[moved] = "test"
    bank.__dict__.update(splits=tuple(splits))
    with pytest.raises(FewShotError, match=f"1 of the test classes: {bank.names[moved]}; "):
        read_encoder(config, bank)
    evaluate(
        compose(
            *(f"checkpoint={chain / init}", "dataset=glyphs", "split=val", "episodes=2", f"out={tmp_path / 'out'}"),
            *("hardware=cpu", f"cache_dir={cache_dir}"),
            name="evaluate",
        )
    )
    assert "left out" not in capsys.readouterr().out, "the validation classes of its first training are new to it"


def test_a_broken_record_of_earlier_trainings_is_named(chain, configure, tmp_path):
    path = chain / "run" / "checkpoints" / "best.ckpt"
    for number, broken in enumerate((3, ["a"], [{"source": "a", "data": "b"}], [{"data": "{}"}])):
        checkpoint = torch.load(path, weights_only=True) | {"trained_before": broken}
        torch.save(checkpoint, tmp_path / f"{number}.ckpt")
        with pytest.raises(FewShotError, match=rf"{number}\.ckpt is broken: "):
            train(configure(f"encoder.init={tmp_path / f'{number}.ckpt'}"))


def test_user_supplied_encoders_need_no_changes(source, configure):
    """``encoder.init`` works for all encoders and is passed to none of them."""
    config = configure(
        f"encoder.init={source}", "encoder._target_=test_initial.own", "~encoder.pool", "~encoder.signed"
    )
    with pytest.raises(FewShotError, match="it is a Conv4, and must be a Linear"):
        train(config)


def own(filters: int, channels: int, size: int) -> torch.nn.Module:
    return torch.nn.Linear(channels * size, filters)


def test_a_run_is_not_resumed_from_another_start(source, configure, tmp_path, cache_dir):
    other = tmp_path / "other"
    train(compose(*TINY, "seed=5", f"run_dir={other}", f"cache_dir={cache_dir}"))
    started = [f"encoder.init={source}", "resume=auto"]
    first = train(configure(*started))
    for init in ([f"encoder.init={other}"], []):
        for longer in ([], ["train.episodes=4"]):
            with pytest.raises(FewShotError, match=r"different settings: encoder\.init="):
                train(configure(*init, *longer, "resume=auto"))
    assert train(configure(f"encoder.init={source / 'checkpoints' / 'best.ckpt'}", "resume=auto")) == first
    train(configure(*started, "train.episodes=4"))
