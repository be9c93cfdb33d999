"""The optimizer and the schedule of its learning rate."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fewshot.errors import FewShotError

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], LRScheduler]

DEFAULT: MakeOptimizer = partial(torch.optim.Adam, lr=0.001)  # for methods made without a configuration


def configure(
    parameters: Iterable[nn.Parameter], make_optimizer: MakeOptimizer, make_schedule: MakeSchedule | None
) -> dict[str, Any]:
    """Return the value of ``LightningModule.configure_optimizers``; the schedule counts training steps.

    Args:
        parameters: the parameters to train; those that need no gradient stay unchanged.
        make_optimizer: makes the optimizer from the parameters.
        make_schedule: makes the schedule from the optimizer; None: the learning rate is constant.

    Raises:
        FewShotError: no parameter needs a gradient, or the schedule depends on more than the step number.
    """
    parameters = list(parameters)
    if not any(parameter.requires_grad for parameter in parameters):
        raise FewShotError(
            "there is nothing to train: the encoder is frozen, and what follows it has no weights; set "
            "encoder.frozen=false, or skip the training: predict and evaluate need none"
        )
    optimizer = make_optimizer(parameters)
    if make_schedule is None:
        return {"optimizer": optimizer}
    schedule = make_schedule(optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        raise FewShotError(
            "schedule._target_: ReduceLROnPlateau follows a metric, and a schedule here counts training steps; choose "
            "schedule=halving or schedule=cosine"
        )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
