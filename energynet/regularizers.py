"""Keeps a learned map contracting by a penalty on its Jacobian or by layers of bounded norm."""

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from energynet._torch import tree as _tree
from energynet._torch.autodiff import pullback
from energynet._torch.tree import Layout
from energynet.step import Step

M = TypeVar("M", bound=nn.Module)


def jacobian_penalty(
    step: Step | Callable[..., Any],
    x: Any,
    *context: Any,
    num_vectors: int = 1,
    batch_dims: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An unbiased estimate of ‖∂g/∂x‖²_F; add it to a loss so that training keeps the map contracting.

    The estimate is ‖(∂g/∂x)ᵀ v‖² for random signs v (Hutchinson), which is exact if the rows of ∂g/∂x are orthogonal. It is
    differentiable with respect to the step's parameters, the context and ``x``. With x = x* from a layer, this is the total
    derivative; ``x.detach()`` ignores the change of x*, as the source does, and saves an adjoint solve. Divide by n for a mean
    over coordinates.

    Example:
        >>> import torch
        >>> jacobian_penalty(lambda x, z: 0.5 * x + z, torch.zeros(4, 3), torch.ones(4, 3))     # ‖½ I‖² = 3/4
        tensor([0.7500, 0.7500, 0.7500, 0.7500])

    Args:
        step: g(x, \\*context) -> like x, a function, a module or a `Step`.
        x: the point, usually x*: ``(B, ...)`` or a pytree of such.
        context: the other arguments of g.
        num_vectors: the number of random vectors per sample; the variance is inversely proportional to it.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem.
        generator: generates the random signs, on the device of x.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if num_vectors < 1, or the step does not return the shapes of x.

    Source: Bai, Koltun and Kolter (2021), Stabilizing equilibrium models by Jacobian regularization.
    """
    if type(num_vectors) is not int or num_vectors < 1:
        raise ValueError(f"num_vectors must be at least 1, got {num_vectors}: it is the number of random vectors to average.")
    layout = Layout.of(x, batch_dims)
    flat, function = layout.ravel(x), _flat_map(step, layout, context)
    total = torch.zeros_like(flat[..., 0] if flat.shape[-1] else flat.sum(-1))
    for _ in range(num_vectors):
        signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device).to(flat.dtype) * 2 - 1
        (product,) = pullback(function, [flat], signs)
        total = total if product is None else total + product.square().sum(-1)
    return total / num_vectors


def spectrally_normalized(module: M, limit: float = 1.0) -> M:
    """A copy of a module in which each linear and convolution layer has the operator norm ``limit``.

    So a chain of k layers with activations of slope at most 1 (ReLU, tanh, softplus) has the Lipschitz constant limitᵏ, and
    contracts for ``limit < 1``. The weight is a parametrization, which is computed once per solve. Train the parameters of the
    copy; the given module is not changed. The weight of a convolution is additionally divided by √(size of its
    kernel), because torch's spectral norm bounds the weight as a matrix and not the convolution; the bound holds for zero
    and circular padding.

    The norm comes from a power iteration with one step per evaluation in training mode: it is accurate to about a percent,
    and second derivatives ignore the change of its vectors. If either matters, use `energynet.energies.BoundedNorm`.

    Example:
        >>> import torch
        >>> network = spectrally_normalized(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()), limit=0.5)
        >>> bool((torch.linalg.matrix_norm(network[0].weight, 2) - 0.5).abs() < 0.05)
        True

    Args:
        module: contains `torch.nn.Linear`, ``Conv`` or ``ConvTranspose`` layers, or is one.
        limit: the norm of each layer, positive.

    Raises:
        ValueError: if limit is not positive and finite, or the module has no such layer.

    Source: Miyato et al. (2018), Spectral normalization for generative adversarial networks.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {module!r}.")
    if not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        raise ValueError(f"limit must be positive and finite, got {limit}: it is the norm of each layer, below 1 to contract.")
    module = copy.deepcopy(module)
    layers = [layer for layer in module.modules() if isinstance(layer, LAYERS)]
    if not layers:
        kinds = sorted({type(m).__name__ for m in module.modules()})
        raise ValueError(
            f"{type(module).__name__} has no linear or convolution layer to normalize, only {', '.join(kinds)}. Weights that are "
            "plain parameters need their own parametrization, such as energynet.energies.BoundedNorm."
        )
    for layer in layers:
        spectral_norm(layer, n_power_iterations=1)
        kernel = math.prod(getattr(layer, "kernel_size", ()))
        register_parametrization(layer, "weight", _Scaled(limit / math.sqrt(kernel)))
    return module


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _Scaled(nn.Module):
    """A parametrization that multiplies the weight by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:.3g}"


def _flat_map(step: Callable[..., Any], layout: Layout, context: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    def function(flat: Tensor) -> Tensor:
        moved = step(layout.unravel(flat), *context)
        if any(t.shape != (*flat.shape[:-1], *s) for t, s in zip(_tree.leaves(moved), layout.shapes, strict=True)):
            seen, expected = ([tuple(t.shape) for t in _tree.leaves(tree)] for tree in (moved, layout.unravel(flat)))
            raise ValueError(f"The step must return the shapes of x, {expected}, but returned {seen}. Wrap an energy in "
                             "GradientStep(energy, step_size).")  # fmt: skip
        return layout.ravel(moved).to(flat.dtype)

    return function
