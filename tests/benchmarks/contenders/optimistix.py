"""optimistix: its fixed-point iteration, with lineax's conjugate gradients backward."""

from typing import Any, ClassVar

from ..work import Task, Work
from .jax_based import JaxBased, step
from .torch_based import incoming


class Optimistix(JaxBased):
    """The batch is one large problem to it; its tolerances are absolute, so they are scaled here."""

    name: ClassVar[str] = "optimistix"

    def solve(self, work: Work, x0: Any, inputs: Any) -> tuple[Any, Any]:
        import lineax
        import optimistix

        problem = work.problem
        v = incoming(problem, work.answers[Task.FORWARD][0].to(problem.x0))
        size = min(float(v.square().mean()) ** 0.5, v.numel() ** -0.5 if v.ndim == 1 else float("inf"))
        solver = lineax.CG(rtol=0.0, atol=problem.adjoint_tolerance * size, norm=optimistix.rms_norm)
        found = optimistix.fixed_point(
            lambda x, inputs: step(work, x, inputs),
            optimistix.FixedPointIteration(rtol=0.0, atol=work.whole, norm=optimistix.two_norm),
            x0, inputs, max_steps=problem.max_steps, adjoint=optimistix.ImplicitAdjoint(solver),
            tags=frozenset({lineax.negative_semidefinite_tag}),  # ∂g/∂x - 1 = -γ ∇²E
        )  # fmt: skip
        return found.value, found.stats["num_steps"]
