"""The layers `FPI_GD` and `FPI_NN`, which store configuration but no results."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from energynet._torch import tree as _tree
from energynet._torch.numbers import check_function
from energynet.energy import Energy, EnergyLike
from energynet.engine.driver import Driver
from energynet.engine.held import Held
from energynet.engine.options import check_batch_dims, check_start, check_step_size
from energynet.engine.purity import unchanged
from energynet.engine.root_gradient import Adjoint
from energynet.engine.validation import check_options
from energynet.proximal import Prox, check_prox
from energynet.solution import OnFailure, Solution
from energynet.solve import fixed_point, minimize
from energynet.solvers import Picard, Solver
from energynet.step import Step
from energynet.termination import Termination

Start = Tensor | Callable[..., Any] | dict[str, Any] | tuple[Any, ...] | list[Any]
"""A tensor, a pytree of tensors, or a callable of the context."""


class _Layer(nn.Module, ABC):
    """The base class of both layers: it stores the configuration, and a call returns the value of a solve."""

    start: Any

    def _configure(self, solver: Solver | None, termination: Termination | None, adjoint: Adjoint | None,
                   on_failure: OnFailure, driver: Driver | None) -> None:  # fmt: skip
        check_options(solver, termination, adjoint, on_failure, driver)
        self.solver: Solver = Picard() if solver is None else solver
        self.termination, self.adjoint, self.on_failure = termination, adjoint, on_failure
        self.driver = driver

    def _register(self, name: str, value: Any) -> None:
        """Set an attribute; parameters inside a step, prox, bound method or callable object become the layer's own."""
        setattr(self, name, value)
        if not isinstance(value, nn.Module) and (held := Held(value)):
            setattr(self, f"held_{name}", held)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "_Layer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in [n.removeprefix("held_") for n in self._modules if n.startswith("held_")]:
            setattr(self, name, self._now(name))
        return self

    def _now(self, name: str) -> Any:
        """The value that was registered under a name, with the layer's current tensors."""
        held = getattr(self, f"held_{name}", None)
        return getattr(self, name) if held is None else held.value()

    @abstractmethod
    def solve(self, *context: Any, x0: Any = None, trace: bool = False) -> Solution:
        """Return the `Solution`, with the value, status, error and number of steps per sample."""

    def forward(self, *context: Any, x0: Any = None) -> Any:  # -> like x0
        return self.solve(*context, x0=x0).value

    def _typed(self, *arguments: str) -> str:
        """The constructor call of this layer, with its solver, as far as it can be printed."""
        options = {name: getattr(self, name) for name in ("start", "solver", "termination", "adjoint", "driver")}
        shown = {name: _value(value) for name, value in options.items() if value is not None}
        if self.on_failure != "raise":
            shown["on_failure"] = repr(self.on_failure)
        return f"{type(self).__name__}({', '.join([*arguments, *(f'{name}={value}' for name, value in shown.items())])})"


class FPI_GD(_Layer):
    """A layer that returns the minimizer of an energy, by iterating a gradient step to its fixed point.

    Example:
        >>> import torch
        >>> layer = FPI_GD(lambda x, z: 0.5 * (x - z).square().sum(-1), step_size=0.5, start=torch.zeros_like)
        >>> layer(torch.ones(2, 3)).shape
        torch.Size([2, 3])

    Args:
        energy: E(x, \\*context) -> ``(B,)``, an `Energy`, a module or any callable.
        step_size: γ, a float, a 0-d tensor or one value per sample ``(B,)``. A `torch.nn.Parameter` is registered, and a
            tensor becomes a buffer. None: it is estimated per sample, and halved if it turns out to be too large.
        prox: the proximal map of constraints and nonsmooth terms, as for `minimize`.
        start: the initial point when a call passes no ``x0``: a tensor, a pytree or a callable of the context, such as a
            network that predicts the solution (it gets no gradient, since the solution does not depend on it); default:
            ``energy.start``.
        solver: default `Picard`, which takes gradient steps; `LBFGS` and others need fewer evaluations.
        termination: default `Termination`.
        adjoint: default `ImplicitAdjoint`, by conjugate gradients; ``ImplicitAdjoint(Picard())`` is the paper's backward
            fixed-point iteration.
        on_failure: what to do about samples that do not converge: "raise", "warn" or "ignore".
        driver: runs the loop: `Eager`, the default, in Python, or `Compiled`, as a program compiled at the first call.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem; None follows the energy.

    Raises:
        TypeError, ValueError: if an option has the wrong type or value.

    Source: arXiv 2002.02868, FPI_GD.
    """

    step_size: float | Tensor | None

    def __init__(
        self,
        energy: EnergyLike,
        step_size: float | Tensor | None = None,
        *,
        prox: Prox | Callable[[Any, float | Tensor], Any] | None = None,
        start: Start | None = None,
        solver: Solver | None = None,
        termination: Termination | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "raise",
        driver: Driver | None = None,
        batch_dims: int | None = None,
    ) -> None:
        super().__init__()
        check_function(energy, "energy")
        check_step_size(step_size)
        check_start(start)
        check_batch_dims(batch_dims, optional=True)
        self.batch_dims = batch_dims
        if prox is not None:
            check_prox(prox)
        self._register("energy", energy)
        self._register("prox", prox)
        _hold(self, "step_size", step_size)
        _hold(self, "start", start)
        self._configure(solver, termination, adjoint, on_failure, driver)

    def solve(self, *context: Any, x0: Any = None, trace: bool = False) -> Solution:
        """Return the minimizer with the status, error and number of steps per sample.

        Args:
            context: the energy's other arguments.
            x0: the initial point; if the energy has only one minimizer, the solution does not depend on it.
            trace: whether to store residuals, energies and iterates of every step in ``Solution.trace``.
        """
        if x0 is None:
            default = self.energy.start if isinstance(self.energy, Energy) else None
            x0 = _start(self._now("start"), default, context, self)
        return minimize(
            self._now("energy"), x0, *context, step_size=self.step_size, prox=self._now("prox"), solver=self.solver,
            termination=self.termination, adjoint=self.adjoint, on_failure=self.on_failure, trace=trace,
            driver=self.driver, batch_dims=self.batch_dims,
        )  # fmt: skip

    def __repr__(self) -> str:
        given = {"step_size": self.step_size, "prox": self.prox, "batch_dims": self.batch_dims}
        return self._typed(_value(self.energy), *(f"{name}={_value(v)}" for name, v in given.items() if v is not None))


