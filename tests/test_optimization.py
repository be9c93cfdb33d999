import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fewshot.config import check, compose, training_steps
from fewshot.distances import l2
from fewshot.errors import FewShotError
from fewshot.methods.protonet import PrototypicalNetwork
from fewshot.optimization import DEFAULT, configure
from fewshot.training import make_method

ONE_OF_EACH = [
    *(["method=protonet", f"schedule={schedule}"] for schedule in ("none", "halving", "cosine")),
    *(["method=maml", f"optimizer={optimizer}"] for optimizer in ("adam", "adamw", "sgd")),
]


def rates(method, count):
    """The learning rate of each of the first ``count`` training steps."""
    optimizers = method.configure_optimizers()
    optimizer, found = optimizers["optimizer"], []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if "lr_scheduler" in optimizers:
            optimizers["lr_scheduler"]["scheduler"].step()
    return found


def made(*overrides):
    return make_method(compose("run_dir=x", "encoder.filters=4", *overrides))


def test_halving_counts_training_steps_whatever_the_meta_batch():
    for meta_batch in (1, 4):
        method = made("schedule=halving", "schedule.step_size=2", f"train.meta_batch={meta_batch}")
        assert rates(method, 5) == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4]
        assert method.configure_optimizers()["lr_scheduler"]["interval"] == "step"


def test_a_cosine_ends_with_the_last_training_step():
    method = made("schedule=cosine", "train.episodes=11", "train.meta_batch=2", "optimizer=sgd", "optimizer.lr=1")
    found = rates(method, 7)  # the sixth step is the last
    assert found[0] == 1 and found[3] == pytest.approx(0.5) and found[6] == pytest.approx(0)


def test_without_a_schedule_the_learning_rate_is_constant():
    assert rates(made("method=maml", "train.episodes=9"), 3) == [1e-3] * 3


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_every_method_works_with_every_optimizer(optimizer, kind):
    for method in ("protonet", "matching", "matching_fce", "maml"):
        found = made(f"method={method}", f"optimizer={optimizer}", "optimizer.lr=0.3").configure_optimizers()
        assert type(found["optimizer"]) is kind and found["optimizer"].param_groups[0]["lr"] == 0.3


def test_a_method_in_a_user_program_needs_no_configuration():
    method = PrototypicalNetwork(nn.Linear(2, 2), l2)
    assert rates(method, 2) == [1e-3] * 2
    method.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=2.0)
    assert rates(method, 1) == [2.0]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optimizer.lr=0"], "optimizer.lr=0 must be a number above 0 and at most 1,000,000"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 must be a number above 0 and at most 1,000,000"),
        (["optimizer.lr={}"], "optimizer.lr={} must be a number"),
        (["optimizer.lr={a:1}"], "optimizer.lr={'a': 1} must be a number"),
        (["optimizer.lr=[]"], "optimizer.lr=[] must be a number"),
        (["optimizer.lr=nan"], "optimizer.lr=nan must be a number"),
        (["optimizer.lr=1e38"], "optimizer.lr=1e+38 must be a number above 0 and at most 1,000,000"),
        (["optimizer=sgd", "optimizer.lr=1e400"], "optimizer.lr=inf must be a number"),
        (["optimizer.weight_decay=nan"], "optimizer.weight_decay=nan must be a number"),
        (["optimizer.weight_decay=inf"], "optimizer.weight_decay=inf must be a number"),
        (["optimizer.betas=[0.9,nan]"], "optimizer.betas=[0.9, nan] must be"),
        (["method=maml", "method.inner_learning_rate=nan"], "method.inner_learning_rate=nan must be a number"),
        (["distance=scaled_cosine", "distance.scale=inf"], "distance.scale=inf must be a number"),
        (["+hardware.gradient_clip_val=nan"], "hardware.gradient_clip_val=nan must be"),
        (["schedule.gamma=nan"], "schedule.gamma=nan must be a number"),
        (["schedule.gamma=0"], "schedule.gamma=0 must be a number above 0"),
        (["schedule.gamma=-0.5"], "schedule.gamma=-0.5 must be a number above 0"),
        (["schedule=cosine", "schedule.eta_min=-0.1"], "schedule.eta_min=-0.1 must be a number of at least 0"),
        (["schedule=cosine", "schedule.eta_min=nan"], "schedule.eta_min=nan must be a number"),
        (["seed=4294967296"], "seed=4294967296 must be a whole number of at least 0 and below 4,294,967,296"),
        (["optimizer.lr=fast"], "optimizer.lr=fast must be a number"),
        (["optimizer.lr=true"], "optimizer.lr=True must be a number"),
        (["optimizer.weight_decay=-1"], "optimizer=adam: Invalid weight_decay value: -1"),
        (["optimizer=sgd", "optimizer.momentum=-1"], "optimizer=sgd: Invalid momentum value: -1"),
        (["+optimizer.speed=1"], "optimizer.speed is not a setting of Adam"),
        (["schedule.step_size=2.5"], "schedule.step_size=2.5 must be a whole number of at least 1"),
        (["schedule.step_size=0"], "schedule.step_size=0 must be a whole number of at least 1"),
        (["schedule=cosine", "schedule.T_max=0"], "schedule.T_max=0 must be a whole number of at least 1"),
        (
            ["schedule._target_=torch.optim.lr_scheduler.OneCycleLR"],
            "schedule.step_size is not a setting of OneCycleLR",
        ),
        (["train.on_nan=pray"], "train.on_nan=pray must be stop or skip"),
    ],
)
def test_wrong_settings_are_named(overrides, line):
    with pytest.raises(FewShotError) as error:
        check(compose("run_dir=x", *overrides))
    assert line in str(error.value)


@pytest.mark.parametrize("overrides", ONE_OF_EACH)
def test_every_option_passes_its_own_check(overrides):
    check(compose("run_dir=x", *overrides))


def test_nothing_to_train_is_rejected():
    with pytest.raises(FewShotError, match=r"nothing to train: .* encoder\.frozen=false"):
        PrototypicalNetwork(nn.Flatten(), l2).configure_optimizers()


def test_a_schedule_that_follows_a_metric_is_rejected():
    with pytest.raises(FewShotError, match="ReduceLROnPlateau follows a metric"):
        configure([nn.Parameter(torch.zeros(1))], DEFAULT, ReduceLROnPlateau)


def test_the_last_step_may_have_fewer_episodes():
    assert [training_steps(10, 1), training_steps(10, 3), training_steps(9, 3), training_steps(1, 32)] == [10, 4, 3, 1]
