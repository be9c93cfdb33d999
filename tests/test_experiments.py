import sys
from functools import cache

import pytest
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from fewshot import cli as command_line
from fewshot.config import CONF, check, compose, current_names
from fewshot.errors import FewShotError
from fewshot.training import train

TABLES = {"omniglot": (5, 20), "miniimagenet": (5,)}
CELLS = [
    f"{dataset}/{path.stem}_{way}way_{shot}shot"
    for dataset, ways in TABLES.items()
    for path in sorted((CONF / "experiment" / dataset).glob("*.yaml"))
    if path.stem != "classifier"  # in no table
    for way in ways
    for shot in (1, 5)
]


@cache
def compose_cell(cell: str, *overrides: str) -> DictConfig:
    """Compose by the name that the cell had in earlier versions."""
    return compose(f"experiment={cell}", "run_dir=x", *overrides)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_matches_its_name_at_both_budgets(cell):
    experiment, way, shot = cell.rsplit("_", 2)
    dataset, method = experiment.split("/")
    for budget in ("paper", "cpu"):
        config = compose_cell(cell, f"budget={budget}")
        check(config)
        assert (config.choices.experiment, config.choices.budget) == (experiment, budget)
        assert config.choices.dataset == dataset
        assert method.startswith(config.choices.method)
        if config.choices.method == "maml":
            assert config.method.order == int(method[5])
            assert config.train.way == config.way == config.method.way
        elif config.choices.method != "protonet":
            assert method == f"{config.choices.method}_{config.choices.distance}"
        else:
            assert config.choices.distance == "l2"
        assert (f"{config.way}way", f"{config.shot}shot", config.query) == (way, shot, 15)
        assert config.test.episodes >= 1000
        assert config.optimizer.lr > 0
        assert config.val.every <= config.train.episodes / 2
    assert compose_cell(cell, "budget=cpu").train.episodes <= compose_cell(cell).train.episodes


# As in the papers and the article's code.
PUBLISHED = {
    "omniglot/protonet_5way_5shot": (
        "train.way=60 train.shot=1 train.query=5 train.episodes=4000 optimizer.lr=0.001 "
        "schedule.step_size=2000 schedule.gamma=0.5"
    ),
    "omniglot/protonet_20way_5shot": "train.way=60 train.shot=5 train.query=5 train.episodes=4000",
    "omniglot/matching_l2_20way_1shot": "train.way=5 train.query=15 train.episodes=10000 optimizer.lr=0.001",
    "omniglot/matching_scaled_cosine_5way_1shot": "distance.learn=True distance.scale=10.0",
    "omniglot/maml_1st_5way_5shot": (
        "train.meta_batch=32 train.query=1 train.episodes=1280000 method.inner_steps=1 method.test_inner_steps=3 "
        "method.inner_learning_rate=0.4 optimizer.lr=0.001 schedule.gamma=1.0"
    ),
    "omniglot/maml_2nd_5way_5shot": "train.meta_batch=16 train.episodes=640000",
    "omniglot/maml_2nd_20way_1shot": (
        "train.meta_batch=16 method.inner_steps=5 method.inner_learning_rate=0.1 method.test_inner_steps=5"
    ),
    "omniglot/maml_1st_20way_5shot": "train.meta_batch=16",
    "omniglot/maml_2nd_20way_5shot": "train.meta_batch=4 train.episodes=160000",
    "miniimagenet/protonet_5way_5shot": (
        "train.way=20 train.shot=5 train.query=15 train.episodes=8000 schedule.step_size=4000 distance.scale=1.0 "
        "hardware.precision=32-true"
    ),
    "miniimagenet/matching_l2_5way_1shot": (
        "train.way=5 train.query=15 train.episodes=20000 schedule.gamma=1.0 distance.scale=1.0"
    ),
    "miniimagenet/matching_fce_cosine_5way_5shot": "train.shot=5 train.episodes=20000 method.unrolling_steps=2",
    "miniimagenet/maml_1st_5way_5shot": (
        "train.meta_batch=4 train.query=5 method.inner_steps=5 method.test_inner_steps=10 "
        "method.inner_learning_rate=0.05"
    ),
    "miniimagenet/maml_2nd_5way_5shot": "train.meta_batch=2",
}


@pytest.mark.parametrize("cell", PUBLISHED)
def test_default_settings_are_the_published_ones(cell):
    for setting in PUBLISHED[cell].split():
        key, _, value = setting.partition("=")
        assert str(OmegaConf.select(compose_cell(cell), key)) == value, setting


def test_the_report_lists_every_cell_with_its_reference_accuracies():
    listed = []
    for dataset, table in compose(name="report").tables.items():
        for method, row in table.methods.items():
            listed += [f"{dataset}/{method}_{cell}" for cell in table.cells]
            for source in {"published", "others", "article"}.intersection(row):
                accuracies = row[source].accuracy
                assert len(accuracies) == len(table.cells)
                assert all(accuracy is None or 20 < accuracy < 100 for accuracy in accuracies)
    rows = ("classifier", "protonet_pretrained", "matching_pretrained", "maml_pretrained")
    ours = [f"miniimagenet/{row}_5way_{shot}shot" for row in rows for shot in (1, 5)]
    assert sorted(listed) == sorted(CELLS + ours)


