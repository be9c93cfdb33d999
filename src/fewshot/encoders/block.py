"""A block of Conv4 that trains on the CPU in less memory."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import batch_norm, max_pool2d, relu

WINDOW = 2
CHUNK = 2**21  # bytes of maps whose gradient is computed at a time: they stay in the cache


class Block(nn.Sequential):
    """3x3 convolution, batch norm, 2x2 max pooling and ReLU.

    In training on the CPU, the maps are pooled before they are normalised, unless there is no ReLU. Batch norm is an
    increasing function of each value, or a decreasing one in channels with a negative weight, where the least value is
    taken, so that this computes the same on a quarter of the values, and normalised maps of full size are never stored.

    Args:
        channels: of the input.
        filters: of the convolution.
        signed: leave out the ReLU.

    Shape:
        ``[images, channels, height, width]`` to ``[images, filters, height // 2, width // 2]``.
    """

    def __init__(self, channels: int, filters: int, signed: bool = False) -> None:
        super().__init__(
            nn.Conv2d(channels, filters, kernel_size=3, padding=1),
            nn.BatchNorm2d(filters),
            nn.MaxPool2d(WINDOW),
            nn.Identity() if signed else nn.ReLU(),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the layers."""
        conv, norm, pool, activation = self
        maps = conv(images)
        # The layers may have been replaced, and PyTorch's own are what the compiler fuses.
        pools_first = (
            type(norm) is nn.BatchNorm2d
            and norm.training
            and isinstance(norm.momentum, float)
            and isinstance(pool, nn.MaxPool2d)
            and type(activation) is nn.ReLU
            and maps.device.type == "cpu"
            and maps.dtype == norm.weight.dtype
            and not torch.compiler.is_compiling()
        )
        if not pools_first:
            normalised: torch.Tensor = activation(pool(norm(maps)))
            return normalised
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)  # type: ignore[operator]
            mean, variance = torch.ops.aten.batch_norm_update_stats(
                maps, norm.running_mean, norm.running_var, norm.momentum
            )
            r = (variance + norm.eps).rsqrt()
        found: torch.Tensor = _PooledNorm.apply(maps, norm.weight, norm.bias, mean, variance, r, norm.eps)[0]
        return found


class _PooledNorm(torch.autograd.Function):
    """ReLU of the maxima of y = weight (x - mean) r + bias, with x's statistics and r = 1 / sqrt(variance + eps)."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        r: torch.Tensor,  # noqa: ARG004
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sign = torch.where(weight < 0, -1.0, 1.0).to(x.dtype)[:, None, None]
        falls = bool((weight.numpy() < 0).any())  # in this process's memory, so that nothing waits
        pooled, where = torch.ops.aten.max_pool2d_with_indices(x * sign if falls else x, [WINDOW, WINDOW])
        pooled = pooled * sign if falls else pooled
        y = torch.native_batch_norm(pooled, weight, bias, mean, variance, False, 0.0, eps)[0]
        return y.relu_(), pooled, where.int()  # half the memory; positions in a map are small

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        x, weight, bias, mean, variance, r, ctx.eps = inputs
        _, pooled, where = output
        ctx.mark_non_differentiable(pooled, where)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, mean, variance, r, pooled, where)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, variance, r, pooled, where = ctx.saved_tensors
        if dy is None:
            return (None,) * 7
        if torch.is_grad_enabled():  # with create_graph
            plain = relu(max_pool2d(batch_norm(x, None, None, weight, bias, training=True, eps=ctx.eps), WINDOW))
            found = torch.autograd.grad(plain, (x, weight, bias), dy, create_graph=True, materialize_grads=True)
            return *found, None, None, None, None
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        # Computed again, because by now nothing else keeps the output of the block.
        y = torch.native_batch_norm(pooled, weight, bias, mean, variance, False, 0.0, ctx.eps)[0]
        dy = torch.ops.aten.threshold_backward(dy.contiguous(memory_format=layout), y, 0)
        del y
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, pooled, weight, None, None, mean, r, True, ctx.eps, [False, True, True]
        )
        # Gradient of batch norm with n values per channel: s (dy - dbias / n - (x - mean) r dweight / n), with dy zero
        # but at the maxima.
        s, n = weight * r, x.numel() // x.shape[1]
        by_x = -s * r * dweight / n
        shift = -s * dbias / n - by_x * mean
        dy.mul_(s[:, None, None])
        dx = torch.empty_like(x)
        images = max(1, CHUNK // (x[0].numel() * x.element_size()))
        for part, some_x, some_dy, some_where in zip(*(t.split(images) for t in (dx, x, dy, where)), strict=True):
            at_maxima = torch.ops.aten.max_pool2d_with_indices_backward(
                some_dy, some_x, [WINDOW, WINDOW], [], [0, 0], [1, 1], False, some_where.long()
            )
            torch.addcmul(at_maxima.add_(shift[:, None, None]), some_x, by_x[:, None, None], out=part)
        return dx, dweight, dbias, None, None, None, None
