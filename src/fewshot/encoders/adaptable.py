"""Layers of a network that is adapted: batch norm by the batch alone, and what is cheap to differentiate twice."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

How = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding and dilation of a convolution


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


class DoubleBackwardConv2d(nn.Module):
    """A convolution whose second derivatives are convolutions as quick as its first.

    PyTorch finds some of them with kernels as large as the images, and some that nobody asked for.

    Args:
        conv: whose weight, bias, stride, padding and dilation to take over. It has one group, and pads with zeros.

    Shape:
        ``[images, channels, height, width]`` in and out.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.how: How = (conv.stride, conv.padding, conv.dilation)  # type: ignore[assignment]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve."""
        inputs: list[torch.Tensor | None] = [images, self.weight, self.bias]
        device = images.device.type
        if torch.is_autocast_enabled(device):  # which does not reach into functions of our own
            lower = torch.get_autocast_dtype(device)
            inputs = [of.to(lower) if of is not None and of.dtype == torch.float32 else of for of in inputs]
        return cast(torch.Tensor, _Convolution.apply(*inputs, self.how))


def make_adaptable(module: nn.Module, twice: bool) -> None:
    """Replace layers inside ``module`` that are trained.

    Args:
        module: changed in place; its parameters stay the same.
        twice: whether the inner steps are differentiated: then convolutions are replaced, as batch norms always are.
    """
    for name, child in module.named_children():
        trained = any(of.requires_grad for of in child.parameters(recurse=False))
        if isinstance(child, nn.BatchNorm2d) and trained:
            setattr(module, name, BatchStatisticsNorm2d(child))
        elif isinstance(child, nn.Conv2d) and trained and twice and _is_plain(child):
            setattr(module, name, DoubleBackwardConv2d(child))
        else:
            make_adaptable(child, twice)


def _is_plain(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class _Convolution(torch.autograd.Function):
    """What ``torch.conv2d`` computes."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: How) -> torch.Tensor:
        return torch.conv2d(x, weight, bias, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG004
        x, weight, _, ctx.how = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        inputs = _laid_out(dy, x), x, weight, ctx.how, ctx.needs_input_grad[:3]
        twice = torch.is_grad_enabled()  # with create_graph
        return (*(_ConvolutionBackward.apply(*inputs) if twice else _convolution_backward(*inputs)), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[torch.Tensor, int]:  # noqa: ARG004
        """PyTorch's own convolution, of as many groups as there are tasks."""
        *tensors, how = inputs
        return torch.vmap(lambda *of_task: torch.conv2d(*of_task, *how), in_dims[:-1])(*tensors), 0


class _ConvolutionBackward(torch.autograd.Function):
    """The gradients of a convolution, as a function with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor | None, ...]:
        *tensors, ctx.how, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return _convolution_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, v: torch.Tensor | None, a: torch.Tensor | None, b: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradient of <v, dx> + <a, dweight> + <b, dbias>.

        All are linear in dy; the first is so in the weight, too, and the second in x.
        """
        dy, x, weight = ctx.saved_tensors
        _, by_x, by_weight, *_ = ctx.needs_input_grad
        for_dy, for_x, for_weight = None, None, None
        if a is not None:
            for_dy = torch.conv2d(x, a, b, *ctx.how)
            for_x, _, _ = _convolution_backward(dy, x, a, ctx.how, (by_x, False, False))
        elif b is not None:
            for_dy = b[:, None, None].expand_as(dy)
        if v is not None:
            v = _laid_out(v, x)
            of_v = torch.conv2d(v, weight, None, *ctx.how)
            for_dy = of_v if for_dy is None else for_dy + of_v
            _, for_weight, _ = _convolution_backward(dy, v, weight, ctx.how, (False, by_weight, False))
        return for_dy, for_x, for_weight, None, None


def _convolution_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, how: How, needed: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    if not any(needed):
        return None, None, None
    return torch.ops.aten.convolution_backward(dy, x, weight, [len(weight)], *how, False, [0, 0], 1, list(needed))


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
        x, *of_channels = ctx.saved_tensors
        inputs = _laid_out(gradients[0], x), x, *of_channels, ctx.eps
        twice = torch.is_grad_enabled()  # with create_graph
        return (*(_BatchNormBackward.apply(*inputs) if twice else _batch_norm_backward(*inputs)), None)

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
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        gradients = _batch_norm_backward(*inputs)
        ctx.save_for_backward(*inputs[:-1], *gradients[1:])
        return gradients

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of <v, dx> + <a, dweight> + <b, dbias>, by hand.

        Every mean is over a channel. With V = mean(v z), D = mean(dy z) and Q = mean(v dy) - mean(v) mean(dy) - V D,
        <v, dx> is n weight r Q, and both gradients are sums of v, dy and z, times a number a channel.
        """
        dy, x, weight, mean, r, dweight, dbias = ctx.saved_tensors
        kept, n = x.dtype, x.numel() // x.shape[1]
        v, dy, x = (of.to(mean.dtype) for of in (_laid_out(v, x), dy, x))
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


def _batch_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, r: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With n values a channel and z = (x - mean) r: dx = weight r (dy - sum(dy) / n - z sum(dy z) / n)."""
    return torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, r, True, eps, [True, True, True])


def _laid_out(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Kernels that meet two memory layouts at once are several times slower than a copy."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _combine(*terms: tuple[torch.Tensor, torch.Tensor], shift: torch.Tensor) -> torch.Tensor:
    total = shift[:, None, None]
    for factor, images in terms:
        total = torch.addcmul(total, images, factor[:, None, None])
    return total
