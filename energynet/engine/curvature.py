"""Compares a Hessian-vector product with differences of gradients before an energy is minimized for the first time.

The derivative of every minimizer contains the Hessian. An operation without a second derivative, or with a wrong one, silently
drops a part of it. Examples are a custom ``autograd.Function`` whose backward uses NumPy or ``once_differentiable``, and a
value that is detached.
"""

import functools
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from energynet._torch import tree as _tree
from energynet._torch.autodiff import gradient_of_sum, linearize
from energynet._torch.tree import Layout
from energynet.energy import evaluate
from energynet.engine.binding import Binding
from energynet.engine.purity import LostGradientError, plain
from energynet.proximal import ProximalStep
from energynet.step import DampedStep, Step

Gradient = Callable[[Tensor], Tensor]  # (*batch, n) -> (*batch, n)

POINTS = 3  # the check fails only if the Hessian is wrong at each of these points
LENGTHS = {torch.float64: (1e-4, 1e-3, 1e-5, 1e-7), torch.float32: (1e-2, 3e-2, 3e-3)}  # step lengths, relative to x
TOLERANCE = {torch.float64: 1e-3, torch.float32: 3e-2}
MOST_NUMBERS = 5_000_000  # the largest number of elements that are copied to float64
MOST_KNOWN = 1000

_known = set[Hashable]()


def check_hessian(step: Step, binding: Binding, x0: Any, code: tuple[Any, ...], batch_dims: int) -> None:
    """Raises LostGradientError if the Hessian of the step's energy is missing or wrong; each energy is checked once.

    The error is raised only if the Hessian is wrong at several points near x0 and for most samples, by more than the spread of
    differences with several step lengths. So kinks, rounding and strong curvature raise no false alarm: a doubtful case passes.
    """
    energy = step.energy_of
    if energy is None or (key := _identity(energy)) in _known:
        return
    name = f"The energy {getattr(energy, '__qualname__', None) or type(energy).__name__}"
    with temporarily_clear_interpreter_stack(), forward_ad._set_fwd_grad_enabled(False), torch.no_grad():
        own, x, rest = _tree.map_structure(plain, (list(binding.tensors), x0, code))
        small = sum(t.numel() for t in _tree.leaves((own, x, rest)) if isinstance(t, Tensor)) <= MOST_NUMBERS
        for dtype in (torch.float64, torch.float32) if small else (torch.float32,):
            values = _tree.map_structure(functools.partial(_converted, dtype=dtype), (own, x, rest))
            verdict = _verdict(binding, values, batch_dims, Layout.of(x, batch_dims).rounding)
            if isinstance(verdict, str):
                raise LostGradientError(f"{name} {verdict}")
            if verdict is not None:
                break
    if len(_known) >= MOST_KNOWN:
        _known.clear()
    _known.add(key)


def _verdict(binding: Binding, values: tuple[list[Tensor], Any, Any], batch_dims: int, rounding: float) -> str | bool | None:
    """An error message; True if the Hessian is right, None if the energy cannot be evaluated in the dtype of these copies.

    ``rounding`` is the rounding unit of the energy's own dtype, because the energy may convert to that dtype internally.
    """
    own, x, code = values
    layout = Layout.of(x, batch_dims)
    try:
        gradient = _gradient(binding.attach(own), layout, code)
        return _WRONG if _is_wrong(gradient, layout.ravel(x), rounding) else True
    except RuntimeError as error:
        text = str(error)
        if "once_differentiable" in text or ("derivative" in text and "not implemented" in text):
            return f"{_MISSING} PyTorch says: {text.splitlines()[0]}"
        return None  # such as a dtype that is fixed in the code, or a point where an inner solve fails
    except Exception:  # user code may raise anything at a point or in a dtype that it was not written for
        return None


_REMEDY = (
    "The derivative of a minimizer contains the Hessian, so the gradient would be wrong or impossible. Write that part in "
    "PyTorch's own differentiable operations (a custom backward as well), or pass the map itself to fixed_point or FPI_NN, for "
    "which one derivative is enough."
)
_WRONG = (
    "has a Hessian that does not agree with differences of its gradient. Likely cause: a custom autograd.Function whose backward "
    f"uses NumPy, .detach() or once_differentiable, or a value that is detached inside. {_REMEDY}"
)
_MISSING = f"uses an operation that cannot be differentiated twice. {_REMEDY}"


def _gradient(step: Step, layout: Layout, code: tuple[Any, ...]) -> Gradient:
    if isinstance(step, DampedStep):
        return _gradient(step.step, layout, code)
    energy, rest = step.energy_of, code[1:] if isinstance(step, ProximalStep) else code
    assert energy is not None
    return lambda flat: layout.ravel(gradient_of_sum(lambda x: evaluate(energy, x, rest), layout.unravel(flat)))


def _is_wrong(gradient: Gradient, x: Tensor, rounding: float) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)
    size = torch.where(x == 0, torch.where(largest == 0, 1, largest), x.abs())
    # The check avoids x itself, because an initial point such as 0 often lies on a kink.
    return all(_is_wrong_at(gradient, x + 0.01 * size * random(), size * random(), rounding) for _ in range(POINTS))


def _is_wrong_at(gradient: Gradient, x: Tensor, p: Tensor, rounding: float) -> bool:
    lengths, tolerance = LENGTHS[x.dtype], TOLERANCE[x.dtype]
    product = linearize(gradient, x, transposed=True)(p)

    def difference(h: float) -> Tensor:
        return (gradient(x + h * p) - gradient(x - h * p)) / (2 * h)

    first = difference(lengths[0])
    gap, size = _norm(product - first), torch.maximum(_norm(product), _norm(first))
    known = torch.isfinite(gap)
    if not _most(gap > tolerance * size, known):  # the usual case: two gradients and one product
        return False
    spread = torch.stack([_norm(difference(h) - first) for h in lengths[1:]]).amax(0)
    noise = rounding * _norm(gradient(x)) / lengths[0]
    return _most(gap > 10 * (spread + noise) + tolerance * size, known)


def _most(condition: Tensor, among: Tensor) -> bool:
    return 2 * int((condition & among).sum()) > int(among.sum())


def _norm(x: Tensor) -> Tensor:  # (*batch, n) -> (*batch)
    size: Tensor = torch.linalg.vector_norm(x.detach(), dim=-1)
    return size


def _converted(tensor: Any, dtype: torch.dtype) -> Any:
    return tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


def _identity(function: Any, depth: int = 3) -> Hashable:
    """A key that identifies a function by its code and that of the functions it captures; it keeps no data alive."""
    if isinstance(function, types.MethodType):
        return _identity(function.__self__), function.__func__.__code__ if hasattr(function.__func__, "__code__") else None
    if isinstance(function, functools.partial):
        return _identity(function.func)
    if isinstance(function, types.FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)] if depth else []
        return function.__code__, *(_identity(value, depth - 1) for value in cells if callable(value))
    try:
        reference = weakref.ref(function)
        hash(reference)
    except TypeError:
        return type(function).__qualname__
    return reference


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
