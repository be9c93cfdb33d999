"""Running the tasks of a meta-batch: one after another, on CPU threads, or several at once with vmap."""

import copy
import math
import threading
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch
from torch import nn

from fewshot.data.episodes import Episode
from fewshot.encoders.adaptable import draws_random, keeps_statistics
from fewshot.hardware import map_in_threads

TaskBatching = Literal["auto", "loop", "threads", "vmap"]

Learner = TypeVar("Learner", bound=nn.Module)
Result = TypeVar("Result")


def for_each_task(
    learner: Learner,
    work: Callable[[Learner, Episode], Result],
    meta_batch: Episode,
    task_batching: TaskBatching,
    vmap_tasks: int,
    thread_tasks: int = 1,
) -> Iterator[Result]:
    """Apply ``work`` to every task of a meta-batch, with gradients enabled.

    Args:
        learner: the module that ``work`` calls.
        work: gets the module (on a thread, a copy that shares its tensors) and an episode; for several tasks at once, a
            meta-batch.
        meta_batch: the tasks.
        task_batching: "loop", "threads", "vmap", or "auto": threads on the CPU and vmap elsewhere. A learner that draws
            random numbers, see ``draws_random``, or changes running statistics always gets "loop".
        vmap_tasks: number of tasks vmap solves at once.
        thread_tasks: the most tasks a thread solves at once; fewer where that leaves no thread idle.

    Returns:
        The results, in the order of the tasks.
    """
    device = meta_batch.query.device.type
    # Threads would draw from the one generator in any order, and vmap refuses layers that draw in place. And a run that
    # resumes with another choice must draw the same numbers. Running statistics are changed in place as well.
    if draws_random(learner) or keeps_statistics(learner):
        task_batching = "loop"
    if task_batching == "auto":
        task_batching = "threads" if device == "cpu" else "vmap"
    if task_batching != "threads":
        tasks = meta_batch.split(vmap_tasks) if task_batching == "vmap" else meta_batch.tasks()
        with torch.enable_grad():
            yield from (work(learner, episode) for episode in tasks)
        return

    # New threads do not inherit autocast.
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    copies: dict[int, Learner] = {}

    def on_thread(episode: Episode) -> Result:
        thread = threading.get_ident()
        if thread not in copies:
            copies[thread] = _share_tensors(learner)
        with torch.enable_grad(), torch.autocast(device, enabled=enabled, dtype=dtype):
            return work(copies[thread], episode)

    rounds = math.ceil(len(meta_batch.query) / (torch.get_num_threads() * thread_tasks))
    share = math.ceil(len(meta_batch.query) / (torch.get_num_threads() * rounds))
    yield from map_in_threads(on_thread, meta_batch.split(share) if share > 1 else meta_batch.tasks())


def _share_tensors(learner: Learner) -> Learner:
    """Copy a module but share its tensors: ``functional_call`` swaps weights inside the modules it calls."""
    shared = {id(tensor): tensor for tensor in (*learner.parameters(), *learner.buffers())}
    duplicate = copy.copy(learner)
    duplicate._modules = {
        name: copy.deepcopy(child, shared) if next(child.parameters(), None) is not None else child
        for name, child in learner.named_children()
    }
    return duplicate
