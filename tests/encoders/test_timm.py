"""Networks of timm: the tiny ones that it has for tests, with random weights or those of files made here."""

import sys

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file

from fewshot.checkpoints import without_initial_weights
from fewshot.config import check, compose
from fewshot.encoders import feature_maps
from fewshot.encoders.timm import TimmEncoder
from fewshot.errors import FewShotError
from fewshot.trained import load_trained
from fewshot.training import train

timm = pytest.importorskip("timm")
NAME = "test_resnet"


def encoder(**changes):
    return TimmEncoder(**{"name": NAME, "pretrained": False} | changes)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as timm's, with the classifier's weights, and the network they are of."""
    torch.manual_seed(0)
    network = timm.create_model(NAME).eval()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(network.state_dict(), path)
    return path, network


def test_an_embedding_is_what_timm_computes_without_its_classifier(weights):
    path, network = weights
    images, about = torch.rand(2, 3, 160, 160), network.pretrained_cfg
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    found = encoder(file=str(path))
    with torch.no_grad():
        network.reset_classifier(0)
        torch.testing.assert_close(found(images), network((images - mean) / std))
        # Grey images of another size are resized, and taken as grey in colour.
        grey = torch.rand(2, 1, 28, 28)
        torch.testing.assert_close(found(grey), found(grey.expand(-1, 3, -1, -1)))
    assert (found.features, found.size, found.channels) == (96, 160, 3)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_vit"])
def test_models_of_many_kinds_give_vectors_and_maps(name):
    found = encoder(name=name).eval()
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        vectors, maps = found(images), feature_maps(found, images)
    assert vectors.shape == (2, found.features) and maps.ndim == 4 and len(maps) == 2
    assert maps.shape[2] == maps.shape[3] > 1
    if name in ("test_resnet", "test_efficientnet"):
        torch.testing.assert_close(maps.mean((2, 3)), vectors)


def test_further_settings_go_to_the_model():
    assert encoder(in_chans=1).network.conv1[0].in_channels == 1
    assert encoder(in_chans=1)(torch.rand(2, 1, 28, 28)).shape == (2, 96)
    assert encoder(name="test_vit", img_size=64).size == 64
    assert encoder(size=32).size == 32
    config = compose("encoder=timm", f"encoder.name={NAME}", "encoder.pretrained=false", "+encoder.drop_rate=0.25")
    assert instantiate(config.encoder).network.drop_rate == 0.25


def test_names_in_a_file_are_renamed(weights, tmp_path):
    state = {f"module.body.{name}": weight for name, weight in weights[1].state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.pth")
    found = encoder(file=str(tmp_path / "theirs.pth"), rename={r"^module\.": "", r"^body\.(\w+)": r"\1"})
    torch.testing.assert_close(found.network.state_dict()["conv1.0.weight"], state["module.body.conv1.0.weight"])
    with pytest.raises(FewShotError, match=r"theirs\.pth is broken, or holds no weights of this network: Missing key"):
        encoder(file=str(tmp_path / "theirs.pth"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet81"}, "encoder.name=resnet81 is no model of timm; did you mean "),
        ({"name": "hf-hub:someone/model"}, "encoder.name=hf-hub:someone/model is no model of timm"),
        (
            {"name": f"{NAME}.other"},
            f"{NAME}.other: timm knows no weights of this name; choose one of {NAME}.r160_in1k",
        ),
        ({"colour": 3}, f"encoder.name={NAME} cannot be made so: ResNet.__init__() got an unexpected keyword argument"),
        ({"num_classes": 5}, "encoder.num_classes is no setting here"),
        ({"checkpoint_path": "x.pth"}, "encoder.checkpoint_path is no setting here; name a file"),
        ({"pretrained_cfg": {"url": "http://x"}}, "encoder.pretrained_cfg is no setting here"),
        ({"name": "test_vit", "depth": 10**9}, "encoder.depth=1000000000 must be at most 10,000"),
        ({"file": "/nowhere/model.safetensors"}, "cannot read encoder.file=/nowhere/model.safetensors"),
    ],
)
def test_what_cannot_be_had_is_named_in_one_line(changes, message):
    with pytest.raises(FewShotError) as caught:
        encoder(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_timm_does_not_have_are_named():
    name = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(FewShotError, match=rf"encoder\.name={name} has no weights in timm; .*encoder\.pretrained=fal"):
        encoder(name=name, pretrained=True)


def test_a_download_that_fails_names_what_to_bring(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(FewShotError) as caught:
        encoder(pretrained=True)
    assert "encoder.name=test_resnet cannot be downloaded from huggingface.co/timm/test_resnet" in str(caught.value)
    assert "no network; bring model.safetensors from there, and name it by encoder.file=PATH" in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", None])
def test_a_broken_file_is_named(weights, tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights[0].read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(FewShotError, match=r"model\.safetensors is broken, or holds no weights of this network"):
        encoder(file=str(path))


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FewShotError, match=r"encoder=timm needs timm, .*pip install -e '\.\[timm\]'"):
        encoder()


def test_it_is_trained_by_its_configuration_alone_and_comes_back_from_its_checkpoint(weights, tmp_path, cache_dir):
    tiny = ["way=2", "query=1", "train.way=2", "train.query=1", "train.episodes=1", "val.episodes=1", "test.episodes=2"]
    chosen = ["encoder=timm", f"encoder.name={NAME}", f"encoder.file={weights[0]}", "encoder.frozen=false"]
    chosen += ["encoder.size=32", "dataset.size=28", "+encoder.drop_path_rate=0.1"]
    config = compose(*chosen, *tiny, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}")
    check(config)
    train(config)
    again = load_trained(str(tmp_path / "run")).method.encoder
    assert again.network.state_dict().keys() == encoder().network.state_dict().keys()


def test_it_is_made_again_without_a_file_or_a_download():
    method = {"_target_": "x", "encoder": {"_target_": "fewshot.encoders.timm.TimmEncoder", "name": NAME, "file": "x"}}
    instantiate(without_initial_weights(method)["encoder"])
    assert method["encoder"]["file"] == "x"
    kept = {"_target_": "x", "encoder": {"_target_": "fewshot.encoders.conv4.Conv4", "channels": 1, "size": 28}}
    assert without_initial_weights(kept) == kept
