"""Controls which kernels ``scaled_dot_product_attention`` may use.

Only the math kernel, which is composed of products and a softmax, has second derivatives, and the gradient of an energy is
always differentiated again. PyTorch's setting is global. So the threads that need the math kernel are counted here, and it is
the only one allowed until the last of them has finished. Meanwhile other threads get the same values up to rounding.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_C = torch._C
_KINDS = [k for k in ("math", "flash", "mem_efficient", "cudnn", "overrideable") if hasattr(_C, f"_set_sdp_use_{k}")]
_GET = [getattr(_C, f"_get_{k}_sdp_enabled") for k in _KINDS]
_SET = [getattr(_C, f"_set_sdp_use_{k}") for k in _KINDS]

Kernels = tuple[bool, ...]  # which of them are allowed
_COMPOSED: Kernels = tuple(k == "math" for k in _KINDS)
_lock = threading.Lock()


def allowed_kernels() -> Kernels:
    """The kernels that the user allows, independent of temporary restrictions by this module."""
    with _lock:
        return twice_differentiable.outside if twice_differentiable.count else _current()


@contextlib.contextmanager
def kernels(allowed: Kernels) -> Iterator[None]:
    """A context in which these kernels are allowed, unless a thread needs second derivatives."""
    before = _choose(allowed)
    try:
        yield
    finally:
        _choose(before)


class _TwiceDifferentiable:
    """A context in which attention has derivatives of every order. It is entered at each evaluation and takes a microsecond."""

    def __init__(self) -> None:
        self.count = 0
        self.outside = _COMPOSED  # the kernels that are allowed again when the count is zero

    def __enter__(self) -> None:
        with _lock:
            self.count += 1
            if self.count == 1:
                self.outside = _current()
                _allow(self.outside, _COMPOSED)

    def __exit__(self, *_: Any) -> None:
        with _lock:
            self.count -= 1
            if not self.count:
                _allow(_COMPOSED, self.outside)


twice_differentiable = _TwiceDifferentiable()


def _choose(allowed: Kernels) -> Kernels:
    """Allow these kernels, at once or when no thread needs second derivatives; returns those that were allowed before."""
    with _lock:
        before = twice_differentiable.outside if twice_differentiable.count else _current()
        if twice_differentiable.count:
            twice_differentiable.outside = allowed
        else:
            _allow(before, allowed)
        return before


def _current() -> Kernels:
    return tuple([get() for get in _GET])


def _allow(before: Kernels, allowed: Kernels) -> None:
    for allow, old, new in zip(_SET, before, allowed):
        if old != new:
            allow(new)
