"""One meta-step of MAML: ours and other implementations."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.contest import Contest, Entrant, Work
from benchmarks.references import article_meta_step, clone_and_adapt, copy_weights, textbook_conv4
from fewshot.data.episodes import Episode
from fewshot.encoders.conv4 import Conv4
from fewshot.methods.maml import MAML
from fewshot.methods.tasks import TaskBatching

TASK = {"tasks": 32, "way": 5, "shot": 1, "query": 1, "channels": 1, "size": 28, "steps": 1, "rate": 0.4}

LARGE_TASK = {"tasks": 2, "way": 5, "shot": 5, "query": 15, "channels": 3, "size": 84, "steps": 5, "rate": 0.01}
TASK_KEYS = ("tasks", "way", "shot", "query", "channels", "size")
PATHS = {"threads": "ours, threads", "loop": "ours, loop", "vmap": "ours, vmap"}


def make_tasks(
    tasks: int, way: int, shot: int, query: int, channels: int, size: int, dtype: torch.dtype = torch.float32
) -> Episode:
    """Make a meta-batch of fixed noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(way).expand(tasks, way)

    def images(per_class: int) -> torch.Tensor:
        pixels = torch.randn(tasks, way * per_class, size, size, channels, generator=generator)
        return pixels.to(dtype).movedim(-1, -3)  # channels last, as from the data module

    return Episode(
        images(shot), labels.repeat_interleave(shot, 1), images(query), labels.repeat_interleave(query, 1), way
    )


def ours(
    order: int,
    batching: TaskBatching,
    task: Mapping[str, Any],
    recompute: bool = False,
    vmap_tasks: int = 8,
    device: str = "cpu",
    change: Callable[[nn.Module], None] | None = None,
) -> Work:
    """Our implementation: the meta-gradient of ``method=maml``, its encoder changed by ``change``, and Adam."""
    method = make_maml(order, batching, task, recompute, vmap_tasks).to(device)
    if change is not None:
        change(method.encoder)
    batch = make_tasks(**{key: task[key] for key in TASK_KEYS}).apply(lambda tensor: tensor.to(device))
    optimizer = torch.optim.Adam(method.parameters())

    def work() -> NDArray[Any]:
        gradients = method.meta_gradient(batch).gradients
        for parameter, gradient in zip(method.weights().values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return _flat(gradients)

    return work


def make_maml(
    order: int,
    batching: TaskBatching,
    task: Mapping[str, Any],
    recompute: bool = False,
    vmap_tasks: int = 8,
) -> MAML:
    """Make the method, with the weights of the textbook network."""
    method = MAML(
        Conv4(task["channels"], task["size"]),
        way=task["way"],
        order=order,
        inner_learning_rate=task["rate"],
        inner_steps=task["steps"],
        test_inner_steps=task["steps"],
        clip_norm=None,
        task_batching=batching,
        vmap_tasks=vmap_tasks,
        recompute=recompute,
    )
    copy_weights(_textbook(task), method)
    return method


def theirs(order: int, way: str, task: Mapping[str, Any], dtype: str = "float32", device: str = "cpu") -> Work:
    """Implementations in ``references``, with Adam."""
    kind: torch.dtype = getattr(torch, dtype)
    model = _textbook(task).to(device, kind)
    batch = make_tasks(**{key: task[key] for key in TASK_KEYS}, dtype=kind).apply(lambda tensor: tensor.to(device))
    tasks = [
        episode._replace(support=episode.support.contiguous(), query=episode.query.contiguous())
        for episode in batch.tasks()
    ]
    optimizer = torch.optim.Adam(model.parameters())

    def work() -> NDArray[Any]:
        optimizer.zero_grad()
        if way == "clone":
            clone_and_adapt(model, tasks, order, task["steps"], task["rate"])
        else:
            article_meta_step(model, tasks, task["steps"], task["rate"])
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        return _flat(gradients)

    return work


def contests() -> dict[str, Contest]:
    """Meta-steps of Omniglot 5-way 1-shot, second and first order, and the memory of a large meta-step."""
    small = "32 tasks, 5-way 1-shot 1 query, 1x28x28, 1 inner step, Adam included"
    large = "2 tasks, 5-way 5-shot 15 queries, 3x84x84, 5 inner steps, Adam included"
    second = [
        *(_ours(name, {"order": 2, "batching": batching, "task": TASK}) for batching, name in PATHS.items()),
        Entrant("clone and adapt", theirs, {"order": 2, "way": "clone", "task": TASK}),
        Entrant("the article's, float32", theirs, {"order": 2, "way": "article", "task": TASK}),
        Entrant("the article's, float64", theirs, {"order": 2, "way": "article", "task": TASK, "dtype": "float64"}),
    ]
    first = [
        *(_ours(name, {"order": 1, "batching": batching, "task": TASK}) for batching, name in PATHS.items()),
        Entrant("clone and adapt", theirs, {"order": 1, "way": "clone", "task": TASK}),
    ]
    memory = [
        _ours(PATHS["threads"], {"order": 2, "batching": "threads", "task": LARGE_TASK}),
        _ours("ours, recompute", {"order": 2, "batching": "threads", "task": LARGE_TASK, "recompute": True}),
        _ours(PATHS["loop"], {"order": 2, "batching": "loop", "task": LARGE_TASK}),
        Entrant("clone and adapt", theirs, {"order": 2, "way": "clone", "task": LARGE_TASK}),
    ]
    return {
        "maml_second_order": Contest(f"MAML, a second-order meta-step: {small}", second, counted=1),
        "maml_first_order": Contest(f"MAML, a first-order meta-step: {small}", first, counted=1),
        # In float32, rounding errors grow to 2% through five steps and back; in float64 the results agree to 1e-13.
        "maml_memory": Contest(f"MAML, a second-order meta-step: {large}", memory, tolerance=5e-2),
    }


def device_contests(device: str) -> dict[str, Contest]:
    """Meta-steps of Omniglot 5-way 1-shot on a GPU, where launching many small kernels takes most of the time."""
    title = "MAML, a {}-order meta-step: 32 tasks, 5-way 1-shot 1 query, 1x28x28, 1 inner step, Adam included"
    contests = {}
    for order, name in ((2, "second"), (1, "first")):
        # A GPU rounds convolutions to TF32.
        settings = {"order": order, "task": TASK, "device": device}
        entrants = [
            *(
                _ours(f"ours, vmap of {tasks}", {**settings, "batching": "vmap", "vmap_tasks": tasks})
                for tasks in (8, 32)
            ),
            _ours(PATHS["loop"], {**settings, "batching": "loop"}),
            Entrant("clone and adapt", theirs, {**settings, "way": "clone"}),
        ]
        contests[f"maml_{name}_order"] = Contest(title.format(name), entrants, (1, "meta-steps"), tolerance=0.1)
    return contests


def _ours(name: str, settings: Mapping[str, Any]) -> Entrant:
    return Entrant(name, ours, settings, keep_memory=True)


def _textbook(task: Mapping[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    return textbook_conv4(task["channels"], task["size"], task["way"], track_running_stats=False)


def _flat(gradients: list[torch.Tensor]) -> NDArray[Any]:
    return np.concatenate([gradient.detach().cpu().double().flatten().numpy() for gradient in gradients])
