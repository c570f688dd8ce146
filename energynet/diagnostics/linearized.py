"""A problem linearized at a point: what the measurements stand on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet._torch.autodiff import linearize, recording
from energynet._torch.tree import Layout
from energynet.energy import Energy
from energynet.engine.binding import Binding
from energynet.engine.loop import loop
from energynet.engine.validation import check_start, examine
from energynet.linear import ConjugateGradient, Dense
from energynet.solution import Solution, Status
from energynet.solvers import Picard, Solver
from energynet.solvers.problem import Linear
from energynet.solvers.spectrum import normalized
from energynet.step import GradientStep, Kind, Step, as_step, per_sample
from energynet.termination import Termination, l2_norm

StepLike = Step | Energy | Callable[..., Any]
"""A step, an `Energy` (taken as its gradient step), or a map g(x, \\*context). Wrap another energy in `GradientStep`."""

FEW = 50  # the number of unknowns up to which the whole Hessian is formed for the sake of accuracy


@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """The optimality condition F of a step, and A = ∂F/∂x at one point, on flat tensors."""

    step: Step  # the caller's
    layout: Layout
    x: Tensor  # (*batch, n)
    residual: Callable[[Tensor], Tensor]  # F
    product: Callable[[Tensor], Tensor]  # p -> A p

    @classmethod
    def of(cls, step: StepLike, x: Any, context: tuple[Any, ...], batch_dims: int) -> "Linearized":
        x = x.value if isinstance(x, Solution) else x
        step = GradientStep(step) if isinstance(step, Energy) else as_step(step)
        check_start(x)
        with recording((x, context)) as (x, context), torch.no_grad():
            binding = Binding.of(step)
            code = binding.step.encode(*context)
            layout = Layout.of(x, examine(binding, x, code, None if step.energy_of is not None else batch_dims).batch_dims)
            flat = layout.ravel(x).clone()

            def residual(x: Tensor) -> Tensor:
                return layout.ravel(binding.step.optimality(layout.unravel(x), *code)).to(x.dtype)

            return cls(step, layout, flat, residual, linearize(residual, flat, transposed=step.symmetric))

    @property
    def gamma(self) -> float | Tensor:
        """The step size γ of x − γ F(x), a float, 0-d or ``(B, 1)``."""
        gamma = per_sample(self.step.step_size, self.x.ndim)
        return gamma.detach() if isinstance(gamma, Tensor) else gamma

    @property
    def _default_solver(self) -> Solver:
        """The whole Hessian for few unknowns, since conjugate gradients stop early where variables are badly scaled."""
        if not self.step.symmetric:
            return Picard()
        return Dense() if self.x.shape[-1] <= FEW else ConjugateGradient()

    def newton(self, x: Tensor, solver: Solver | None) -> tuple[Tensor, Tensor]:
        """A⁻¹F(x), with A at this point, and the samples for which it failed, ``(*batch)``."""
        with recording(x) as x, torch.no_grad():
            return self.solve(self.residual(x), solver, Termination(max_steps=10_000))

    def solve(self, right: Tensor, solver: Solver | None, termination: Termination) -> tuple[Tensor, Tensor]:
        """A⁻¹ right, and the samples for which it failed, ``(*batch)``."""
        solver = solver or self._default_solver
        solver.check(Kind.SYMMETRIC if self.step.symmetric else Kind.LINEAR)
        with torch.no_grad():
            v = normalized(right)  # the squares of a tiny F would underflow
            gamma = None if self.step.step_size is None else self.gamma
            problem = Linear(
                lambda u: self.product(u) - v, lambda _: self.product, batch_dims=self.layout.batch_dims, step_size=gamma,
                right=v, start=v, symmetric=self.step.symmetric,
            )  # fmt: skip
            state = loop(problem, solver, termination, torch.zeros_like(v))
            return state.x * l2_norm(right).to(v.dtype).unsqueeze(-1), state.status != Status.CONVERGED
