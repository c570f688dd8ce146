"""Steps: maps whose fixed point is the solution, each with the condition that holds there.

Every step has the form g(x) = x − γ F(x). F is its *optimality condition*: it is zero at the solution and does not depend on
step size and damping. Residuals are values of F, and the implicit function theorem differentiates it.
"""

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import gradient_of_sum
from energynet._torch.numbers import check_function, check_number
from energynet.energy import EnergyLike, encode, evaluate


class Kind(enum.Enum):
    """The kinds of problems; the value is the name that error messages use.

    Example:
        >>> GradientStep(lambda x: x.square().sum(-1)).kind.value
        'the minimum of a smooth energy'
    """

    MAP = "a fixed point x = g(x) of a general map"
    ENERGY = "the minimum of a smooth energy"
    BOUNDED = "the minimum of a smooth energy within bounds"
    LINEAR = "a linear equation with a general matrix (the adjoint of a map)"
    SYMMETRIC = "a linear equation with a symmetric matrix (the adjoint of an energy)"


class Step(ABC):
    """A map x → g(x, \\*context) = x − γ F(x, \\*context) whose fixed point is the solution."""

    symmetric: ClassVar[bool] = False
    """Whether ∂F/∂x is symmetric, so that conjugate gradients can solve the adjoint equation."""
    normalized: ClassVar[bool] = True
    """Whether F has the units of ``x``, like x − g(x); otherwise residuals are divided by a derivative of F."""
    step_size: float | Tensor | None = 1.0
    """γ; None if it is unknown, so that solvers that need it have to estimate it."""
    guessed: bool = False
    """Whether γ is an estimate that a solver may find to be too large."""

    @abstractmethod
    def optimality(self, x: Any, *code: Any) -> Any:
        """F(x), like ``x``: zero at the solution."""

    def encode(self, *context: Any) -> tuple[Any, ...]:
        """The values that do not depend on ``x``, computed once per solve."""
        return context

    def probe(self, x: Any, *code: Any) -> Any:
        """Evaluate the user's own function; it is called once before a solve for examination."""
        return self.optimality(x, *code)

    @property
    def kind(self) -> Kind:
        """The kind of problem."""
        return Kind.MAP

    def begin(self, x: Any, *code: Any) -> Any:
        """The initial point of a solve that was given ``x``."""
        return x

    @property
    def energy_of(self) -> EnergyLike | None:
        """The energy whose gradient the step uses; None if there is none."""
        return None

    def __call__(self, x: Any, *context: Any) -> Any:
        """One step from ``x``."""
        residual = self.optimality(x, *self.encode(*context))
        return _tree.map_structure(lambda x, r: x - per_sample(self.step_size, x.ndim) * r, x, residual)


@dataclasses.dataclass(frozen=True)
class MapStep(Step):
    """A function or network g(x, \\*context) -> like x that is iterated directly; F(x) = x − g(x).

    Example:
        >>> import torch
        >>> MapStep(lambda x, z: 0.5 * x + z)(torch.ones(2, 1), torch.ones(2, 1)).flatten()
        tensor([1.5000, 1.5000])

    Args:
        network: a contraction in its first argument.

    Raises:
        TypeError: if it is not given a function.

    Source: arXiv 2002.02868, FPI_NN.
    """

    network: Callable[..., Any]

    def __post_init__(self) -> None:
        check_function(self.network, "the network of a MapStep")

    def probe(self, x: Any, *code: Any) -> Any:
        return self.network(x, *code)

    def optimality(self, x: Any, *code: Any) -> Any:
        return _tree.map_structure(torch.sub, x, self.network(x, *code))


