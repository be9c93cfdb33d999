"""What the speed of a training step comes from: our steps beside the same ones without each technique."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks import maml, training
from benchmarks.contest import Contest, Entrant, Work
from fewshot.encoders.adaptable import AdaptableConv2d, BatchStatisticsNorm2d
from fewshot.encoders.block import Block

CHANNELS_LAST, POOL_FIRST, DERIVATIVES = "channels-last memory", "pooling before ReLU", "second derivatives of our own"
KEPT_MEMORY, THREADS, NORM_LAST = "kept memory", "threads over tasks", "pooling before batch norm"
TOGETHER = "small tasks side by side"
MINIIMAGENET = {**training.MINIIMAGENET, "query": 5}  # five entrants with more images do not fit into 16 GiB


def remove(technique: str, network: nn.Module) -> None:
    """Make a network compute the same without a technique.

    Args:
        technique: ``CHANNELS_LAST``, ``NORM_LAST``, ``POOL_FIRST`` (without it, ``NORM_LAST`` is gone, too),
            ``DERIVATIVES`` or ``TOGETHER``.
        network: changed in place; its parameters keep their values.
    """
    if technique == TOGETHER:
        network.append(nn.Dropout(0.0))  # type: ignore[operator]  # not one of the layers that are known to allow it
        return
    if technique == CHANNELS_LAST:
        for parameter in network.parameters():
            parameter.data = _channels_first(parameter.data)
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d | AdaptableConv2d)]
        convolutions[0].register_forward_pre_hook(lambda _, inputs: (_channels_first(inputs[0]),))
    for name, child in network.named_children():
        if technique == POOL_FIRST and isinstance(child, nn.MaxPool2d):
            setattr(network, name, nn.ReLU())
        elif technique == POOL_FIRST and isinstance(child, nn.ReLU):
            setattr(network, name, nn.MaxPool2d(2))
        elif technique == DERIVATIVES and isinstance(child, BatchStatisticsNorm2d | AdaptableConv2d):
            child.twice = False
        elif technique == NORM_LAST and isinstance(child, Block):
            setattr(network, name, nn.Sequential(*child))
        elif technique != CHANNELS_LAST:
            remove(technique, child)


def _channels_first(tensor: torch.Tensor) -> torch.Tensor:
    # With one channel both layouts count as contiguous, but the strides still choose the kernel.
    return tensor.clone(memory_format=torch.contiguous_format)


def protonet(shape: Mapping[str, Any], technique: str) -> Work:
    """Training steps of prototypical networks without a technique."""
    return training.bare_loop(dict(shape), change=lambda network: remove(technique, network))


def meta_step(order: int, technique: str, task: Mapping[str, Any]) -> Work:
    """A meta-step of MAML without a technique; without threads, it has no tasks side by side either."""
    if technique == THREADS:
        return maml.ours(order, "loop", task)
    return maml.ours(order, "threads", task, change=lambda network: remove(technique, network))


def contests() -> dict[str, Contest]:
    """A contest for each kind of step: ours, and ours without one technique at a time."""
    found = {}
    for name, shape in (("omniglot", training.OMNIGLOT), ("miniimagenet", MINIIMAGENET)):
        task = f"{shape['way']}-way {shape['shot']}-shot {shape['query']} queries"
        title = f"{shape['steps']} steps of prototypical networks, {task}"
        entrants = [
            Entrant("ours", training.bare_loop, {"shape": shape}, keep_memory=True),
            Entrant(f"without {KEPT_MEMORY}", training.bare_loop, {"shape": shape}),
            *(
                Entrant(f"without {technique}", protonet, {"shape": shape, "technique": technique}, keep_memory=True)
                for technique in (CHANNELS_LAST, NORM_LAST, POOL_FIRST)
            ),
        ]
        found[f"without_protonet_{name}"] = Contest(f"{title}, {name}", entrants, tolerance=5e-3)
    for order, name in ((2, "second"), (1, "first")):
        settings = {"order": order, "task": maml.TASK}
        ours = {**settings, "batching": "threads"}
        techniques = [CHANNELS_LAST, POOL_FIRST, TOGETHER, THREADS, *([DERIVATIVES] if order == 2 else [])]
        entrants = [
            Entrant("ours", maml.ours, ours, keep_memory=True),
            Entrant(f"without {KEPT_MEMORY}", maml.ours, ours),
            *(
                Entrant(f"without {technique}", meta_step, {**settings, "technique": technique}, keep_memory=True)
                for technique in techniques
            ),
        ]
        found[f"without_maml_{name}_order"] = Contest(
            f"A {name}-order meta-step of MAML, 32 tasks, 5-way 1-shot", entrants
        )
    return found
