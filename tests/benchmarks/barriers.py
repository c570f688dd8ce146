"""Every minimizer on energies with walls, beside SciPy's BFGS: ``python -m tests.benchmarks.barriers``.

Barriers, entropies and log-likelihoods, whose energy is not finite outside of a domain. Updates of each sample until the solve
ends, of which each evaluates the energy and its gradient once (`Newton` and `NewtonCG` need products with the Hessian besides),
and evaluations of SciPy. A cross marks a sample that did not converge, or that ended above the least energy that anybody found.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from energynet import LBFGS, Backtracking, BarzilaiBorwein, GradientDescent, Newton, NewtonCG, Solver, Termination, minimize

from . import command

B = 4
SOLVERS: dict[str, Solver] = {
    "LBFGS": LBFGS(), "LBFGS, Backtracking": LBFGS(search=Backtracking()), "Newton": Newton(), "NewtonCG": NewtonCG(),
    "GradientDescent, BarzilaiBorwein": GradientDescent(BarzilaiBorwein()),
}  # fmt: skip
TERMINATION = Termination(atol=1e-9, rtol=1e-9, max_steps=3000)


class Case(NamedTuple):
    energy: Callable[[Tensor], Tensor]  # (B, n) -> (B,)
    start: Tensor


def cases() -> dict[str, Case]:
    """Energies of four samples each, in float64."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def times(matrix: Tensor, x: Tensor) -> Tensor:  # (B, m, n), (B, n) -> (B, m)
        return (matrix @ x.unsqueeze(-1)).squeeze(-1)

    c, A, b, d = 3 * rand(B, 8), randn(B, 20, 5), 1 + rand(B, 20), randn(B, 5)
    P, Q, R = rand(B, 30, 6), randn(B, 40, 5), 1 + 0.3 * randn(B, 60, 4)
    rates, weights = torch.tensor([0.1, 0.5, 1, 2, 4, 8]).double(), torch.tensor([0.5, -0.5, 1, 0.2, -1]).double()
    counts, few = torch.poisson(P @ rates, generator=generator), torch.poisson((Q @ weights).exp(), generator=generator)
    labels = (Q @ (4 * weights) + randn(B, 40) > 0).double()
    cost = (rand(B, 7, 1, 2) - rand(B, 1, 6, 2)).square().sum(-1)
    times_of = -rand(B, 50, 3).log().sum(-1) * torch.tensor([[1.0], [0.1], [10.0], [100.0]])

    def transport(x: Tensor) -> Tensor:
        u, v = x[:, :7], x[:, 7:]
        plan = ((u.unsqueeze(-1) + v.unsqueeze(-2) - cost) / 0.1).exp() / 42
        return 0.1 * plan.sum((-1, -2)) - u.mean(-1) - v.mean(-1)

    def gamma(t: Tensor) -> Tensor:
        shape, rate = t[:, 0], t[:, 1]
        return shape.lgamma() - shape * rate.log() - (shape - 1) * times_of.log().mean(-1) + rate * times_of.mean(-1)

    def ones(n: int) -> Tensor:
        return torch.ones(B, n, dtype=torch.float64)

    return {
        "entropy, weight 0.3": Case(lambda x: (c * x + 0.3 * x * x.log()).sum(-1), 0.5 * ones(8)),
        "entropy, weight 0.1": Case(lambda x: (c * x + 0.1 * x * x.log()).sum(-1), 0.5 * ones(8)),
        "x − 10 log x from 10⁴": Case(lambda x: (x - 10 * x.log()).sum(-1), 1e4 * ones(1)),
        "x − 10⁻⁶ log x": Case(lambda x: (x - 1e-6 * x.log()).sum(-1), ones(1)),
        "analytic center": Case(lambda x: -(b - times(A, x)).log().sum(-1), 0 * ones(5)),
        "linear program, weight 30": Case(lambda x: 30 * (d * x).sum(-1) - (b - times(A, x)).log().sum(-1), 0 * ones(5)),
        "linear program, weight 10⁴": Case(lambda x: 1e4 * (d * x).sum(-1) - (b - times(A, x)).log().sum(-1), 0 * ones(5)),
        "Poisson, identity link": Case(lambda x: (times(P, x) - counts * times(P, x).log()).sum(-1), ones(6)),
        "Poisson, log link": Case(lambda x: (times(Q, x).exp() - few * times(Q, x)).sum(-1), 0 * ones(5)),
        "logistic with a ridge": Case(
            lambda x: (torch.nn.functional.softplus(times(Q, x)) - labels * times(Q, x)).sum(-1) + 0.05 * x.square().sum(-1),
            0 * ones(5),
        ),
        "entropic transport": Case(transport, 0 * ones(13)),
        "log-utility portfolio": Case(lambda w: w.sum(-1) - times(R, w).log().mean(-1), 0.25 * ones(4)),
        "gamma likelihood": Case(gamma, ones(2)),
    }  # fmt: skip


def by_scipy(case: Case, k: int) -> tuple[int, float]:
    """Evaluations of a sample, and the energy at the end."""
    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        points = case.start.clone()
        points[k] = torch.from_numpy(x)
        points.requires_grad_()
        energy = case.energy(points)[k]
        (gradient,) = torch.autograd.grad(energy, points)
        value = energy.item()
        return value if np.isfinite(value) else np.inf, gradient[k].numpy()

    options = {"gtol": 1e-9, "maxiter": 5000}
    found = scipy.optimize.minimize(value_and_gradient, case.start[k].numpy(), jac=True, method="BFGS", options=options)
    return found.nfev, float(found.fun)


def main() -> None:
    parser = command.parser("barriers", __doc__)
    parser.add_argument("--json", type=Path, help="where to keep the counts")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # SciPy's, of what is not finite
    kept = {}
    for name, case in cases().items():
        rows = {"SciPy BFGS": [by_scipy(case, k) for k in range(B)]}
        for title, solver in SOLVERS.items():
            found = minimize(case.energy, case.start, solver=solver, termination=TERMINATION, on_failure="ignore")
            energies = case.energy(found.value).nan_to_num(torch.inf).tolist()
            rows[title] = [(n, e if ok else torch.inf)
                           for n, e, ok in zip(found.num_steps.tolist(), energies, found.converged.tolist())]  # fmt: skip
        least = [min(row[k][1] for row in rows.values()) for k in range(B)]
        kept[name] = {
            title: [n if e <= m + 1e-7 * (1 + abs(m)) else f"{n} ×" for (n, e), m in zip(row, least)]
            for title, row in rows.items()
        }
        lines = (f"  {title:34}{' '.join(f'{n!s:>7}' for n in row)}" for title, row in kept[name].items())
        print(name, *lines, sep="\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