@dataclasses.dataclass(frozen=True)
class GradientStep(Step):
    """One gradient step on an energy, x − γ ∇E(x); F(x) = ∇E(x).

    It contracts for 0 < γ < 2/L where the Hessian of E lies in [μ, L], μ > 0; γ = 2/(L + μ) is the best constant.

    Example:
        >>> import torch
        >>> step = GradientStep(lambda x, z: 0.5 * (x - z).square().sum(-1), step_size=0.5)
        >>> step(torch.zeros(2, 1), torch.ones(2, 1)).flatten()
        tensor([0.5000, 0.5000])

    Args:
        energy: E(x, \\*context) -> ``(B,)``.
        step_size: γ, a float, a 0-d tensor or one value per sample ``(B,)``; None: a solver that needs it estimates it.

    Raises:
        TypeError: if it is not given a function.

    Source: arXiv 2002.02868, FPI_GD.
    """

    energy: EnergyLike
    step_size: float | Tensor | None = None
    symmetric: ClassVar[bool] = True
    normalized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_function(self.energy, "the energy of a GradientStep")

    @property
    def guessed(self) -> bool:  # type: ignore[override]
        return self.step_size is None

    @property
    def kind(self) -> Kind:
        return Kind.ENERGY

    def encode(self, *context: Any) -> tuple[Any, ...]:
        return encode(self.energy, context)

    def probe(self, x: Any, *code: Any) -> Tensor:
        return evaluate(self.energy, x, code)

    @property
    def energy_of(self) -> EnergyLike:
        return self.energy

    def optimality(self, x: Any, *code: Any) -> Any:
        return gradient_of_sum(lambda x: evaluate(self.energy, x, code), x)


@dataclasses.dataclass(frozen=True)
class DampedStep(Step):
    """A damped step, (1 − d) x + d g(x): it has the same fixed points and converges more often.

    Example:
        >>> import torch
        >>> DampedStep(MapStep(lambda x: -x), damping=0.5)(torch.ones(1, 1))
        tensor([[0.]])

    Args:
        step: the step to damp; a plain callable is treated as a `MapStep`.
        damping: d, in (0, 1].

    Raises:
        ValueError: if d is not in (0, 1].
    """

    step: Step
    damping: float

    def __post_init__(self) -> None:
        check_number(self, "damping", "in (0, 1], the fraction of the step that is taken", lambda v: 0 < v <= 1)
        object.__setattr__(self, "step", as_step(self.step))

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.step.symmetric

    @property
    def normalized(self) -> bool:  # type: ignore[override]
        return self.step.normalized

    @property
    def kind(self) -> Kind:
        return self.step.kind

    @property
    def guessed(self) -> bool:  # type: ignore[override]
        return self.step.guessed

    @property
    def step_size(self) -> float | Tensor | None:  # type: ignore[override]
        return None if self.step.step_size is None else self.damping * self.step.step_size

    @property
    def energy_of(self) -> EnergyLike | None:
        return self.step.energy_of

    def encode(self, *context: Any) -> tuple[Any, ...]:
        return self.step.encode(*context)

    def probe(self, x: Any, *code: Any) -> Any:
        return self.step.probe(x, *code)

    def optimality(self, x: Any, *code: Any) -> Any:
        return self.step.optimality(x, *code)


@dataclasses.dataclass(frozen=True)
class OptimalityStep(Step):
    """Only an optimality condition, F(x, \\*context) = 0, for the solution of an external solver.

    Example:
        >>> import torch
        >>> OptimalityStep(lambda x, z: x**3 - z).optimality(torch.full((1,), 2.0), torch.full((1,), 8.0))
        tensor([0.])

    Args:
        condition: F(x, \\*context) -> like x.
        symmetric: whether ∂F/∂x is symmetric, as it is if F is a gradient.

    Raises:
        TypeError: if it is not given a function.
    """

    condition: Callable[..., Any]
    symmetric: bool = False  # type: ignore[misc]
    normalized: ClassVar[bool] = False
    step_size: ClassVar[None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_function(self.condition, "the condition of an OptimalityStep")

    def optimality(self, x: Any, *code: Any) -> Any:
        return self.condition(x, *code)


def as_step(step: Step | Callable[..., Any]) -> Step:
    """A plain function or network as a step."""
    return step if isinstance(step, Step) else MapStep(step)


def per_sample(value: float | Tensor | None, ndim: int) -> float | Tensor:
    """A float, 0-d or ``(B,)`` value as a factor that broadcasts over a batch with ``ndim`` dimensions in total."""
    if value is None:
        raise ValueError("This step has no step_size, so it is not a map. Give it one, such as GradientStep(energy, 0.1).")
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value.reshape(value.shape[0], *[1] * (ndim - 1))
