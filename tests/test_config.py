from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from conftest import nothing_touched
from fewshot.checks import refuse
from fewshot.cli import _explain
from fewshot.config import CONF, brings_weights, check, compose, wrong_settings
from fewshot.errors import FewShotError


def test_composing_does_not_change_the_configuration_of_another_program(tmp_path):
    (tmp_path / "theirs.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("way=3", "run_dir=here").way == 3
        assert hydra.compose("theirs").a == 1


@pytest.mark.parametrize("group", ["dataset", "method", "distance", "encoder", "optimizer", "schedule", "hardware"])
def test_every_option_of_every_group_passes_its_own_check(group):
    for option in (CONF / group).glob("*.yaml"):
        named = ["dataset.source.name=MNIST"] if option.stem == "torchvision" else []
        check(compose("run_dir=x", f"{group}={option.stem}", *named))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encoder.filters=null", "encoder.filters=None must be a whole number"),
        ("+encoder.depth=3", "encoder.depth is not a setting of Conv4"),
        ("+encoder.filtres=3", "encoder.filtres is not a setting of Conv4 (did you mean filters?)"),
        ("seed=4294967296", "seed=4294967296 must be a whole number of at least 0 and below 4,294,967,296"),
        ("+dataset.source.colour=red", "dataset.source.colour is not a setting of glyphs"),
        ("+hardware.speed=9", "hardware.speed is not a setting of Trainer"),
        ("hardware.devices=[0,1.5]", "hardware.devices=[0, 1.5] must be"),
        ("dataset=torchvision", "dataset.source.name must be set: dataset.source.name=VALUE"),
        ("dataset.channels=2", "dataset.channels=2 must be 1 or 3"),
        ("~hardware.compile", "the configuration has no hardware.compile; leave out the override"),
    ],
)
def test_wrong_types_are_named(override, message):
    with pytest.raises(FewShotError) as caught:
        check(compose("run_dir=x", override))
    assert message in str(caught.value)


def test_keys_of_the_users_own_may_be_added_for_interpolations():
    check(compose("run_dir=x", "+width=32", "+val.often=2", "encoder.filters=${width}", "val.every=${val.often}"))


class Untyped:
    """A user's class without type hints."""

    def __init__(self, size, colour="red"):
        self.size, self.colour = size, colour


class Open:
    """A user's class that passes keyword arguments on, as timm's models do."""

    def __init__(self, sizes: Sequence[int], file: Path | None = None, pair: tuple[int, int] = (1, 2), **others):
        self.sizes, self.file, self.pair, self.others = sizes, file, pair, others


@pytest.mark.parametrize(
    ("target", "settings", "message"),
    [
        (Untyped, {"size": "any", "colour": 3}, None),
        (Untyped, {"size": 3, "color": "red"}, "node.color is not a setting of Untyped (did you mean colour?)"),
        (Open, {"sizes": [1, 2], "file": "a/b", "pair": [3, 4], "more": "red"}, None),
        (Open, {"sizes": [1, "b"]}, "node.sizes=[1, 'b'] must be"),
        (Open, {"sizes": [1], "pair": [3, 4, 5]}, "node.pair=[3, 4, 5] must be"),
        (dict, {"any": 3}, None),  # written in C, without a signature
    ],
)
def test_a_constructors_type_hints_decide(target, settings, message):
    name = f"{target.__module__}.{target.__name__}"
    node = OmegaConf.create({"_target_": name, **settings})
    if message is None:
        refuse(wrong_settings({"node": node}))
        return
    with pytest.raises(FewShotError) as caught:
        refuse(wrong_settings({"node": node}))
    assert message in str(caught.value)


def test_the_keys_of_a_figure_are_checked_against_its_function():
    for option in (CONF / "figure").glob("*.yaml"):
        refuse(wrong_settings({"figure": compose(f"figure={option.stem}", name="figure").figure}))
    for typed in (("figure=time_profile", "figure.rounds=0"), ("figure=prototypes", "figure.shot=0")):
        with pytest.raises(FewShotError, match=rf"^{typed[1]} must be a whole number of at least 1$"):
            refuse(wrong_settings({"figure": compose(*typed, name="figure").figure}))
    wrong = compose("figure=intervals", "figure.episodes=many", "+figure.colour=red", name="figure").figure
    with pytest.raises(FewShotError) as caught:
        refuse(wrong_settings({"figure": wrong}))
    assert (
        str(caught.value) == "figure.episodes=many must be a whole number; figure.colour is not a setting of intervals"
    )


