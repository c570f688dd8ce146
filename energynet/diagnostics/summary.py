"""A solve in words."""

import torch
from torch import Tensor

from energynet._torch.autodiff import readable
from energynet.solution import Solution, describe


def explain(solution: Solution) -> str:
    """Describe a solve in words: the number of converged samples, the slowest one, the estimated errors, and the failures.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> print(explain(minimize(lambda x: (x - 3).square().sum(-1), torch.zeros(2, 1), step_size=0.5)))
        2 of 2 samples converged. The slowest, sample 0, took 1 step. Estimated errors lie between ..., in units of x.

    Args:
        solution: the result of `minimize`, `fixed_point` or a layer's ``solve``.

    Raises:
        ValueError: under vmap, where values cannot be read.
    """
    status, steps, error = solution.status, solution.num_steps, solution.error
    if not readable(status):
        raise ValueError("Under vmap a solution's values cannot be read. Call explain on the solution that vmap returns instead.")
    if not status.numel():
        return "There are no samples."
    most, finite = int(steps.amax()), error[torch.isfinite(error)]
    count = f"{int(solution.converged.sum())} of {status.numel()} samples" if status.ndim else "The problem"
    parts = [f"{count} {'converged' if status.ndim or solution.converged else 'did not converge'}."]
    slowest = f"The slowest, {_first(steps == most)}," if status.ndim else "It"
    parts.append(f"{slowest} took {most} step{'' if most == 1 else 's'}.")
    if len(finite):
        parts.append(f"Estimated errors lie between {float(finite.amin()):.3g} and {float(finite.amax()):.3g}, in units of x.")
    if not solution.converged.all():
        parts.append(describe(status, error, steps))
    return " ".join(parts)


def _first(mask: Tensor) -> str:
    index = torch.nonzero(mask)[0].tolist()
    return f"sample {index[0] if len(index) == 1 else tuple(index)}"
