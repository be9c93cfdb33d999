"""The autograd graph behind a tensor: the proof of which order a meta-gradient has."""

from typing import Any

import torch


def autograd_graph(tensor: torch.Tensor) -> tuple[list[Any], list[tuple[int, int]]]:
    """Walk the graph through which autograd would differentiate ``tensor``.

    Args:
        tensor: a result with a graph behind it.

    Returns:
        The nodes, each before those it leads back to where it is found first, and the edges by their positions.
    """
    nodes: list[Any] = [tensor.grad_fn]
    positions = {tensor.grad_fn: 0}
    edges = []
    for position, node in enumerate(nodes):
        for earlier, _ in node.next_functions:
            if earlier is None:
                continue
            if earlier not in positions:
                positions[earlier] = len(nodes)
                nodes.append(earlier)
            edges.append((position, positions[earlier]))
    return nodes, edges


def is_double_backward(name: str) -> bool:
    """Whether a node's name says that it differentiates an operation that is itself a gradient."""
    return "Backward" in name.rstrip("0123456789").removesuffix("Backward")
