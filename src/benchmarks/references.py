"""Reference implementations, written like other published programs: plain and not tuned."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.func import functional_call
from torch.nn.functional import batch_norm, conv2d, cross_entropy, linear, max_pool2d, one_hot, relu
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from fewshot.data.episodes import Episode, EpisodeDataset, EpisodeNumber


def textbook_conv4(channels: int, size: int, way: int | None = None, **norm: bool) -> nn.Sequential:
    """Conv4 as usually written: channels first, ReLU before pooling; with a linear head if ``way`` is given."""
    blocks: list[nn.Module] = []
    for inputs in (channels, 64, 64, 64):
        blocks.append(
            nn.Sequential(nn.Conv2d(inputs, 64, 3, padding=1), nn.BatchNorm2d(64, **norm), nn.ReLU(), nn.MaxPool2d(2))
        )
    head = [] if way is None else [nn.Linear(64 * (size // 16) ** 2, way)]
    return nn.Sequential(*blocks, nn.Flatten(), *head)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of ``source`` to ``target``, whose parameters have the same shapes and order."""
    for parameter, value in zip(target.parameters(), source.parameters(), strict=True):
        parameter.data.copy_(value.data)


class PngEpisodes(Dataset[Episode]):
    """The same episodes as ``episodes``, but each image is opened from its own file and converted to a tensor.

    Args:
        episodes: provides the positions.
        folder: contains the image of each position: ``0.png``, ``1.png``, ...
    """

    def __init__(self, episodes: EpisodeDataset, folder: Path) -> None:
        self.episodes, self.folder = episodes, folder

    def __getitem__(self, number: EpisodeNumber) -> Episode:
        episode = self.episodes[number]
        support, query = (
            torch.stack([self._open(position) for position in positions])
            for positions in (episode.support, episode.query)
        )
        return Episode(support, episode.support_labels, query, episode.query_labels, episode.way)

    def _open(self, position: torch.Tensor) -> torch.Tensor:
        image = pil_to_tensor(Image.open(self.folder / f"{int(position)}.png")).float()
        return (image - image.min()) / (image.max() - image.min()).clamp_min(1)


def textbook_protonet(model: nn.Module) -> Callable[[Episode], torch.Tensor]:
    """Prototypical networks with a loop over classes for the prototypes, and distances by broadcasting."""

    def solve(episode: Episode) -> torch.Tensor:
        embeddings = model(torch.cat([episode.support, episode.query]))
        support, query = embeddings[: len(episode.support)], embeddings[len(episode.support) :]
        prototypes = torch.stack([support[episode.support_labels == label].mean(0) for label in range(episode.way)])
        return -(query[:, None] - prototypes[None]).pow(2).sum(2)

    return solve


def textbook_matching(model: nn.Module) -> Callable[[Episode], torch.Tensor]:
    """Matching networks with distances by broadcasting, and labels as one-hot vectors."""

    def solve(episode: Episode) -> torch.Tensor:
        embeddings = model(torch.cat([episode.support, episode.query]))
        support, query = embeddings[: len(episode.support)], embeddings[len(episode.support) :]
        attention = (-(query[:, None] - support[None]).pow(2).sum(2)).softmax(1)
        probabilities = attention @ one_hot(episode.support_labels, episode.way).to(attention.dtype)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()

    return solve


def clone_and_adapt(model: nn.Module, tasks: Sequence[Episode], order: int, steps: int, rate: float) -> torch.Tensor:
    """Do a meta-step like the best-known library: adapt a copy for each task, then backpropagate through it.

    Leaves the meta-gradient in the parameters' ``grad``.

    Returns:
        The mean loss.
    """
    total = torch.zeros((), device=tasks[0].query.device)
    for task in tasks:
        weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
        for _ in range(steps):
            loss = cross_entropy(functional_call(model, weights, task.support), task.support_labels)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=order == 2)
            weights = {
                name: weight - rate * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        loss = cross_entropy(functional_call(model, weights, task.query), task.query_labels) / len(tasks)
        loss.backward()
        total += loss.detach()
    return total


def article_meta_step(model: nn.Module, tasks: Sequence[Episode], steps: int, rate: float) -> torch.Tensor:
    """Do a second-order meta-step like the article's program, which keeps every task's graph and traverses it twice.

    The program discards the backward pass of each task in second order and backpropagates through all tasks together
    at the end. Leaves the meta-gradient in the parameters' ``grad``.

    Returns:
        The mean loss.
    """
    losses = []
    for task in tasks:
        weights: dict[str, torch.Tensor] = dict(model.named_parameters())
        for _ in range(steps):
            loss = cross_entropy(_functional_conv4(task.support, weights), task.support_labels)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {
                name: weight - rate * gradient
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
        loss = cross_entropy(_functional_conv4(task.query, weights), task.query_labels)
        loss.backward(retain_graph=True)
        losses.append(loss)
    model.zero_grad()
    mean = torch.stack(losses).mean()
    mean.backward()
    return mean.detach()


def _functional_conv4(images: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    for block in range(4):
        images = conv2d(images, weights[f"{block}.0.weight"], weights[f"{block}.0.bias"], padding=1)
        norm = weights[f"{block}.1.weight"], weights[f"{block}.1.bias"]
        images = max_pool2d(relu(batch_norm(images, None, None, *norm, training=True)), 2)
    return linear(images.flatten(1), weights["5.weight"], weights["5.bias"])