def test_all_errors_are_reported_together():
    wrong = ["shot=0", "train.shot=1", "val.every=0", "seed=-1", "encoder.filters=0", "distance=scaled_cosine"]
    with pytest.raises(FewShotError) as caught:
        check(compose("run_dir=x", *wrong, "distance.scale=0"))
    for part in ("shot=0 ", "val.every=0 ", "seed=-1 ", "encoder.filters=0 ", "distance.scale=0"):
        assert part in str(caught.value)


@cache
def keys() -> list[str]:
    def below(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            yield prefix + key
            yield from below(value, f"{prefix}{key}.")

    return [*below(OmegaConf.to_container(compose("run_dir=x")), ""), "experiment", "hydra.run.dir", "hydra.sweep.dir"]


GOOD = [
    *("dataset=omniglot", "dataset=miniimagenet", "method=maml", "method=matching_fce", "distance=scaled_cosine"),
    *("hardware=gpu", "way=20", "train.way=${shot}", "+experiment=matching_omniglot", "~train.meta_batch", "seed=1"),
]
WORDS = st.sampled_from(
    [
        *("omniglot", "glyphs", "maml", "cosine", "cpu", "null", "true", "0", "1", "-1", "5", "1e9", "1e999", "nan"),
        *("[1,2]", "{a:1}", "{way:3}", "???", "@", ".", "..", "../../etc/passwd", "~", "+", "++", "'", '"', "\\"),
        *("${way}", "${oc.env:HOME}", "${oc.env:NONE}", "${now:%Y}", "${hydra:runtime.cwd}", "${fewshot_root:..}"),
        *("${method}", "${oc.decode:x}", "${x:y}", "${", ",", ":", ";", "=", "[", "{", "("),
        *("glob(*)", "choice(1,2)", "range(1,9)", "sort(3,1)", "int(2)", "str(5)", "cast(a)", "interval(0,1)"),
    ]
)
NUMBERS = st.integers().map(str) | st.floats().map(str)
VALUES = WORDS | NUMBERS | st.text(max_size=8) | st.lists(WORDS, max_size=4).map("".join)


@st.composite
def overrides(draw: st.DrawFn) -> str:
    """Overrides of a command line, mostly with existing keys."""
    kind = draw(st.sampled_from(["good", "plausible", "plausible", "wild"]))
    if kind == "good":
        return draw(st.sampled_from(GOOD))
    key = draw(st.sampled_from(keys()))
    if kind == "plausible":
        return f"{key}={draw(WORDS | NUMBERS)}"
    key = draw(st.sampled_from([key, key[:-1]]) | VALUES)
    return draw(st.sampled_from(["", "+", "++", "~"])) + key + draw(st.sampled_from(["=", "", "@"])) + draw(VALUES)


@given(st.lists(overrides(), max_size=3))
@example(["dataset=5"])  # what fuzzing found; Hydra has no error of its own for the first three
@example(["~dataset=5"])
@example(["+=omniglot"])
@example(["val=???"])
@example(["seed=${oc.env:HOME}"])
@pytest.mark.slow
def test_any_command_line_gives_a_configuration_or_an_error_of_one_line(given_overrides):
    try:
        with nothing_touched():
            config = compose("run_dir=x", *given_overrides)
            check(config)
    except Exception as error:
        message = _explain(error)
        assert message is not None and len(message.splitlines()) == 1, error  # noqa: PT017
    else:
        assert isinstance(config, DictConfig) and config.way >= 2


@pytest.mark.parametrize(
    ("choices", "brings"),
    [
        (["encoder=conv4"], None),
        (["encoder=pretrained"], True),
        (["encoder=pretrained", "encoder.weights=null"], False),
        (["encoder=pretrained", "encoder.weights=null", "encoder.file=x.pth"], True),
        (["encoder=timm"], True),
        (["encoder=timm", "encoder.pretrained=false"], False),
        (["encoder=pretrained", "method=maml"], True),
    ],
)
def test_an_encoder_that_brings_weights_from_elsewhere_is_known(choices, brings):
    assert brings_weights(compose(*choices, "run_dir=x").method) is brings
