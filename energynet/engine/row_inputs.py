"""Which inputs have one row a sample, so that a part of the batch can be computed by itself.

Shapes do not tell: a matrix that all samples share may have as many rows as there are samples.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from energynet.engine.equation import Equation, Linear


def own_rows(equation: Equation, x: Tensor, inputs: tuple[Tensor, ...]) -> tuple[bool, ...] | None:
    """Which inputs have one row a sample of x; None where some samples cannot be computed by themselves."""
    if isinstance(equation, Linear):  # its own inputs are v and the point
        own = own_rows(equation.root, inputs[1], inputs[2:])
        return None if own is None else (True, True, *own)
    if equation.vmaps:
        return tuple(dim == 0 for dim in equation.vmaps[-1][0])
    from energynet.compiled.tracing import tied_rows

    try:
        tied = tuple(tied_rows(equation.residual, (x, *inputs))[1:])
        # What all share is moved once, too: a gate that is zero now hides what it is multiplied with.
        far = ((False, 0.5), (True, 0.5), (True, 50.0))
        alone = all(_is_independent(equation.residual, x, inputs, tied, *each) for each in far)
        return tied if alone else None
    except Exception:  # whatever code raises that insists on the size of the batch
        return None


@torch.no_grad()
def _is_independent(residual: Callable[..., Tensor], x: Tensor, inputs: Sequence[Tensor], own: Sequence[bool],
                    shared: bool, far: float) -> bool:  # fmt: skip
    """Whether some samples by themselves give what they give among the others, as they would not with z − z.mean(0)."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: Tensor) -> Tensor:  # zeros would hide what they are multiplied with; positive ones stay positive
        noise = torch.rand(t.shape, generator=generator, dtype=torch.float32).to(t)
        if t.dtype == torch.bool:
            return ~t
        return t + far * noise * (1 + t.abs()) if t.is_floating_point() else t

    x, inputs = moved(x), [moved(t) if mine or shared else t for t, mine in zip(inputs, own, strict=True)]
    some = torch.randperm(len(x), generator=generator)[: len(x) // 2]
    among = residual(x, *inputs)[some]
    alone = residual(x[some], *(t[some] if mine else t for t, mine in zip(inputs, own, strict=True)))
    size = among.abs().nan_to_num(0, 0, 0).amax()
    return torch.allclose(alone, among, rtol=0.0, atol=float(torch.finfo(x.dtype).eps ** 0.5 * size), equal_nan=True)
