"""`check_layer` tests whether the solution of a layer is well defined and whether its gradients are correct."""

import contextlib
import copy
import dataclasses
import pickle
from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.tree import Layout
from energynet.engine.adjoint import ImplicitAdjoint
from energynet.engine.root_gradient import Adjoint
from energynet.layer import FPI_GD, FPI_NN
from energynet.solution import ConvergenceError, Solution
from energynet.solvers import Picard
from energynet.termination import Termination
from energynet.testing.measure import (
    CheckError,
    Report,
    check_derivatives,
    check_independent,
    copied,
    equal,
    floating,
    largest,
    own_random_numbers,
    replaced,
)
from energynet.testing.subject import refuse

Layer = FPI_GD | FPI_NN
NOISE = 1e-11  # the relative accuracy of the float64 solves below
FLOOR = 1e8  # the required relative accuracy is lower for solutions below this multiple of the absolute tolerance


@dataclasses.dataclass(frozen=True, repr=False)
class LayerReport(Report):
    """The measurements of `check_layer`; all changes and errors are relative.

    Args:
        samples: B, or 0 for one problem without a batch dimension.
        steps: the largest number of updates of a sample with the layer's configuration.
        start_change: the change of the solution if the solve starts elsewhere.
        batch_leak: the change of the solution if the other samples change; None if there is only one sample.
        gradient_error: the error of the gradient compared with central differences.
        second_derivative_error: the error of the gradient's derivatives compared with central differences.
        adjoint_change: the change of the gradient if the backward fixed-point iteration computes it; None if that does not
            converge.
        vmap_change: the change of the solution under ``torch.func.vmap``; None if each sample has its own step size.
        float32_error: the error of a float32 solve.
        pickles: whether the layer can be pickled; a layer with a lambda cannot.
    """

    samples: int
    steps: int
    start_change: float
    batch_leak: float | None
    gradient_error: float
    second_derivative_error: float
    adjoint_change: float | None
    vmap_change: float | None
    float32_error: float
    pickles: bool


def check_layer(layer: Layer, *context: Any, x0: Any = None) -> LayerReport:
    """Check that a layer has a unique solution per sample, and correct gradients.

    ============================================================  =====================================================
    check                                                         content of the error message
    ============================================================  =====================================================
    it converges as configured, and tightly in float64            the message of the solve
    two calls agree                                               the difference
    parameters, attributes and context do not change              the changed ones
    a copy and an unpickled layer give the same result            the one that differs
    the solution does not depend on the start (1 % away)          the change
    a sample does not depend on the other samples                 the samples, the change and its cause
    gradients in context and parameters, and their derivatives,   both numbers, and the tensor
    agree with central differences
    the backward fixed-point iteration gives the same gradient    the difference
    ``torch.func.vmap`` over samples gives the same solutions     the difference
    float32 is within √ε of float64                               the error
    ============================================================  =====================================================

    Accuracy is measured on a float64 copy at a relative tolerance of 1e-12. An adjoint that is inexact by design, such as
    `OneStepAdjoint`, fails. If `Energy.encode` contains dropout, call ``eval()`` first.

    Example:
        >>> import torch
        >>> from energynet import FPI_GD
        >>> layer = FPI_GD(lambda x, z: torch.cosh(x - z).sum(-1) + x.square().sum(-1), 0.25, start=torch.zeros_like)
        >>> check_layer(layer, torch.ones(3, 2)).samples
        3

    Args:
        layer: an `FPI_GD` or `FPI_NN`.
        context: the arguments of the layer; choose B ≥ 3, different from the sizes of other dimensions.
        x0: the initial point; default: the layer's own start.

    Returns:
        `LayerReport`.

    Raises:
        CheckError: at the first check that fails.
    """
    with own_random_numbers():
        solution = _check_repeatable(layer, context, x0)
        pickles = _check_copies(layer, context, x0, solution.value)
        trial, change = Trial.of(layer, context, x0, solution)
        leak = trial.check_batch()
        gradient_error, second_error = trial.check_gradients()
        return LayerReport(
            trial.batch, int(solution.num_steps.max()), change, leak, gradient_error, second_error,
            trial.check_adjoint(), trial.check_vmap(), trial.check_float32(), pickles,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- as it is configured


def _solve(layer: Layer, context: tuple[Any, ...], x0: Any) -> Solution:
    return refuse(lambda: layer.solve(*context, x0=x0).raise_for_status())


def _attributes(layer: Layer) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in layer.named_modules()}


