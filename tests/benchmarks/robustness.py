"""Every minimizer on the classic test functions, beside SciPy's BFGS: ``python -m tests.benchmarks.robustness``.

Solved: the energy of the answer is a known least value. Gradient: d x* / d t for E(x) + t bᵀx agrees with a dense solve with
the Hessian at the answer, or, where the Hessian is singular, is refused. Steps: evaluations of the energy and its gradient, of
`NewtonCG` and `Newton` outer steps.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import scipy.optimize
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from problems import CLASSICS, Classic

from energynet import Solver, Termination, minimize, solvers

from . import command

TERMINATION = Termination(atol=1e-9, rtol=1e-9, max_steps=20_000)


class Result(NamedTuple):
    solved: bool
    status: str
    energy: float
    gradient: str
    steps: int


def is_least(problem: Classic, energy: float) -> bool:
    return any(-1e-12 <= energy - least + 1e-6 * abs(least) <= 2e-6 * abs(least) + 1e-9 for least in problem.minima)


def by_scipy(problem: Classic) -> Result:
    def value_and_gradient(x: object) -> tuple[float, object]:
        t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        energy = problem.energy(t)
        energy.backward()
        return float(energy), t.grad.numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"maxiter": 20_000, "gtol": 1e-9}
        found = scipy.optimize.minimize(value_and_gradient, problem.start, jac=True, method="BFGS", options=options)
    return Result(is_least(problem, float(found.fun)), "", float(found.fun), "", found.nfev)


def by_energynet(problem: Classic, solver: Solver | None) -> Result:
    x0 = torch.tensor([problem.start], dtype=torch.float64)
    b = torch.linspace(-1, 1, x0.shape[1], dtype=torch.float64)
    t = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def energy(x: Tensor, t: Tensor) -> Tensor:  # (1, n), (1,)
        return problem.energy(x) + t * (x @ b)

    solution = minimize(energy, x0, t, solver=solver, termination=TERMINATION, on_failure="ignore")
    value = solution.value.detach()
    least = float(problem.energy(value))
    gradient = gradient_verdict(problem, value[0], b, solution.value, t) if solution.converged.all() else "-"
    name = ("converged", "max steps", "not finite", "diverged")[int(solution.status)]
    return Result(is_least(problem, least), name, least, gradient, int(solution.num_steps))


def gradient_verdict(problem: Classic, x: Tensor, b: Tensor, value: Tensor, t: Tensor) -> str:
    """Against the dense solve −H⁻¹ b; with a singular H, the package must refuse (NaN)."""
    w = torch.cos(torch.arange(len(x), dtype=torch.float64))
    (found,) = torch.autograd.grad(value[0] @ w, t)
    hessian = torch.func.hessian(lambda x: problem.energy(x))(x)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    if eigenvalues[0] <= 1e-9 * eigenvalues[-1]:
        return "refused" if bool(found.isnan()) else "ill-posed"
    exact = -(w @ torch.linalg.solve(hessian, b))
    error = float((found - exact).abs() / (1e-12 + exact.abs()))
    return "right" if error < 1e-5 else f"off {error:.0e}"


def main() -> None:
    parser = command.parser("robustness", __doc__)
    parser.add_argument("--only", help="names of solvers, comma-separated")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kinds: dict[str, Solver | None] = {"default": None}
    for name in ("LBFGS", "NewtonCG", "Newton", "GradientDescent", "Nesterov"):
        if hasattr(solvers, name):
            kinds[name] = getattr(solvers, name)()
    if hasattr(solvers, "BarzilaiBorwein"):
        kinds["GradientDescent(BB)"] = solvers.GradientDescent(solvers.BarzilaiBorwein())
    if arguments.only:
        unknown = set(arguments.only.split(",")) - set(kinds)
        if unknown:
            parser.error(f"--only knows {', '.join(kinds)}, not {', '.join(sorted(unknown))}")
        kinds = {name: kinds[name] for name in arguments.only.split(",")}
    rows = {}
    for problem in CLASSICS:
        scipy_result = by_scipy(problem)
        row = {"SciPy BFGS": scipy_result}
        for name, solver in kinds.items():
            begin = time.perf_counter()
            row[name] = by_energynet(problem, solver)
            print(f"  {problem.name} {name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
        rows[problem.name] = row
        cells = [f"{'yes' if r.solved else 'NO':3} {r.steps:6} {r.gradient:9} {r.status:10}" for r in row.values()]
        print(f"{problem.name:28} | " + " | ".join(cells), flush=True)
    for name in ("SciPy BFGS", *kinds):
        print(f"{name}: solved {sum(row[name].solved for row in rows.values())} of {len(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({p: {n: r._asdict() for n, r in row.items()} for p, row in rows.items()}, indent=1))


if __name__ == "__main__":
    main()
