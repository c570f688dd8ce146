"""Checks that options are objects of the right type; the error message names the object that was probably meant."""

from typing import Any

import torch
from torch import Tensor

from energynet._torch import tree as _tree
from energynet._torch.autodiff import readable
from energynet._torch.numbers import shown
from energynet.solution import POLICIES

_EXAMPLES = {"Solver": "LBFGS()", "Termination": "Termination(rtol=1e-3)", "Adjoint": "ImplicitAdjoint()", "Driver": "Compiled()"}


def expect(value: Any, kind: type, name: str, optional: bool = True) -> None:
    """Refuse an option that has the wrong type.

    Raises:
        TypeError: with the object that was probably meant.
    """
    if isinstance(value, kind) or (optional and value is None):
        return
    example = _EXAMPLES.get(kind.__name__, f"{kind.__name__}()")
    article, hint = "an" if kind.__name__[0] in "AE" else "a", _meant(value, kind)
    meant = f" Did you mean {hint}?" if hint else ""
    raise TypeError(f"{name} must be {article} {kind.__name__}, such as {example}, but {shown(value)} was passed.{meant}")


def _meant(value: Any, kind: type) -> str | None:
    """The call that makes the object that was probably meant; None if it cannot be guessed."""
    if isinstance(value, type) and issubclass(value, kind):
        return f"an instance, {value.__name__}()"
    if kind.__name__ == "Termination" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"Termination({'rtol' if isinstance(value, float) else 'max_steps'}={value})"
    name = value if isinstance(value, str) else value.__name__ if isinstance(value, type) else type(value).__name__
    names = [cls.__name__ for cls in _kinds(kind) if not cls.__name__.startswith("_")]
    plain = name.lower().replace("_", "").replace("-", "").replace(" ", "")
    found = [n for n in names if plain == n.lower()] or [n for n in names if plain and plain in n.lower()]
    return None if not found else f"{found[0]}()" if isinstance(value, str) else f"energynet.{found[0]}()"


def _kinds(kind: type) -> list[type]:
    below: list[type] = kind.__subclasses__()
    return [*below, *(other for cls in below for other in _kinds(cls))]


def check_flag(value: Any, name: str) -> None:
    """Refuse any value except True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but {shown(value)} was passed.")


def check_policy(on_failure: Any) -> None:
    """Refuse an unknown failure policy."""
    if on_failure not in POLICIES:
        meant = {"skip": "ignore", "error": "raise", "warning": "warn"}.get(on_failure) if isinstance(on_failure, str) else None
        hint = f' Did you mean "{meant}"?' if meant else ""
        raise ValueError(f"on_failure must be one of {POLICIES}, got {on_failure!r}.{hint}")


def check_batch_dims(batch_dims: Any, optional: bool = False) -> None:
    """Refuse any value except 0 and 1, and None where the shape of the energy determines it."""
    if optional and batch_dims is None:
        return
    if type(batch_dims) is not int or batch_dims not in (0, 1):
        others = ", or None to follow the energy's shape" if optional else ""
        raise ValueError(
            f"batch_dims must be 1 (the leading dimension of x counts samples) or 0 (there is one problem){others}, got "
            f"{batch_dims!r}. Flatten several batch dimensions into one, as by x.flatten(0, 1)."
        )


def check_step_size(size: Any) -> None:
    """Refuse any value that is not a step size: a positive finite number, or a tensor of such numbers."""
    if size is None:
        return
    if isinstance(size, Tensor):
        if not size.is_floating_point():
            raise TypeError(f"step_size must be floating point, got a tensor of {size.dtype}.")
        if not readable(size) or bool((size > 0).all() & torch.isfinite(size).all()):
            return
    elif isinstance(size, bool) or not isinstance(size, (int, float)):
        raise TypeError(
            f"step_size must be a positive number or a tensor, but {shown(size)} was passed. If it is left out, one is chosen "
            "for each sample."
        )
    elif 0 < size < float("inf"):
        return
    raise ValueError(f"step_size must be positive and finite, got {size}.")


def check_start(start: Any) -> None:
    """Refuse a layer's start that is neither a tensor, nor a pytree of tensors, nor a function of the context."""
    if start is None or (callable(start) and not isinstance(start, type)):
        return
    leaves = _tree.leaves(start)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(
            f"start must be a tensor, a pytree of tensors or a function of the context, but {shown(start)} was passed. For a "
            "constant, write start=lambda z: torch.full_like(z, 5.0); for an array, torch.as_tensor(array)."
        )