def _check_repeatable(layer: Layer, context: tuple[Any, ...], x0: Any) -> Solution:
    given = (dict(layer.named_parameters()), context, x0)
    before, attributes = copied(given), _attributes(layer)
    solution, again = _solve(layer, context, x0), _solve(layer, context, x0)
    if not equal(given, before):
        raise CheckError("A call changed the layer's parameters, its context or x0 in place. Use out-of-place operations.")
    if _attributes(layer) != attributes:
        new = {n: sorted(set(a) ^ set(attributes.get(n, []))) for n, a in _attributes(layer).items()}
        raise CheckError(
            f"A call added or removed attributes: { ({n: a for n, a in new.items() if a}) }. Likely cause: a result stored on "
            "the module. Return it instead; a layer that stores results cannot be shared between threads."
        )
    change = _change(_flat(again), _flat(solution))
    if not change <= 1e-6:
        raise CheckError(
            f"Two calls with the same arguments differ by {change:.2g} (relative). Likely cause: random numbers in Energy.encode "
            "or start, such as dropout in training mode. Call layer.eval() before this check."
        )
    return solution


def _check_copies(layer: Layer, context: tuple[Any, ...], x0: Any, value: Any) -> bool:
    """Check that copies give the same results; returns whether the layer can be pickled."""
    copies = {"deepcopy": copy.deepcopy(layer)}
    with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):  # Python cannot pickle a lambda
        copies["pickle"] = pickle.loads(pickle.dumps(layer))
    for name, other in copies.items():
        if not equal(_tree.leaves(_solve(other, context, x0).value), _tree.leaves(value)):
            raise CheckError(
                f"After {name} the layer gives another result. Likely cause: a tensor or state outside the module. Store it as a "
                "parameter or buffer."
            )
    return "pickle" in copies


def _flat(solution: Solution) -> Tensor:  # (*batch, n)
    return Layout.of(solution.value, solution.status.ndim).ravel(solution.value)