class FPI_NN(_Layer):
    """A layer that returns the fixed point of a network, x = g(x, \\*context).

    Example:
        >>> import torch
        >>> class Cell(torch.nn.Module):
        ...     def forward(self, x, z):
        ...         return 0.5 * torch.tanh(x) + z
        >>> layer = FPI_NN(Cell(), start=torch.zeros_like)
        >>> layer(torch.ones(2, 3)).shape
        torch.Size([2, 3])

    Args:
        network: g(x, \\*context) -> like x, a contraction in x; a module, any callable, or a `Step`.
        start: the initial point when a call passes no ``x0``: a tensor, a pytree or a callable of the context.
        batch_dims: 1 if the leading dimension of x counts samples, 0 if there is one problem.
        solver: default `Picard`.
        termination: default `Termination`.
        adjoint: default `ImplicitAdjoint`, by the backward fixed-point iteration.
        on_failure: what to do about samples that do not converge: "raise", "warn" or "ignore".
        driver: runs the loop: `Eager`, the default, in Python, or `Compiled`, as a program compiled at the first call.

    Raises:
        TypeError, ValueError: if an option has the wrong type or value.

    Source: arXiv 2002.02868, FPI_NN.
    """

    def __init__(
        self,
        network: Step | Callable[..., Any],
        *,
        start: Start | None = None,
        batch_dims: int = 1,
        solver: Solver | None = None,
        termination: Termination | None = None,
        adjoint: Adjoint | None = None,
        on_failure: OnFailure = "raise",
        driver: Driver | None = None,
    ) -> None:
        super().__init__()
        check_function(network, "network")
        check_start(start)
        check_batch_dims(batch_dims)
        self._register("network", network)
        _hold(self, "start", start)
        self.batch_dims = batch_dims
        self._configure(solver, termination, adjoint, on_failure, driver)

    def solve(self, *context: Any, x0: Any = None, trace: bool = False) -> Solution:
        """Return the fixed point with the status, error and number of steps per sample.

        Args:
            context: the network's other arguments.
            x0: the initial point; if the network is a contraction, the solution does not depend on it.
            trace: whether to store residuals and iterates of every step in ``Solution.trace``.
        """
        if x0 is None:
            x0 = _start(self._now("start"), None, context, self)
        return fixed_point(
            self._now("network"), x0, *context, batch_dims=self.batch_dims, solver=self.solver, termination=self.termination,
            adjoint=self.adjoint, on_failure=self.on_failure, trace=trace,
            driver=self.driver,
        )  # fmt: skip

    def __repr__(self) -> str:
        return self._typed(_value(self.network), *([f"batch_dims={self.batch_dims}"] if self.batch_dims != 1 else []))


class _Held(nn.Module):
    """A pytree of tensors that moves with the module that contains it."""

    def __init__(self, tree: Any) -> None:
        super().__init__()
        leaves, spec = _tree.flatten(tree)
        self.shown = repr(_tree.map_structure(_Shape, tree))
        for k, leaf in enumerate(leaves):
            self.register_buffer(str(k), leaf)
        self.names = _tree.unflatten([str(k) for k in range(len(leaves))], spec)

    def forward(self, *_: Any) -> Any:
        return _tree.map_structure(self.get_buffer, self.names)

    def __repr__(self) -> str:
        return self.shown


class _Shape:
    """An object that prints as a tensor's shape."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tuple(tensor.shape)

    def __repr__(self) -> str:
        return f"Tensor{self.shape}"


class _Starts(Protocol):
    def __call__(self, *context: Any) -> Any: ...


def _hold(module: "_Layer", name: str, value: Any) -> None:
    """Store a tensor as a buffer and a pytree as a module of buffers; register parameters, modules and numbers directly."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        module.register_buffer(name, value)
    elif isinstance(value, (dict, tuple, list)):
        setattr(module, name, _Held(value))
    else:
        module._register(name, value)


def _start(start: Start | None, default: _Starts | None, context: tuple[Any, ...], layer: nn.Module) -> Any:
    if start is None and default is None:
        raise ValueError(
            f"{type(layer).__name__} was given no x0 and no start. Call it with x0=..., or construct it with start=..., a tensor "
            "or a callable of the context such as torch.zeros_like."
        )
    if start is None:
        assert default is not None
        start = default
    with unchanged(f"start of {type(layer).__name__}", context):
        return start(*context) if callable(start) else start


def _value(value: Any) -> str:
    """The text for a value: the shape of a tensor, the name of a function, the repr of anything else."""
    if isinstance(value, Tensor):
        return repr(_Shape(value))
    return repr(value) if isinstance(value, nn.Module) else getattr(value, "__name__", None) or repr(value)
