"""Layers for adapted networks: batch norm with batch statistics only, and layers with cheap second derivatives."""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fewshot.encoders.block import Block
from fewshot.errors import FewShotError

CHANNEL_BY_CHANNEL = (nn.Identity, nn.ReLU, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
RANDOM = re.compile(r"drop|stochastic|rrelu", re.IGNORECASE)  # names of layers of PyTorch, torchvision and timm
How = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation and groups


class BatchStatisticsNorm2d(nn.Module):
    """Batch norm (Ioffe & Szegedy, 2015, arXiv 1502.03167) that always uses the statistics of its batch.

    There are no running statistics, so the output for an image depends on the other images of its batch, in evaluation
    too: that is how MAML was published (arXiv 1703.03400).

    Args:
        norm: the layer to take weight, bias and epsilon from, and dropout and activation if it is timm's.
        twice: whether second derivatives must be fast.

    Raises:
        FewShotError: the layer is a different kind of batch norm.

    Shape:
        ``[images, channels, height, width]``, and the same out. Of several tasks, see ``solves_together``:
        ``[images, tasks * channels, height, width]``, with weights ``[tasks, channels]``.
    """

    def __init__(self, norm: nn.BatchNorm2d, twice: bool = True) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.twice = norm.weight, norm.bias, norm.eps, twice
        self.then: nn.Module | None = None
        if type(norm).__name__ == "BatchNormAct2d":
            self.then = nn.Sequential(norm.drop, norm.act)  # type: ignore[arg-type]
        elif type(norm).forward is not nn.BatchNorm2d.forward:
            raise FewShotError(
                f"MAML cannot adapt the encoder's layer {type(norm).__name__}, a batch norm that computes something "
                "else besides; choose a different encoder, or encoder.frozen=true"
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise every channel over the batch, scale it and shift it."""
        weight, bias = self.weight.flatten(), self.bias.flatten()
        if self.twice:
            normalised = _BatchNorm.apply(images, weight, bias, self.eps)[0]
        else:
            normalised = torch.native_batch_norm(images, weight, bias, None, None, True, 0.0, self.eps)[0]
        return normalised if self.then is None else self.then(normalised)


class AdaptableConv2d(nn.Module):
    """A convolution whose second derivatives are convolutions as fast as its first derivatives.

    PyTorch computes some of them with kernels as large as the images, and some that are not needed.

    Args:
        conv: the layer to take weight, bias, stride, padding and dilation from; it has one group and pads with zeros.
        twice: whether second derivatives must be fast.

    Shape:
        ``[images, channels, height, width]`` in and out. Of several tasks, see ``solves_together``:
        ``[images, tasks * channels, height, width]``, with weights ``[tasks, filters, channels, height, width]``.
    """

    def __init__(self, conv: nn.Conv2d, twice: bool = True) -> None:
        super().__init__()
        self.weight, self.bias, self.twice = conv.weight, conv.bias, twice
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Convolve."""
        several = self.weight.ndim == 5
        how: How = (self.stride, self.padding, self.dilation, len(self.weight) if several else 1)  # type: ignore[assignment]
        weight = self.weight.flatten(0, 1) if several else self.weight
        bias = None if self.bias is None else self.bias.flatten()
        if not self.twice:
            return torch.conv2d(images, weight, bias, *how)
        inputs: list[torch.Tensor | None] = [images, weight, bias]
        device = images.device.type
        if torch.is_autocast_enabled(device):  # autocast does not reach into custom functions
            lower = torch.get_autocast_dtype(device)
            inputs = [x.to(lower) if x is not None and x.dtype == torch.float32 else x for x in inputs]
        return cast(torch.Tensor, _Convolution.apply(*inputs, how))


def make_adaptable(module: nn.Module, twice: bool) -> None:
    """Replace the trainable batch norms and convolutions inside ``module``.

    Subclasses of ``Conv2d`` compute something else, and stay as they are.

    Args:
        module: changed in place; its parameters stay the same, and so does what it computes in training.
        twice: whether the inner steps are differentiated.

    Raises:
        FewShotError: see ``BatchStatisticsNorm2d``.
    """
    for name, child in module.named_children():
        trained = any(parameter.requires_grad for parameter in child.parameters(recurse=False))
        if isinstance(child, nn.BatchNorm2d) and trained:
            setattr(module, name, BatchStatisticsNorm2d(child, twice))
        elif type(child) is nn.Conv2d and trained and _is_plain(child):
            setattr(module, name, AdaptableConv2d(child, twice))
        else:
            make_adaptable(child, twice)


def solves_together(network: nn.Module) -> bool:
    """Whether an adaptable network can solve several tasks in one pass, each with its own weights.

    The channels of the tasks stand side by side, ``[images, tasks * channels, height, width]``, and all weights have a
    leading dimension of tasks, so that a convolution is one with a group for each task. No layer may mix channels.
    """
    if isinstance(network, BatchStatisticsNorm2d) and network.then is not None:
        return False
    if isinstance(network, (AdaptableConv2d, BatchStatisticsNorm2d, *CHANNEL_BY_CHANNEL)):
        return all(parameter.requires_grad for parameter in network.parameters())  # others have no dimension of tasks
    chain = type(network).forward is nn.Sequential.forward or isinstance(network, Block)
    return chain and all(map(solves_together, network.children()))


def draws_random(network: nn.Module) -> bool:
    """Whether a network draws random numbers as it is now: a layer trains that drops values, or is a random ReLU.

    They are known by their names, such as ``Dropout``, ``DropPath``, ``StochasticDepth`` and ``RReLU``.
    """
    return any(
        module.training and RANDOM.search(type(module).__name__) and _rate(module) != 0 for module in network.modules()
    )


def keeps_statistics(network: nn.Module) -> bool:
    """Whether a network changes running statistics as it is now: a batch norm that was not replaced trains."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
        for module in network.modules()
    )


def _rate(module: nn.Module) -> float | None:
    # torchvision and timm keep layers that drop nothing.
    return getattr(module, "p", getattr(module, "drop_prob", None))


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether ``AdaptableConv2d`` computes the same; a weight that is computed from others is not a parameter."""
    own = "weight" in conv._parameters
    return own and conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class _Convolution(torch.autograd.Function):
    """Same result as ``torch.conv2d``."""

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
        """Use PyTorch's convolution with one group per task."""
        *tensors, how = inputs
        return torch.vmap(lambda *task: torch.conv2d(*task, *how), in_dims[:-1])(*tensors), 0


class _ConvolutionBackward(torch.autograd.Function):
    """The gradients of a convolution, as a function that can be differentiated."""

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
        """Gradient of <v, dx> + <a, dweight> + <b, dbias>.

        All three terms are linear in dy; the first is also linear in the weight, and the second in x.
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
            from_v = torch.conv2d(v, weight, None, *ctx.how)
            for_dy = from_v if for_dy is None else for_dy + from_v
            _, for_weight, _ = _convolution_backward(dy, v, weight, ctx.how, (False, by_weight, False))
        return for_dy, for_x, for_weight, None, None


def _convolution_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, how: How, needed: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    if not any(needed):
        return None, None, None
    *strided, groups = how
    settings = *strided, False, [0, 0], groups
    return torch.ops.aten.convolution_backward(dy, x, weight, [len(weight)], *settings, list(needed))


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
        x, *per_channel = ctx.saved_tensors
        inputs = _laid_out(gradients[0], x), x, *per_channel, ctx.eps
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
        """Fold the tasks into the channels, so that each channel of each task has its own statistics."""

        def folded(tensor: torch.Tensor, dim: int | None, to: int) -> torch.Tensor:
            tensor = (
                tensor.unsqueeze(to).expand(*tensor.shape[:to], info.batch_size, *tensor.shape[to:])
                if dim is None
                else tensor.movedim(dim, to)
            )
            return tensor.flatten(to, to + 1)

        y, mean, r = _BatchNorm.apply(
            folded(x, in_dims[0], 1), folded(weight, in_dims[1], 0), folded(bias, in_dims[2], 0), eps
        )
        tasks = info.batch_size, -1
        return (y.unflatten(1, tasks), mean.unflatten(0, tasks), r.unflatten(0, tasks)), (1, 0, 0)


class _BatchNormBackward(torch.autograd.Function):
    """The gradients of batch norm, as a function that can be differentiated.

    PyTorch differentiates the same formula in about thirty passes over the activations, which cost more than the
    convolutions of Conv4. This implementation needs three means and five fused products.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        gradients = _batch_norm_backward(*inputs)
        ctx.save_for_backward(*inputs[:-1], *gradients[1:])
        return gradients

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradient of <v, dx> + <a, dweight> + <b, dbias>, derived by hand.

        Every mean is over a channel. With V = mean(v z), D = mean(dy z) and Q = mean(v dy) - mean(v) mean(dy) - V D,
        <v, dx> is n weight r Q, and both gradients are sums of v, dy and z, each times one number per channel.
        """
        dy, x, weight, mean, r, dweight, dbias = ctx.saved_tensors
        kept, n = x.dtype, x.numel() // x.shape[1]
        v, dy, x = (tensor.to(mean.dtype) for tensor in (_laid_out(v, x), dy, x))
        mean_v, mean_dy, mean_dyz = v.mean((0, 2, 3)), dbias / n, dweight / n
        mean_vz = ((v * x).mean((0, 2, 3)) - mean * mean_v) * r
        q = (v * dy).mean((0, 2, 3)) - mean_v * mean_dy - mean_vz * mean_dyz
        s = weight * r

        by_z = a - s * mean_vz
        by_dy = by_z * r
        for_dy = _combine((s, v), (by_dy, x), shift=b - s * mean_v - by_dy * mean)

        by_v = -s * r * mean_dyz
        by_x = -(s * (q - mean_vz * mean_dyz) + mean_dyz * by_z) * r * r
        for_x = _combine((by_v, v), (by_dy, dy), (by_x, x), shift=-by_v * mean_v - by_dy * mean_dy - by_x * mean)
        return for_dy.to(kept), for_x.to(kept), n * r * q, None, None, None


def _batch_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, r: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With n values per channel and z = (x - mean) r: dx = weight r (dy - sum(dy) / n - z sum(dy z) / n)."""
    return torch.ops.aten.native_batch_norm_backward(dy, x, weight, None, None, mean, r, True, eps, [True, True, True])


def _laid_out(images: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Copy images to the memory layout of ``like``: kernels with mixed layouts are several times slower than a copy."""
    last = like.is_contiguous(memory_format=torch.channels_last)
    return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _combine(*terms: tuple[torch.Tensor, torch.Tensor], shift: torch.Tensor) -> torch.Tensor:
    total = shift[:, None, None]
    for factor, images in terms:
        total = torch.addcmul(total, images, factor[:, None, None])
    return total
