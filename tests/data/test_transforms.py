import itertools
import json
import os

import pytest
import torch
from hydra.utils import instantiate
from torchvision.transforms import v2

from fewshot.config import CONF, check, compose
from fewshot.data.transforms import Chain, EachImage, RandomColour, RandomCrop, RandomFlip, RandomResizedCrop, seeded
from fewshot.errors import FewShotError
from fewshot.results import settings
from fewshot.training import make_data

OPTIONS = sorted(path.stem for path in (CONF / "transform").glob("*.yaml"))
SMALL = ["way=3", "query=2", "train.way=3", "train.query=2", "train.episodes=8", "val.every=8", "train.meta_batch=3"]


def images_of(count=40, channels=3, height=20, width=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "none"])
def test_every_option_keeps_type_and_shape_and_changes_images_differently(option, channels):
    config = compose(f"transform={option}", "run_dir=x")
    check(config)
    transform = instantiate(config.transform)
    one = images_of(1, channels, 28, 28)
    images = one.repeat(30, 1, 1, 1)
    changed = transform(images)
    assert changed.shape == images.shape and changed.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in changed}) >= 2
    assert torch.equal(images, one.expand_as(images))


def test_a_flip_mirrors_whole_images_as_often_as_it_should():
    images = images_of(2000, 1, 3, 5)
    changed = RandomFlip(0.3)(images)
    mirrored = (changed == images.flip(-1)).all((1, 2, 3))
    same = (changed == images).all((1, 2, 3))
    assert (mirrored | same).all() and abs(mirrored.float().mean() - 0.3) < 0.05
    assert torch.equal(RandomFlip(0)(images), images) and torch.equal(RandomFlip(1)(images), images.flip(-1))


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_a_crop_is_a_part_of_the_padded_image_at_every_place(mode):
    images = images_of(400, 2, 6, 7)
    changed = RandomCrop(2, mode)(images)
    padded = v2.functional.pad(images, [2], padding_mode=mode)
    found = {
        (top, left): (padded[:, :, top : top + 6, left : left + 7] == changed).all((1, 2, 3))
        for top, left in itertools.product(range(5), repeat=2)
    }
    assert torch.stack(list(found.values())).any(0).all() and all(place.any() for place in found.values())


def test_a_resized_crop_is_torchvisions_of_the_same_part():
    torch.manual_seed(0)
    images = images_of(60)
    changed = RandomResizedCrop([1.0, 1.0], [1.0, 1.0])(images)
    assert torch.equal(changed, images)
    # A ramp from left to right shows which part of it was cut out.
    ramp = torch.linspace(0, 255, 101)[None, None, None].expand(500, 1, 11, 101).round().to(torch.uint8)
    changed = RandomResizedCrop([0.25, 0.25], [1.0, 1.0])(ramp)[:, 0, 5].float()
    spans = changed[:, -1] - changed[:, 0]
    assert (spans - 127).abs().max() < 3
    assert changed[:, 0].min() < 10 and changed[:, -1].max() > 245


def test_colours_change_as_torchvisions_do():
    images = images_of(3)
    torch.manual_seed(1)
    changed = RandomColour(0.4, 0.3, 0.2)(images)
    torch.manual_seed(1)
    factors = torch.stack([1 + amount * (2 * torch.rand(3) - 1) for amount in (0.4, 0.3, 0.2)], dim=1)
    for image, (brightness, contrast, saturation), found in zip(images, factors, changed, strict=True):
        expected = v2.functional.adjust_brightness(image / 255, brightness.item())
        expected = v2.functional.adjust_contrast(expected, contrast.item())
        expected = v2.functional.adjust_saturation(expected, saturation.item())
        assert (found - 255 * expected).abs().max() < 1


def test_a_transform_of_torchvision_draws_for_each_image_by_itself():
    images = images_of(1).repeat(50, 1, 1, 1)
    flipped = EachImage(v2.RandomHorizontalFlip())(images)
    assert len(flipped.unique(dim=0)) == 2


def test_what_is_drawn_depends_on_the_seeds_alone():
    images = images_of(6).unflatten(0, (2, 3))
    transform = Chain(crop=RandomCrop(3), flip=RandomFlip(), colour=RandomColour(0.4, 0.4, 0.4))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    both = seeded(transform, [(0, 1, 2), (0, 1, 3)])(images)
    assert torch.equal(torch.rand(3), expected)  # the random state is left as it was
    for number, seed in enumerate([(0, 1, 2), (0, 1, 3)]):
        (alone,) = seeded(transform, [seed])(images[number][None])
        assert torch.equal(alone, both[number])
    assert not torch.equal(seeded(transform, [(0, 1, 4)])(images[:1]), both[:1])


