"""Nonsmooth terms by their proximal maps, and the gradient step that takes them into account."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import gradient_of_sum
from energynet.energy import EnergyLike, encode, evaluate
from energynet.step import Kind, Step, per_sample


class Prox(ABC):
    """The proximal map of a term h that is added to the energy: prox(x, γ) = argmin_u h(u) + ‖u − x‖² / 2γ.

    For the indicator function of a set, this is the projection onto the set. `energynet.constraints` has ready-made ones. If
    the bounds are part of the context, override `encode` to select this part.

    Example:
        >>> import torch
        >>> class AtMost(Prox):
        ...     def encode(self, z, upper):               # of the same context as the energy's
        ...         return (upper,)
        ...     def __call__(self, x, step_size, upper):  # (B, n), γ, (B, n)
        ...         return torch.minimum(x, upper)
        >>> step = ProximalStep(lambda x, z, upper: 0.5 * (x - z).square().sum(-1), 1.0, AtMost())
        >>> step(torch.zeros(1, 2), torch.tensor([[1.0, 5.0]]), torch.full((1, 2), 3.0))
        tensor([[1., 3.]])
    """

    is_box: ClassVar[bool] = False
    """Whether it projects each element onto an interval, independently of γ. Its values at −∞ and ∞ are the bounds."""

    def encode(self, *context: Any) -> tuple[Any, ...]:
        """The values that do not depend on ``x``, computed once per solve and passed to each call."""
        return ()

    @abstractmethod
    def __call__(self, x: Any, step_size: float | Tensor, *code: Any) -> Any:
        """The proximal map, like ``x``; ``step_size`` is γ, a float, a 0-d tensor or ``(B,)``."""


def check_prox(prox: Any) -> None:
    """Raise an error if the value is not a proximal map, and suggest what was meant.

    Raises:
        TypeError: with the remedy.
    """
    if isinstance(prox, type):
        raise TypeError(f"prox must be an instance, got the class {prox.__name__}. Did you mean {prox.__name__}(...)?")
    if callable(prox):
        return
    if isinstance(prox, (int, float, Tensor)):
        hint = "A lower bound is Box(lower), or NonNegative() where it is 0; a weight of ‖x‖₁ is L1(weight)."
    elif isinstance(prox, (tuple, list)) and len(prox) == 2:
        shown = ", ".join(repr(v) if isinstance(v, (int, float)) else name for v, name in zip(prox, ("lower", "upper")))
        hint = f"Did you mean Box({shown})?"
    else:
        hint = "Ready-made ones are in energynet.constraints, such as Box(0.0, 1.0)."
    seen = f"a tensor of shape {tuple(prox.shape)}" if isinstance(prox, Tensor) else repr(prox)
    raise TypeError(f"prox must be a Prox or a callable (x, step_size) -> like x, got {seen}. {hint}")


@dataclasses.dataclass(frozen=True)
class ProximalStep(Step):
    """A gradient step followed by the proximal map of a nonsmooth term: prox(x − γ ∇E(x), γ), to minimize E + h.

    F(x) = (x − g(x)) / γ is the prox-gradient mapping: it is ∇E where h has no effect, and zero at the minimum. Like
    `GradientStep`, the step contracts for 0 < γ < 2/L.

    Example:
        >>> import torch
        >>> nonnegative = lambda x, step_size: x.relu()
        >>> step = ProximalStep(lambda x, z: 0.5 * (x - z).square().sum(-1), 1.0, nonnegative)
        >>> step(torch.zeros(1, 2), torch.tensor([[2.0, -3.0]]))
        tensor([[2., 0.]])

    Args:
        energy: the smooth part, E(x, \\*context) -> ``(B,)``.
        step_size: γ, a float, a 0-d tensor or one value per sample ``(B,)``; None if it is unknown.
        prox: a `Prox`, or any callable (x, γ) -> like x.
        guessed: whether solvers may reduce γ if it turns out to be too large, as they do if `minimize` is given none.

    Raises:
        TypeError: if the prox is not callable, or a class instead of an instance.
        ValueError: when evaluated without a step size, or if the prox returns shapes other than those of ``x``.

    Source: Combettes and Wajs (2005), Signal recovery by proximal forward-backward splitting.
    """

    energy: EnergyLike
    step_size: float | Tensor | None = dataclasses.field()  # without a default, unlike in the base class
    prox: Prox | Callable[[Any, float | Tensor], Any]
    guessed: bool = dataclasses.field(default=False, kw_only=True)
    normalized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_prox(self.prox)

    @property
    def kind(self) -> Kind:
        return Kind.BOUNDED if isinstance(self.prox, Prox) and self.prox.is_box else Kind.MAP

    @property
    def energy_of(self) -> EnergyLike:
        return self.energy

    def begin(self, x: Any, prox_code: tuple[Any, ...], *code: Any) -> Any:
        """The nearest point within the bounds, because the energy may be undefined outside."""
        return dataclasses.replace(self, step_size=1.0).land(x, prox_code) if self.kind is Kind.BOUNDED else x

    def encode(self, *context: Any) -> tuple[Any, ...]:
        code = self.prox.encode(*context) if isinstance(self.prox, Prox) else ()
        return (code if type(code) is tuple else (code,), *encode(self.energy, context))

    def probe(self, x: Any, prox_code: tuple[Any, ...], *code: Any) -> Tensor:
        if self.step_size is not None:
            self._proximal(x, x, prox_code)
        return evaluate(self.energy, x, code)

    def optimality(self, x: Any, prox_code: tuple[Any, ...], *code: Any) -> Any:
        moved = self._moved(x, prox_code, code)
        return _tree.map_structure(lambda x, g: (x - g) / per_sample(self._gamma, x.ndim), x, moved)

    def __call__(self, x: Any, *context: Any) -> Any:
        """One step from ``x``, computed without F, because rounding in x − γ F(x) would leave the set."""
        prox_code, *code = self.encode(*context)
        return self._moved(x, prox_code, tuple(code))

    def land(self, target: Any, prox_code: tuple[Any, ...], *code: Any) -> Any:
        """The end point of a step whose gradient part ends at ``target``."""
        return self._proximal(target, target, prox_code)

    @property
    def _gamma(self) -> float | Tensor:
        if self.step_size is None:
            raise ValueError("ProximalStep has no step_size, and its optimality condition needs one: pass γ, at most 2/L.")
        return self.step_size

    def _moved(self, x: Any, prox_code: tuple[Any, ...], code: tuple[Any, ...]) -> Any:
        slope = gradient_of_sum(lambda x: evaluate(self.energy, x, code), x)
        target = _tree.map_structure(lambda x, s: x - per_sample(self._gamma, x.ndim) * s, x, slope)
        return self._proximal(target, x, prox_code)

    def _proximal(self, target: Any, like: Any, prox_code: tuple[Any, ...]) -> Any:
        result = self.prox(target, self._gamma, *prox_code)
        (found, spec), (expected, expected_spec) = _tree.flatten(result), _tree.flatten(like)
        if spec != expected_spec or any(not isinstance(t, Tensor) or t.shape != s.shape for t, s in zip(found, expected)):
            seen = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in found]
            raise ValueError(
                f"{self.prox} must return the structure and shapes of x, {[tuple(t.shape) for t in expected]}, but returned "
                f"{seen}. Likely cause: a bound, radius or weight that is larger than x; it must broadcast to x."
            )
        return result
