"""Digests of tensors, by which weights and embeddings are recognised."""

import hashlib
from collections.abc import Mapping

import torch


def digest(tensors: Mapping[str, torch.Tensor], text: str = "") -> str:
    """Return the SHA-256 of a text, and of tensors in their order, with names, types and shapes."""
    found = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        found.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
