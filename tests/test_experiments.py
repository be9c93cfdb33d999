import re
from functools import cache

import pytest
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from fewshot.config import CONF, check, compose

CELLS = sorted(
    f"{dataset}/{path.stem}"
    for dataset in ("omniglot", "miniimagenet")
    for path in (CONF / "experiment" / dataset).glob("*way_*.yaml")
)


@cache
def compose_cell(cell: str, *overrides: str) -> DictConfig:
    return compose(f"experiment={cell}", "run_dir=x", *overrides)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_matches_its_name_at_both_budgets(cell):
    dataset, method, way, shot = re.fullmatch(r"(\w+)/(\w+?)_(\d+)way_(\d)shot", cell).groups()
    for budget, config in {"paper": compose_cell(cell), "cpu": compose_cell(cell, "budget=cpu")}.items():
        check(config)
        assert (config.choices.experiment, config.choices.budget) == (cell, budget)
        assert config.choices.dataset == dataset
        assert method.startswith(config.choices.method)
        if config.choices.method == "maml":
            assert config.method.order == int(method[5])
            assert config.train.way == config.way == config.method.way
        elif config.choices.method != "protonet":
            assert method == f"{config.choices.method}_{config.choices.distance}"
        else:
            assert config.choices.distance == "l2"
        assert (config.way, config.shot, config.query) == (int(way), int(shot), 15)
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
        "method.inner_learning_rate=0.01"
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
                assert len(accuracies) == len(table.cells) and all(20 < accuracy < 100 for accuracy in accuracies)
    assert sorted(listed) == CELLS


def test_the_command_line_overrides_an_experiment():
    config = compose_cell("omniglot/maml_2nd_5way_1shot", "budget=cpu", "train.episodes=7", "dataset=glyphs")
    assert (config.train.episodes, config.choices.dataset) == (7, "glyphs")


def test_an_unknown_budget_is_rejected():
    with pytest.raises(MissingConfigException, match=r"(?s)'budget/gpu'.*cpu.*paper"):
        compose_cell("omniglot/protonet_5way_1shot", "budget=gpu")


def test_an_experiment_has_a_name_however_it_is_chosen():
    assert compose("+experiment/omniglot=protonet_5way_1shot", "run_dir=x").choices.experiment == (
        "omniglot/protonet_5way_1shot"
    )
    assert compose("+experiment/matching_distance=l2", "run_dir=x").choices.experiment == "matching_distance/l2"
    plain = compose("run_dir=x").choices
    assert plain.experiment is None and plain.budget is None