def data_of(cache_dir, *overrides):
    config = compose(*SMALL, "transform=crop_flip", "run_dir=x", f"cache_dir={cache_dir}", *overrides)
    data = make_data(config)
    data.setup()
    return data


def test_training_images_are_changed_by_the_number_of_their_episode_and_no_others(cache_dir):
    data, plain = data_of(cache_dir), data_of(cache_dir, "transform=none")
    batches, expected = (list(module.train_dataloader()) for module in (data, plain))
    for batch, other in zip(batches, expected, strict=True):
        changed, before = batch.load(), other.load()
        assert changed.support.shape == before.support.shape and changed.query.shape == before.query.shape
        assert not torch.equal(changed.support, before.support) and not torch.equal(changed.query, before.query)
        assert torch.equal(changed.query_labels, before.query_labels)
        assert torch.equal(batch.load().query, changed.query)
    # In steps of another size, as several processes take them.
    single = [batch.load() for batch in data_of(cache_dir, "train.meta_batch=1").train_dataloader()]
    flat = [episode for batch in batches for episode in batch.load().tasks()]
    for one, other in zip(single, flat, strict=True):
        assert torch.equal(one.support[0], other.support) and torch.equal(one.query[0], other.query)
    other = next(iter(data_of(cache_dir, "seed=1").train_dataloader())).load()
    assert not torch.equal(other.query, batches[0].load().query)
    for loader in ("val_dataloader", "test_dataloader"):
        changed, before = (next(iter(getattr(module, loader)())).load() for module in (data, plain))
        assert torch.equal(changed.support, before.support) and torch.equal(changed.query, before.query)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["transform=flip", "transform.p=2"], "transform.p=2 must be a number of at least 0 and at most 1"),
        (["transform=crop", "transform.padding=-1"], "transform.padding=-1 must be a whole number of at least 0"),
        (["transform=crop", "transform.mode=white"], "transform.mode=white must be constant, edge or reflect"),
        (["transform=crop_flip", "transform.crop.padding=2.5"], "transform.crop.padding=2.5 must be a whole number"),
        (["transform=resized_crop_flip", "transform.crop.scale=[0,2]"], "scale=[0, 2] of the transform must be two"),
        (["transform=resized_crop_flip", "transform.crop.ratio=[1]"], "ratio=[1] of the transform must be two"),
        (
            ["transform=crop_flip_colour", "transform.colour.contrast=3"],
            "transform.colour.contrast=3 must be a number",
        ),
        (["transform=flip", "+transform.size=3"], "transform.size is not a setting of RandomFlip"),
    ],
)
def test_what_does_not_fit_is_named(overrides, line):
    with pytest.raises(FewShotError) as error:
        check(compose("run_dir=x", *overrides))
    assert line in str(error.value)


def test_what_only_the_images_show_not_to_fit_is_named_too():
    with pytest.raises(FewShotError, match="padding=30 of the transform must be less than the size of the images"):
        RandomCrop(30, "reflect")(images_of())
    with pytest.raises(FewShotError, match=r"transform: Resize made torch\.uint8 .* must keep type and shape"):
        seeded(v2.Resize([5, 5]), [(0,)])(images_of()[None])


@pytest.mark.slow
def test_your_own_transform_is_a_function_and_a_file(cli, tmp_path):
    (tmp_path / "mine.py").write_text("def negative(images, most):\n    return most - images\n")
    (tmp_path / "conf" / "transform").mkdir(parents=True)
    (tmp_path / "conf" / "transform" / "negative.yaml").write_text(
        "_target_: mine.negative\n_partial_: true\nmost: 255  # the brightest pixel\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    asked = ["--config-dir", tmp_path / "conf", "transform=negative", *SMALL, "val.episodes=2", "test.episodes=2"]
    for resume in ("null", "auto"):
        done = cli(*asked, f"hydra.run.dir={tmp_path / 'run'}", f"resume={resume}", env=environment)
        assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["transform"] == "negative" and settings(results)["transform.most"] == 255
    done = cli("checkpoint=run", "trust=mine", "out=tested", script="evaluate.py", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
