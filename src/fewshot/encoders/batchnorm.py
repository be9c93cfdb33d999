"""Batch norm by the statistics of the batch alone, cheap to differentiate twice."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class BatchStatisticsNorm2d(nn.Module):
    """Batch norm (Ioffe & Szegedy, 2015, arXiv 1502.03167) that always takes the statistics of its own batch.

    Nothing is remembered from one batch to the next, so what an image becomes depends on those beside it, in
    evaluation too: that is how MAML was published (arXiv 1703.03400).

    Args:
        norm: whose weight, bias and epsilon to take over.

    Shape:
        ``[images, channels, height, width]``, and the same out.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise every channel over the batch, scale it and shift it."""
        return _BatchNorm.apply(images, self.weight, self.bias, self.eps)[0]


def use_batch_statistics(module: nn.Module) -> None:
    """Replace every ``BatchNorm2d`` inside ``module`` that is trained by one that takes the statistics of its batch."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and child.weight.requires_grad:
            setattr(module, name, BatchStatisticsNorm2d(child))
        else:
            use_batch_statistics(child)


class _BatchNorm(torch.autograd.Function):
    """y = weight (x - mean) r + bias, with r = 1 / sqrt(variance + eps)."""

    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, _, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, mean, r)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if gradients[0] is None:
            return None, None, None, None
        twice = torch.is_grad_enabled()  # with create_graph
        differentiate: Any = _BatchNormBackward.apply if twice else _BatchNormBackward.forward
        return (*differentiate(gradients[0], *ctx.saved_tensors, ctx.eps), None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, int, int]]:
        """Each channel of each task is a channel of its own."""

        def folded(of: torch.Tensor, dim: int | None, to: int) -> torch.Tensor:
            of = (
                of.unsqueeze(to).expand(*of.shape[:to], info.batch_size, *of.shape[to:])
                if dim is None
                else of.movedim(dim, to)
            )
            return of.flatten(to, to + 1)

        y, mean, r = _BatchNorm.apply(
            folded(x, in_dims[0], 1), folded(weight, in_dims[1], 0), folded(bias, in_dims[2], 0), eps
        )
        tasks = info.batch_size, -1
        return (y.unflatten(1, tasks), mean.unflatten(0, tasks), r.unflatten(0, tasks)), (1, 0, 0)


class _BatchNormBackward(torch.autograd.Function):
    """The gradients of batch norm, as a function with a gradient of its own.

    PyTorch differentiates the same formula into some thirty passes over the activations, which cost more than the
    convolutions of Conv4. Here it is three means and five fused products.
    """

    @staticmethod
    def forward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, r: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """With n values a channel and z = (x - mean) r: dx = weight r (dy - sum(dy) / n - z sum(dy z) / n)."""
        return torch.ops.aten.native_batch_norm_backward(
            _laid_out(dy, x), x, weight, None, None, mean, r, True, eps, [True, True, True]
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, dweight, dbias = output
        ctx.save_for_backward(*inputs[:-1], dweight, dbias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of <v, dx> + <a, dweight> + <b, dbias>, by hand.

        Every mean is over a channel. With V = mean(v z), D = mean(dy z) and Q = mean(v dy) - mean(v) mean(dy) - V D,
        <v, dx> is n weight r Q, and both gradients are sums of v, dy and z, times a number a channel.
        """
        dy, x, weight, mean, r, dweight, dbias = ctx.saved_tensors
        kept, n = x.dtype, x.numel() // x.shape[1]
        v, dy, x = (_laid_out(of, x).to(mean.dtype) for of in (v, dy, x))
        mean_v, mean_dy, mean_dyz = v.mean((0, 2, 3)), dbias / n, dweight / n
        mean_vz = ((v * x).mean((0, 2, 3)) - mean * mean_v) * r
        q = (v * dy).mean((0, 2, 3)) - mean_v * mean_dy - mean_vz * mean_dyz
        s = weight * r

        of_z = a - s * mean_vz
        by_dy = of_z * r
        for_dy = _combine((s, v), (by_dy, x), shift=b - s * mean_v - by_dy * mean)

        by_v = -s * r * mean_dyz
        by_x = -(s * (q - mean_vz * mean_dyz) + mean_dyz * of_z) * r * r
        for_x = _combine((by_v, v), (by_dy, dy), (by_x, x), shift=-by_v * mean_v - by_dy * mean_dy - by_x * mean)
        return for_dy.to(kept), for_x.to(kept), n * r * q, None, None, None


def _laid_out(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Kernels that meet two memory layouts at once are several times slower than a copy."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _combine(*terms: tuple[torch.Tensor, torch.Tensor], shift: torch.Tensor) -> torch.Tensor:
    total = shift[:, None, None]
    for factor, images in terms:
        total = torch.addcmul(total, images, factor[:, None, None])
    return total
