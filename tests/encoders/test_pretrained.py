"""Networks from torchvision, with random weights instead of downloads."""

import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, get_model_weights

from fewshot.config import check, compose
from fewshot.encoders import feature_maps
from fewshot.encoders.pretrained import Pretrained
from fewshot.errors import FewShotError
from fewshot.trained import load_trained
from fewshot.training import train

NAME = "mobilenet_v3_small"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file like torchvision's, and the network with these weights."""
    torch.manual_seed(0)
    network = get_model(NAME, weights=None).eval()
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path, network


def pretrained(path, **changes):
    return Pretrained(**{"name": NAME, "weights": "DEFAULT", "file": str(path), "frozen": True} | changes)


def test_embedding_is_the_input_of_torchvisions_last_layer(weights):
    path, network = weights
    pixels = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    reached = []
    network.classifier[-1].register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
    # The images are 224x224, so torchvision's transforms neither resize nor crop.
    transforms = get_model_weights(NAME).DEFAULT.transforms(crop_size=224, resize_size=224)
    with torch.no_grad():
        network(transforms(pixels))
        embeddings = pretrained(path)(pixels / 255)
    torch.testing.assert_close(embeddings, reached[0], rtol=1e-4, atol=1e-5)
    assert embeddings.shape == (2, pretrained(path).features)


def test_images_are_resized_and_grey_ones_expanded_to_colour(weights):
    encoder = pretrained(weights[0])
    grey = torch.rand(1, 1, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))


def test_only_an_encoder_that_is_not_frozen_learns(weights):
    images = torch.rand(4, 3, 64, 64)
    frozen, tuned = pretrained(weights[0]).train(), pretrained(weights[0], frozen=False).train()
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    frozen(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    tuned(images).sum().backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters())
    assert not torch.equal(tuned.network.features[0][1].running_mean, frozen.network.features[0][1].running_mean)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "densenet121", "vgg11_bn", "convnext_tiny"])
def test_the_last_layer_of_any_architecture_is_removed(name):
    with torch.device("meta"):
        encoder = Pretrained(name, load=False)
        assert encoder(torch.zeros(1, 3, encoder.size, encoder.size)).shape == (1, encoder.features)
        assert encoder.features != 1000
        images = torch.zeros(1, 3, encoder.size, encoder.size)
        if name == "vit_b_16":
            with pytest.raises(FewShotError, match="VisionTransformer of torchvision has no feature maps"):
                feature_maps(encoder, images)
        else:
            _, _, height, width = feature_maps(encoder, images).shape
            assert height == width == 7


def test_failed_download_names_the_file_and_its_directory(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(FewShotError) as caught:
        pretrained(None, file=None)
    message, known = str(caught.value), get_model_weights(NAME).DEFAULT
    assert f"put {Path(known.url).name} there" in message and str(tmp_path / "hub" / "checkpoints") in message
    assert "no network" in message and "encoder.file=PATH" in message and "\n" not in message


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_mean_of_the_feature_maps_is_the_embedding(name):
    encoder = Pretrained(name, weights=None).eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(feature_maps(encoder, images).mean((2, 3)), encoder(images))


def test_settings_random_weights_and_safetensors(weights, tmp_path):
    assert Pretrained(NAME, weights=None, dropout=0.7).network.classifier[2].p == 0.7
    save_file(weights[1].state_dict(), tmp_path / "weights.safetensors")
    assert torch.equal(
        pretrained(tmp_path / "weights.safetensors").network.features[0][0].weight, weights[1].features[0][0].weight
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet1"}, "encoder.name=resnet1 is not an image classification model of torchvision"),
        ({"name": "squeezenet1_0"}, "encoder.name=squeezenet does not end in one linear layer"),
        ({"name": "googlenet"}, "encoder.name=googlenet does not end in one linear layer"),
        (
            {"name": "resnet18", "colour": 3},
            "encoder.name=resnet18 rejects its settings: ResNet.__init__() got an unexpected keyword",
        ),
        ({"name": "resnet18", "groups": 7}, "encoder.name=resnet18 rejects its settings: BasicBlock only supports"),
        ({"weights": "BEST"}, "encoder.weights=BEST is unknown for mobilenet_v3_small: choose IMAGENET1K_V1"),
        ({"name": "resnet18"}, "does not contain weights of this network: Missing key"),
        ({"file": "/nowhere/weights.pth"}, "cannot read encoder.file=/nowhere/weights.pth"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(weights, changes, message):
    with pytest.raises(FewShotError) as caught:
        pretrained(weights[0], **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_file_is_named(weights, tmp_path):
    path = tmp_path / "broken.pth"
    path.write_bytes(weights[0].read_bytes()[:1000])
    message = rf"{path} is broken, or does not contain weights of this network: .*; specify a different file"
    with pytest.raises(FewShotError, match=message):
        pretrained(path)
    path.write_bytes(b"hello" * 100)
    with pytest.raises(FewShotError, match=r"of this network: it was not written by torch\.save; specify"):
        pretrained(path)


def test_it_sets_the_size_and_normalisation_of_the_images():
    config = compose("encoder=pretrained", "dataset=folder", "run_dir=x")
    assert (config.dataset.size, config.dataset.source.size, config.dataset.normalise) == (224, 224, "plain")
    assert compose("encoder=pretrained", "dataset.size=84", "run_dir=x").dataset.size == 84
    check(config)  # without a download
    assert isinstance(Pretrained("resnet18", "DEFAULT", None, frozen=False, load=False).network, nn.Module)


def test_fine_tuned_checkpoint_needs_no_other_file(weights, tmp_path, cache_dir):
    file = tmp_path / "weights.pth"
    shutil.copy(weights[0], file)
    tiny = ["way=2", "query=1", "train.way=2", "train.query=1", "train.episodes=1", "val.episodes=1", "test.episodes=2"]
    make = ["encoder=pretrained", f"encoder.name={NAME}", f"encoder.file={file}", "dataset.size=28"]
    places = [f"run_dir={tmp_path / 'run'}", f"cache_dir={cache_dir}"]
    with pytest.raises(FewShotError, match=r"nothing to train: the encoder is frozen"):
        train(compose(*make, *tiny, f"run_dir={tmp_path / 'frozen'}", f"cache_dir={cache_dir}"))
    train(compose(*make, *tiny, *places, "encoder.frozen=false"))
    file.unlink()
    tuned = load_trained(str(tmp_path / "run")).method.encoder
    assert not torch.equal(tuned.network.features[0][0].weight, pretrained(weights[0]).network.features[0][0].weight)
