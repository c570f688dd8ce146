"""Normalization functions with correct derivatives of every order.

PyTorch's kernels for ``layer_norm`` and for ``batch_norm`` in training, which ``instance_norm`` uses as well, treat the mean and
deviation as constants when their second derivative is differentiated, so the third derivative is silently wrong. While a graph
is being built, they are therefore replaced by compositions of a mean, a variance and a product.
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
    """A context in which PyTorch's normalization functions have correct derivatives of every order."""
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
    """``torch.nn.functional.batch_norm`` with the mean and variance of the batch."""
    if not training:  # without running statistics PyTorch raises its own error
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
    """``torch.nn.functional.instance_norm`` with the mean and variance of each sample."""
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
    """Whether to replace a call; not with running statistics, which are constants or are updated in place by PyTorch."""
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