def _change(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the size of b; Inf if it is not finite."""
    return largest(a - b) / (largest(b) or 1.0)


# ------------------------------------------------------------------------------------------------- in float64


@dataclasses.dataclass(frozen=True)
class Trial:
    """A float64 copy of a layer that solves tightly, from a start near its solution ``(B, n)``."""

    layer: Layer
    context: tuple[Any, ...]
    x0: Any
    answer: Tensor
    slack: float
    """The factor by which limits are relaxed if the solution is so small that its relative error consists of rounding."""

    @classmethod
    def of(cls, layer: Layer, context: tuple[Any, ...], x0: Any, solution: Solution) -> tuple["Trial", float]:
        context = copied(context, torch.float64)
        tight, there, atol = _tightly(layer, context, copied(x0, torch.float64), solution)
        answer = _flat(there).detach()
        slack = max(1.0, FLOOR * atol / (largest(answer) or FLOOR * atol))
        start, again = _from_elsewhere(tight, context, there, answer)
        change = _change(again, answer) / slack
        if not change <= 1e-7:
            raise CheckError(
                f"The solution changes by {change:.2g} (relative) when the solve starts elsewhere, 1 % away. Likely cause: a "
                "flat direction, several minimizers, or a map that does not contract. Add a ridge in x, or bound the network's "
                "norm."
            )
        return cls(tight, context, start, answer, slack), change

    @property
    def batch(self) -> int:
        return self.answer.shape[0] if self.answer.ndim > 1 else 0

    @property
    def own_step_sizes(self) -> bool:
        """Whether γ is ``(B,)``."""
        step_size = getattr(self.layer, "step_size", None)
        return isinstance(step_size, Tensor) and step_size.ndim > 0

    def check_batch(self) -> float | None:
        inputs = (self.context, self.x0, self.layer.step_size if self.own_step_sizes else None)

        def function(inputs: Any) -> Tensor:
            context, x0, step_size = inputs
            layer = self.layer
            if self.own_step_sizes:
                layer = copy.deepcopy(layer)
                vars(layer).pop("step_size", None)
                layer._parameters.pop("step_size", None)
                layer._buffers["step_size"] = step_size.detach()
            return _flat(_solve(layer, context, x0)).detach()

        return check_independent(function, inputs, self.batch, 1e-7 * self.slack, "The solution")

    def inputs(self) -> dict[str, Tensor]:
        """The context and the parameters by name."""
        named = {f"context {k}": c for k, c in enumerate(self.context)}
        return floating({**named, **{f"parameter {n}": p for n, p in self.layer.named_parameters() if p.requires_grad}})

    def loss(self, values: list[Tensor]) -> Tensor:
        """A fixed scalar function of the solution."""
        old = list(self.inputs().values())
        parameters, context = replaced((dict(self.layer.named_parameters()), self.context), old, values)
        x = torch.func.functional_call(self.layer, parameters, context, {"x0": self.x0})
        flat = Layout.of(x, int(self.batch > 0)).ravel(x)
        weights = torch.linspace(-1, 1.5, flat.numel(), dtype=flat.dtype, device=flat.device).reshape(flat.shape)
        return (weights * flat + 0.5 * (flat - self.answer).square()).sum()

    def gradients(self) -> list[Tensor]:
        values = [t.detach().requires_grad_() for t in self.inputs().values()]
        return self._gradients(values, create_graph=False)

    def _gradients(self, values: list[Tensor], create_graph: bool) -> list[Tensor]:
        loss = self.loss(values)
        if not loss.requires_grad:
            return [torch.zeros_like(t) for t in values]
        found = torch.autograd.grad(loss, values, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(values, found)]

    def check_gradients(self) -> tuple[float, float]:
        inputs = self.inputs()
        weights = [torch.randn_like(t) for t in inputs.values()]

        def slope(values: list[Tensor]) -> Tensor:
            values = [t if t.requires_grad else t.detach().requires_grad_() for t in values]
            gradients = self._gradients(values, create_graph=True)
            return torch.stack([(w * g).sum() for w, g in zip(weights, gradients)]).sum()

        if not inputs:
            return 0.0, 0.0
        first = check_derivatives(self.loss, inputs, 1e-5, NOISE, "The gradient of a loss of the solution")
        return first, check_derivatives(slope, inputs, 1e-4, NOISE, "The second derivative of a loss of the solution")

    def check_adjoint(self) -> float | None:
        """Compare with the paper's backward iteration, if it converges."""
        expected = self.gradients()
        try:
            found = dataclasses.replace(self, layer=_with_adjoint(self.layer, ImplicitAdjoint(Picard()))).gradients()
        except ConvergenceError:
            return None
        change = max((_change(a, b) for a, b in zip(found, expected)), default=0.0)
        if not change <= 1e-6:
            raise CheckError(
                f"The layer's adjoint and the backward fixed-point iteration differ by {change:.2g} (relative) in a gradient. "
                "Likely cause: a wrong gradient of the energy (a custom backward), so that its Hessian is not symmetric, or a "
                "nearly singular problem. Run check_energy; add a ridge in x."
            )
        return change

    def check_vmap(self) -> float | None:
        if self.own_step_sizes:
            return None
        batch = self.batch

        def dim(t: Any) -> int | None:
            return 0 if isinstance(t, Tensor) and batch and t.shape[:1] == (batch,) else None

        def lane(context: tuple[Any, ...], x0: Any) -> Tensor:  # -> (n,)
            context, x0 = _tree.map_structure(lambda t, d: t if d is None else t.unsqueeze(0), (context, x0), dims)
            x = self.layer(*context, x0=x0)
            return Layout.of(x, int(batch > 0)).ravel(x).flatten()

        starts = self.x0 if batch else _tree.map_structure(lambda t: torch.stack([t, t]), self.x0)
        dims = (_tree.map_structure(dim, self.context), _tree.map_structure(dim, self.x0))
        in_dims = (dims[0], _tree.map_structure(lambda _: 0, self.x0))
        if not self.answer.numel():
            return 0.0
        try:
            change = _change(torch.func.vmap(lane, in_dims=in_dims)(self.context, starts), self.answer) / self.slack
        except (RuntimeError, ValueError) as error:
            raise CheckError(f"Under torch.func.vmap the layer raised {type(error).__name__}: {error} {_VMAP}") from error
        if not change <= 1e-7:
            raise CheckError(f"Under torch.func.vmap the solution changes by {change:.2g} (relative). {_VMAP}")
        return change

    def check_float32(self) -> float:
        """Solve as accurately as float32 permits; the status at this tolerance does not matter."""
        layer = _tightened(self.layer, torch.float32, 2 * self.layer.termination.max_steps)  # type: ignore[union-attr]
        layer.termination, layer.on_failure = Termination(atol=0.0, rtol=1e-6, max_steps=_budget(self)), "ignore"
        with torch.no_grad():
            found = _flat(layer.solve(*copied(self.context, torch.float32), x0=copied(self.x0, torch.float32)))
        error, limit = _change(found.double(), self.answer) / self.slack, float(torch.finfo(torch.float32).eps ** 0.5)
        if not error <= limit:
            raise CheckError(
                f"Solved in float32, the solution is wrong by {error:.2g} (relative; √ε is {limit:.1e}). Likely cause: a "
                "condition number above 1/√ε, or large terms that cancel. Scale the variables, add a ridge in x, or solve in "
                "float64."
            )
        return error


_VMAP = (
    "Likely cause: an operation without a batching rule, a value that Python reads (.item(), if), or a fixed shape. Use "
    "tensor operations (torch.where), and take shapes from x."
)


def _budget(trial: Trial) -> int:
    """The number of steps for the float32 solve: slightly more than the float64 solve needs."""
    return int(_solve(trial.layer, trial.context, trial.x0).num_steps.max()) + 10


def _with_adjoint(layer: Layer, adjoint: Adjoint) -> Layer:
    other = copy.deepcopy(layer)
    other.adjoint = adjoint
    return other


def _from_elsewhere(layer: Layer, context: tuple[Any, ...], there: Solution, answer: Tensor) -> tuple[Any, Tensor]:
    """A start 1 % away from the solution, and the solution from there; with relative steps if others leave the domain."""
    way = 0.01 * torch.randn_like(answer)
    layout = Layout.of(there.value, there.status.ndim)
    with contextlib.suppress(CheckError):
        start = layout.unravel(answer + way * (1 + answer.abs()))
        return start, _flat(_solve(layer, context, start))
    start = layout.unravel(answer + way * answer.abs())
    return start, _flat(_solve(layer, context, start))


def _tightly(layer: Layer, context: tuple[Any, ...], x0: Any, solution: Solution) -> tuple[Layer, Solution, float]:
    """A float64 copy with a tolerance proportional to the solution or, if that fails, 1e-12; its result; the tolerance."""
    tight = _tightened(layer, torch.float64, 20 * int(solution.num_steps.max()) + 1000)
    sized = 1e-12 * min(1.0, largest(_flat(solution)) or 1.0)
    tight.termination = dataclasses.replace(tight.termination, atol=sized)  # type: ignore[type-var]
    with contextlib.suppress(CheckError):
        return tight, _solve(tight, context, x0), sized
    tight.termination = dataclasses.replace(tight.termination, atol=1e-12)  # type: ignore[type-var]
    return tight, _solve(tight, context, x0), 1e-12


def _tightened(layer: Layer, dtype: torch.dtype, max_steps: int) -> Layer:
    adjoint = layer.adjoint
    if isinstance(adjoint, ImplicitAdjoint):
        adjoint = dataclasses.replace(adjoint, termination=None, report=None)
    tight = _with_adjoint(layer, adjoint or ImplicitAdjoint()).to(dtype)
    tight.termination = Termination(atol=1e-12, rtol=1e-12, max_steps=max_steps)
    tight.on_failure = "raise"
    return tight
