"""Minimizers within bounds beside SciPy's L-BFGS-B: ``python -m tests.benchmarks.constrained``.

Evaluations of the energy and its gradient until a point is within 1e-6 of the answer, in units of 1 + its norm, and in all, on
the samples in which all find the same of several minima. Active: whether the bounds that hold at the returned point are exactly
those of the answer. `Nesterov` is what projected gradient steps cost.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from bounded import PROBLEMS, Bounded, Found, active, by_scipy, evaluations, polished, problem

from energynet import Nesterov, ProjectedLBFGS, Solver, Termination, minimize
from energynet.constraints import Box

from . import command

TERMINATION = Termination(rtol=1e-8, max_steps=5000)


class Result(NamedTuple):
    to_answer: int
    in_all: int
    active: bool


def by_energynet(p: Bounded, solver: Solver) -> Found:
    solution = minimize(
        p.energy, p.start, p.context, prox=Box(p.lower, p.upper), solver=solver, termination=TERMINATION, on_failure="ignore",
        trace=True,
    )  # fmt: skip
    assert solution.trace is not None
    rows = zip(solution.trace.value.unbind(1), solution.num_steps.tolist(), strict=True)
    return Found(solution.value, [points[: steps + 1] for points, steps in rows])


def result(p: Bounded, found: Found, answer: Tensor, samples: list[int]) -> Result:
    to_answer = [evaluations(found.points[i], answer[i]) for i in samples]
    in_all = [len(found.points[i]) for i in samples]
    # One that does not come that near counts with all that it took.
    near = sum(min(a, b) for a, b in zip(to_answer, in_all, strict=True))
    return Result(near, sum(in_all), torch.equal(active(p, found.x)[samples], active(p, answer)[samples]))


def main() -> None:
    parser = command.parser("constrained", __doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=command.positive, default=2, help="problems of each kind (default: 2)")
    arguments = parser.parse_args()
    rows = {}
    for name in PROBLEMS:
        for seed in range(arguments.seeds):
            p = problem(name, seed)
            found = {"SciPy L-BFGS-B": by_scipy(p), **{s: by_energynet(p, k) for s, k in SOLVERS.items()}}
            answer = polished(p, found["SciPy L-BFGS-B"].x)
            same = torch.stack([(f.x - answer).norm(dim=-1) <= 1e-3 * (1 + answer.norm(dim=-1)) for f in found.values()])
            samples = same.all(0).nonzero().flatten().tolist()
            row = {kind: result(p, f, answer, samples) for kind, f in found.items()}
            rows[f"{name}, {seed}"] = {"samples": len(samples), **{kind: r._asdict() for kind, r in row.items()}}
            cells = [f"{k}: {r.to_answer:6} of {r.in_all:6} {'active' if r.active else 'OTHER'}" for k, r in row.items()]
            print(f"{name + ', ' + str(seed):28} {len(samples)} | " + " | ".join(cells), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


SOLVERS: dict[str, Solver] = {"ProjectedLBFGS": ProjectedLBFGS(), "Nesterov": Nesterov()}

if __name__ == "__main__":
    main()
