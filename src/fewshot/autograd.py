"""Autograd graph of a tensor, used to prove the order of a meta-gradient."""

from typing import Any

import torch


def autograd_graph(tensor: torch.Tensor) -> tuple[list[Any], list[tuple[int, int]]]:
    """Walk the graph that autograd would use to differentiate ``tensor``.

    Args:
        tensor: a tensor with a ``grad_fn``.

    Returns:
        The nodes in breadth-first order, and the edges as pairs of positions in it, from later to earlier operations.
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
    """Whether the node with this name differentiates an operation that is itself a gradient."""
    return "Backward" in name.rstrip("0123456789").removesuffix("Backward")
