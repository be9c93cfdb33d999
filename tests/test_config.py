import hydra
import pytest

from fewshot.config import CONF, check, compose
from fewshot.errors import FewShotError


def test_another_programs_own_configuration_outlives_ours(tmp_path):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("way=3", "run_dir=here").way == 3
        assert hydra.compose("theirs").a == 1


@pytest.mark.parametrize("group", ["dataset", "method", "distance", "encoder", "hardware"])
def test_every_option_of_every_group_passes_its_own_check(group):
    for option in (CONF / group).glob("*.yaml"):
        check(compose("run_dir=x", f"{group}={option.stem}"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("method.halve_every=2.5", "method.halve_every=2.5 must be a whole number or null"),
        ("method.halve_every=0", "method.halve_every=0 must be at least 1"),
        ("method.learning_rate=fast", "method.learning_rate=fast must be a number"),
        ("method.learning_rate=true", "method.learning_rate=True must be a number"),
        ("encoder.filters=null", "encoder.filters=None must be a whole number"),
        ("+encoder.depth=3", "encoder.depth is not a setting of Conv4"),
        ("+dataset.source.colour=red", "dataset.source.colour is not a setting of glyphs"),
        ("+hardware.speed=9", "hardware.speed is not a setting of Trainer"),
        ("hardware.devices=[0,1.5]", "hardware.devices=[0, 1.5] must be"),
        ("dataset.channels=2", "dataset.channels=2 must be 1 or 3"),
    ],
)
def test_what_does_not_fit_is_named(override, told):
    with pytest.raises(FewShotError) as caught:
        check(compose("run_dir=x", override))
    assert told in str(caught.value)


def test_everything_wrong_is_told_at_once():
    wrong = ["shot=0", "train.shot=1", "val.every=0", "seed=-1", "encoder.filters=0", "distance=scaled_cosine"]
    with pytest.raises(FewShotError) as caught:
        check(compose("run_dir=x", *wrong, "distance.scale=0"))
    for of in ("shot=0 ", "val.every=0 ", "seed=-1 ", "encoder.filters=0 ", "distance.scale=0"):
        assert of in str(caught.value)
