"""Energies: functions that return one scalar per sample, whose minimizer is the answer."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

from torch import Tensor, nn

from energynet._torch.autodiff import gradient_of_sum, recording

EnergyLike = Callable[..., Tensor]
"""Any callable or module ``E(x, *context) -> (B,)``; a 0-d value means one problem without a batch dimension."""


class Energy(nn.Module, ABC):
    """A learnable cost E(x, \\*context) that returns one scalar per sample.

    Override `evaluate`. If part of the work does not depend on ``x``, move it to `encode`, which runs once per solve instead
    of once per iteration. `start` returns the initial point when no ``x0`` is passed.

    Example:
        >>> import torch
        >>> class Ridge(Energy):
        ...     def encode(self, A, b):                    # (B, m, n), (B, m)
        ...         return A.mT @ A, (A.mT @ b[..., None])[..., 0]
        ...     def evaluate(self, x, gram, right):        # (B, n), (B, n, n), (B, n)
        ...         return 0.5 * ((gram @ x[..., None])[..., 0] * x).sum(-1) - (right * x).sum(-1) + x.square().sum(-1)
        >>> Ridge()(torch.ones(4, 3), torch.ones(4, 5, 3), torch.ones(4, 5)).shape
        torch.Size([4])
    """

    @abstractmethod
    def evaluate(self, x: Any, *code: Any) -> Tensor:
        """The energy per sample.

        Args:
            x: the variable, a tensor ``(B, ...)`` or a pytree of such.
            code: the result of `encode`; the context itself if `encode` is not overridden.

        Returns:
            ``(B,)``, or a 0-d tensor for one problem without a batch dimension.
        """

    def encode(self, *context: Any) -> Any:
        """Compute everything that does not depend on ``x``, once per solve; a tuple is unpacked as arguments of `evaluate`."""
        return context

    def start(self, *context: Any) -> Any:
        """The initial point when no ``x0`` is passed.

        Raises:
            ValueError: unless overridden.
        """
        raise ValueError(
            f"{type(self).__name__} does not define an initial point. Pass x0=..., give the layer start=..., or "
            f"define {type(self).__name__}.start(*context)."
        )

    @final  # type: ignore[misc]
    def forward(self, x: Any, *context: Any) -> Tensor:  # -> (B,)
        return self.evaluate(x, *encode(self, context))


def encode(energy: EnergyLike, context: tuple[Any, ...]) -> tuple[Any, ...]:
    """The code of an energy: the result of `Energy.encode` as a tuple, or the context of a plain callable."""
    if not isinstance(energy, Energy):
        return context
    code = energy.encode(*context)
    return code if type(code) is tuple else (code,)


def evaluate(energy: EnergyLike, x: Any, code: tuple[Any, ...]) -> Tensor:
    """The energy at ``x`` given its code."""
    return energy.evaluate(x, *code) if isinstance(energy, Energy) else energy(x, *code)


def gradient(energy: EnergyLike, x: Any, *context: Any) -> Any:
    """The gradient of an energy with respect to its variable, per sample.

    Example:
        >>> import torch
        >>> gradient(lambda x, z: 0.5 * (x - z).square().sum(-1), torch.ones(2, 3), torch.zeros(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        x: a tensor ``(B, ...)`` or a pytree of such.
        context: the energy's other arguments.

    Returns:
        Like ``x``; differentiable again under autograd and ``torch.func``.
    """
    with recording((x, context)) as (x, context):
        return gradient_of_sum(lambda x: energy(x, *context), x)
