"""Normalization whose derivatives are right at every order.

PyTorch's kernels of ``layer_norm`` and of ``batch_norm`` in training, which is also what ``instance_norm`` calls, hold mean and
deviation constant when their second derivative is differentiated, so that their third is wrong, without a word. Where a graph is
being built they are therefore written as what they are: a mean, a variance and a product.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_HALVES = (torch.float16, torch.bfloat16)


def composed() -> contextlib.AbstractContextManager[Any]:
    """In here the normalizations of PyTorch can be differentiated as often as one likes."""
    return _Composed()


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``torch.layer_norm``."""
    return _affine(_standardized(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias, input.dtype)


def batch_norm(
    input: Tensor,  # (B, C, ...)
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.batch_norm``, of the batch's own mean and variance."""
    if not training:  # without running statistics PyTorch refuses, in its own words
        return F.batch_norm(input, None, None, weight, bias, training, momentum, eps)
    return _by_channel(input, (0, *range(2, input.ndim)), (weight, bias), eps)


def instance_norm(
    input: Tensor,  # (B, C, ...)
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm``, of each sample's own mean and variance."""
    if not use_input_stats:
        return F.instance_norm(input, None, None, weight, bias, use_input_stats, momentum, eps)
    return _by_channel(input, tuple(range(2, input.ndim)), (weight, bias), eps)


class _Composed(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _WRITTEN_OUT[func](*args, **kwargs) if _kernel_is_wrong(func, args, kwargs) else func(*args, **kwargs)


_WRITTEN_OUT: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}


def _kernel_is_wrong(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Not that of running statistics: these are constants, or changed in place, which only PyTorch's own function does."""
    if func not in _WRITTEN_OUT:
        return False
    running = (*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var"))
    return func in (F.layer_norm, torch.layer_norm) or all(t is None for t in running)


def _by_channel(input: Tensor, dims: tuple[int, ...], scale: tuple[Tensor | None, Tensor | None], eps: float) -> Tensor:
    shape = (1, -1, *[1] * (input.ndim - 2))
    weight, bias = (None if t is None else t.reshape(shape) for t in scale)
    return _affine(_standardized(input, dims, eps), weight, bias, input.dtype)


def _standardized(input: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    variance, mean = torch.var_mean(input.float() if input.dtype in _HALVES else input, dims, correction=0, keepdim=True)
    return (input - mean) * (variance + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(dtype)
