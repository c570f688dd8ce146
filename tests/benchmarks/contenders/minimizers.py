"""Who finds a minimum of given accuracy, by whatever way: of W5."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from energynet import LBFGS, Compiled, Driver, Eager, Solver, Termination, minimize

from ..ops import TORCH, jax_ops
from ..work import Problem
from .jax_based import arrays

MOST_STEPS = 20_000


class Minimizer(ABC):
    """A solver with a tolerance of its own kind."""

    name: str
    peer: bool = True

    @abstractmethod
    def call(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        """What is timed."""

    def trial(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        """The same, to find a tolerance with: no compilation for each."""
        return self.call(problem, tolerance)

    @abstractmethod
    def evaluations(self, problem: Problem, tolerance: float) -> tuple[int, int]:
        """How often the energy's gradient was evaluated, and how many products with its Hessian were taken."""

    def tensor(self, result: Any) -> Tensor:
        """x*, from what the call returned."""
        found: Tensor = result
        return found


class Ours(Minimizer):
    """energynet's `minimize` with a solver and a driver."""

    peer = False

    def __init__(self, solver: Solver, driver: Driver) -> None:
        self.solver, self.driver = solver, driver
        memory = f"({solver.memory})" if isinstance(solver, LBFGS) else ""
        self.name = f"energynet {type(solver).__name__}{memory}, {'compiled' if isinstance(driver, Compiled) else 'eager'}"

    def call(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        return lambda: self._solve(problem.energy, problem, tolerance, self.driver)

    def trial(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        return lambda: self._solve(problem.energy, problem, tolerance, Eager())

    def evaluations(self, problem: Problem, tolerance: float) -> tuple[int, int]:
        """Both drivers run the same algorithm; only in the eager one an evaluation is seen."""
        tally = Tally()
        self._solve(lambda x, *inputs: problem.energy(_Seen.apply(x, tally), *inputs), problem, tolerance, Eager())
        return tally.backward - tally.twice, tally.twice

    def _solve(self, energy: Callable[..., Tensor], problem: Problem, tolerance: float, driver: Driver) -> Tensor:
        termination = Termination(atol=0.0, rtol=tolerance, max_steps=MOST_STEPS)
        found = minimize(energy, problem.x0, *problem.inputs, solver=self.solver, termination=termination,
                         on_failure="ignore", driver=driver)  # fmt: skip
        value: Tensor = found.value
        return value


class Tally:
    """How often backpropagation passed x: once for a gradient, and once more, twice over, for a Hessian product."""

    def __init__(self) -> None:
        self.backward = self.twice = 0


class _Seen(torch.autograd.Function):
    """The identity, which counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tally: Tally) -> Tensor:
        ctx.tally = tally
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        ctx.tally.backward += 1
        return _SeenTwice.apply(v, ctx.tally), None


class _SeenTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, tally: Tally) -> Tensor:
        ctx.tally = tally
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        ctx.tally.twice += 1
        return u, None


class SciPy(Minimizer):
    """L-BFGS-B, with gradients by PyTorch or by hand."""

    def __init__(self, by_hand: bool) -> None:
        self.by_hand = by_hand
        self.name = f"SciPy L-BFGS-B, gradient {'by hand' if by_hand else 'by autograd'}"

    def call(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        return lambda: self._solve(problem, tolerance)

    def tensor(self, result: Any) -> Tensor:
        return torch.from_numpy(result.x)

    def evaluations(self, problem: Problem, tolerance: float) -> tuple[int, int]:
        return int(self._solve(problem, tolerance).nfev), 0

    def _solve(self, problem: Problem, tolerance: float) -> Any:
        import scipy.optimize

        options = {"gtol": tolerance, "ftol": 0.0, "maxiter": MOST_STEPS, "maxfun": MOST_STEPS, "maxcor": 10}
        code = problem.code()

        def autograd(x: Any) -> tuple[float, Any]:
            leaf = torch.from_numpy(x).requires_grad_()
            energy = problem.energy(leaf, *problem.inputs)
            return float(energy), torch.autograd.grad(energy, leaf)[0].numpy()

        def by_hand(x: Any) -> tuple[float, Any]:
            leaf = torch.from_numpy(x)
            return float(problem.formula.evaluate(TORCH, leaf, *code)), problem.formula.gradient(leaf, *code).numpy()

        function = by_hand if self.by_hand else autograd
        return scipy.optimize.minimize(function, problem.x0.numpy(), jac=True, method="L-BFGS-B", options=options)


class SciPyNewtonCG(Minimizer):
    """Its Newton's method in a trust region, by conjugate gradients, with derivatives by hand: a peer of the second order."""

    name = "SciPy trust-ncg, derivatives by hand"

    def call(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        return lambda: self._solve(problem, tolerance)[0]

    def tensor(self, result: Any) -> Tensor:
        return torch.from_numpy(result.x)

    def evaluations(self, problem: Problem, tolerance: float) -> tuple[int, int]:
        found, products = self._solve(problem, tolerance)
        return int(found.njev), products

    def _solve(self, problem: Problem, tolerance: float) -> tuple[Any, int]:
        import scipy.optimize

        code, formula, products = problem.code(), problem.formula, 0

        def function(x: Any) -> tuple[float, Any]:
            leaf = torch.from_numpy(x)
            return float(formula.evaluate(TORCH, leaf, *code)), formula.gradient(leaf, *code).numpy()

        def product(x: Any, p: Any) -> Any:
            nonlocal products
            products += 1
            return formula.curvature(torch.from_numpy(x), *code)(torch.from_numpy(p)).numpy()

        options = {"gtol": tolerance, "maxiter": MOST_STEPS}
        found = scipy.optimize.minimize(
            function, problem.x0.numpy(), jac=True, hessp=product, method="trust-ncg", options=options
        )  # fmt: skip
        return found, products


class TorchLBFGS(Minimizer):
    """``torch.optim.LBFGS`` with its strong-Wolfe line search."""

    name = "torch.optim.LBFGS"

    def call(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        return lambda: self._solve(problem, tolerance)[0]

    def evaluations(self, problem: Problem, tolerance: float) -> tuple[int, int]:
        return self._solve(problem, tolerance)[1], 0

    def _solve(self, problem: Problem, tolerance: float) -> tuple[Tensor, int]:
        x, count = problem.x0.clone().requires_grad_(), 0
        optimizer = torch.optim.LBFGS(
            [x], max_iter=MOST_STEPS, history_size=10, tolerance_grad=tolerance, tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            nonlocal count
            count += 1
            optimizer.zero_grad()
            energy = problem.energy(x, *problem.inputs)
            energy.backward()
            return energy

        optimizer.step(closure)
        return x.detach(), count


class _Jax(Minimizer):
    """Compiled as a whole."""

    @abstractmethod
    def solve(self, energy: Callable[..., Any], x0: Any, inputs: Any, tolerance: float) -> tuple[Any, Any]:
        """x*, and how many evaluations the library says it took."""

    def call(self, problem: Problem, tolerance: float) -> Callable[[], Any]:
        import jax

        jax.config.update("jax_enable_x64", True)
        ops, (x0, inputs, _) = jax_ops(), arrays(problem)
        compiled = jax.jit(
            lambda x0, inputs: self.solve(lambda x, inputs: problem.formula.energy(ops, x, *inputs), x0, inputs, tolerance)
        )
        return lambda: jax.block_until_ready(compiled(x0, inputs))

    def tensor(self, result: Any) -> Tensor:
        return torch.tensor(result[0].__array__())

    def evaluations(self, problem: Problem, tolerance: float) -> tuple[int, int]:
        return int(self.call(problem, tolerance)()[1]), 0


class JaxOptMinimizer(_Jax):
    """jaxopt's LBFGS or BFGS, as they come."""

    def __init__(self, kind: str) -> None:
        self.kind, self.name = kind, f"jaxopt {kind}"

    def solve(self, energy: Callable[..., Any], x0: Any, inputs: Any, tolerance: float) -> tuple[Any, Any]:
        import jaxopt

        solver = getattr(jaxopt, self.kind)(energy, tol=tolerance, maxiter=MOST_STEPS, implicit_diff=False)
        found = solver.run(x0, inputs)
        return found.params, found.state.num_fun_eval


class OptimistixMinimizer(_Jax):
    """optimistix's LBFGS or BFGS, as they come; each of its steps is one evaluation."""

    def __init__(self, kind: str) -> None:
        self.kind, self.name = kind, f"optimistix {kind}"

    def solve(self, energy: Callable[..., Any], x0: Any, inputs: Any, tolerance: float) -> tuple[Any, Any]:
        import optimistix

        solver = getattr(optimistix, self.kind)(rtol=tolerance, atol=tolerance)
        found = optimistix.minimize(energy, solver, x0, inputs, max_steps=MOST_STEPS, throw=False)
        return found.value, found.stats["num_steps"]


class OptimistixNewton(_Jax):
    """optimistix's Newton method on ∇E = 0, each step a whole Hessian; nothing sees to it that the energy falls."""

    name = "optimistix Newton"

    def solve(self, energy: Callable[..., Any], x0: Any, inputs: Any, tolerance: float) -> tuple[Any, Any]:
        import jax
        import optimistix

        solver = optimistix.Newton(rtol=tolerance, atol=tolerance)
        found = optimistix.root_find(jax.grad(energy), solver, x0, inputs, max_steps=MOST_STEPS, throw=False)
        return found.value, found.stats["num_steps"]

    def evaluations(self, problem: Problem, tolerance: float) -> tuple[int, int]:
        steps = super().evaluations(problem, tolerance)[0]
        return steps, steps * problem.x0.numel()