def test_the_command_line_overrides_an_experiment():
    config = compose_cell("omniglot/maml_2nd_5way_1shot", "budget=cpu", "train.episodes=7", "dataset=glyphs")
    assert (config.train.episodes, config.choices.dataset) == (7, "glyphs")


def test_what_depends_on_the_task_follows_it_unless_the_command_line_sets_it():
    def settings(*overrides: str) -> tuple[int, ...]:
        config = compose("experiment=omniglot/maml_2nd", "run_dir=x", *overrides)
        return config.train.way, config.train.meta_batch, config.method.inner_steps, config.val.every

    assert settings() == (5, 32, 1, 25600)
    assert settings("way=20", "shot=5") == (20, 4, 5, 3200)
    assert settings("way=20", "shot=5", "budget=cpu") == (20, 4, 1, 1600)
    assert settings("way=20", "budget=cpu", "train.way=5", "train.meta_batch=3") == (5, 3, 1, 4000)


def test_a_task_that_an_experiment_has_no_settings_for_is_refused():
    refused = r"(\S+) has a value for 5way, 20way, .*not for way=10 shot=1 budget=paper method=maml; set \1=VALUE"
    with pytest.raises(InterpolationResolutionError, match=refused):
        compose("experiment=omniglot/maml_1st", "way=10", "run_dir=x")
    assert compose("experiment=omniglot/protonet", "way=10", "run_dir=x").train.way == 60


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["seed=1", "experiment=omniglot/a_20way_5shot"], None),
        (["+experiment/omniglot=protonet_20way_5shot"], ["way=20", "shot=5", "+experiment/omniglot=protonet"]),
        (["experiment=omniglot/protonet_20way_5shot", "shot=1"], ["way=20", "experiment=omniglot/protonet", "shot=1"]),
        (
            ["-m", "experiment=omniglot/protonet_5way_1shot,omniglot/protonet_20way_1shot"],
            ["-m", "way=5,20", "shot=1", "experiment=omniglot/protonet"],
        ),
        (["name=omniglot/protonet_20way_5shot"], None),
    ],
)
def test_names_with_a_task_are_replaced(typed, meant):
    assert current_names(typed) == (meant or typed)


def test_a_sweep_over_some_of_the_cells_has_no_other_name(monkeypatch):
    typed = "experiment=omniglot/protonet_5way_1shot,omniglot/protonet_20way_5shot"
    assert current_names([typed]) == [typed]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", typed])
    (found,) = command_line._wrong_overrides()
    assert found.endswith("(did you mean omniglot/protonet?)")


def test_an_experiment_of_the_users_own_keeps_its_name(tmp_path):
    own = tmp_path / "experiment/omniglot/protonet_20way_5shot.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\nseed: 9\n")
    typed = ["--config-dir", str(tmp_path), "experiment=omniglot/protonet_20way_5shot"]
    assert current_names(typed) == typed
    config = compose("experiment=omniglot/protonet_20way_5shot", "run_dir=x", places=[str(tmp_path)])
    assert (config.seed, config.way) == (9, 5)


@pytest.mark.parametrize("name", ["classifier", "pretrained/protonet", "pretrained/matching", "pretrained/maml"])
def test_a_classifier_and_what_starts_from_it_have_signed_features_and_take_other_encoders(name):
    assert compose(f"experiment=miniimagenet/{name}").method.encoder.signed is True
    check(compose(f"experiment=miniimagenet/{name}", "encoder=resnet12", "run_dir=x"))


def test_an_unknown_budget_is_rejected():
    with pytest.raises(MissingConfigException, match=r"(?s)'budget/gpu'.*cpu.*paper"):
        compose_cell("omniglot/protonet_5way_1shot", "budget=gpu")


def test_an_experiment_has_a_name_however_it_is_chosen():
    assert compose("+experiment/omniglot=protonet", "run_dir=x").choices.experiment == "omniglot/protonet"
    assert compose("+experiment/matching_distance=l2", "run_dir=x").choices.experiment == "matching_distance/l2"
    plain = compose("run_dir=x").choices
    assert plain.experiment is None and plain.budget is None


@pytest.mark.parametrize("name", ["protonet", "matching", "maml"])
def test_training_from_a_classifier_needs_its_run(name, tmp_path, real_data, cache_dir):
    config = compose(
        f"experiment=miniimagenet/pretrained/{name}", f"data_dir={real_data}", f"run_dir={tmp_path / 'run'}"
    )
    check(config)
    assert (config.choices.method, config.train.way) == (name, 5 if name == "maml" else 20)
    config.cache_dir = str(cache_dir)
    with pytest.raises(FewShotError, match=r"there is no checkpoint .*RUN_DIR; name the directory of a run"):
        train(config)
