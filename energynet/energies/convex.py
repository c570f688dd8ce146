"""Convex energies: every local minimum is global, and with a quadratic term there is exactly one."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrize import register_parametrization

from energynet._torch import tree as _tree
from energynet.energy import Energy, EnergyLike, encode, evaluate
from energynet.engine.held import Held


class Quadratic(Energy):
    r"""½ xᵀQx − bᵀx; only the symmetric part of Q matters, and the minimizer solves ½(Q + Qᵀ) x = b.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> Q, b = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.ones(3, 2)     # (n, n) or (B, n, n), (B, n)
        >>> minimize(Quadratic(), None, Q, b).value[0].round(decimals=3)
        tensor([0.5000, 0.2500])
    """

    def start(self, Q: Tensor, b: Tensor) -> Tensor:  # (B, n, n) or (n, n), (B, n) -> (B, n)
        """Zero."""
        return torch.zeros_like(b)

    def encode(self, Q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The symmetric part of Q, and b."""
        return 0.5 * (Q + Q.mT), b

    def evaluate(self, x: Tensor, Q: Tensor, b: Tensor) -> Tensor:  # (B, n), (B, n, n) or (n, n), (B, n) -> (B,)
        return ((0.5 * (Q @ x[..., None])[..., 0] - b) * x).sum(-1)


class StronglyConvex(Energy):
    """An energy plus strength/2 ‖x‖², which makes a convex energy strongly convex: it has one minimizer, which gradient
    steps reach.

    The energy keeps its own `encode` and `start`.

    Example:
        >>> import torch
        >>> from energynet import minimize
        >>> flat = lambda x, z: (z * x).sum(-1)                     # linear: no minimum
        >>> minimize(StronglyConvex(flat, 2.0), torch.zeros(1, 2), torch.ones(1, 2)).value
        tensor([[-0.5000, -0.5000]])

    Args:
        energy: E(x, \\*context) -> ``(B,)``, any callable or module; x a tensor or a pytree.
        strength: added to every curvature, positive.

    Raises:
        ValueError: if strength is not positive and finite.
    """

    def __init__(self, energy: EnergyLike, strength: float) -> None:
        super().__init__()
        if not 0 < strength < math.inf:
            raise ValueError(f"strength must be positive and finite, got {strength}: it is what is added to every curvature.")
        self.energy, self.strength = energy, strength
        if not isinstance(energy, nn.Module):  # parameters of a bound method or callable object are this module's
            self.held = Held(energy)

    def start(self, *context: Any) -> Any:
        """Where the energy starts, if it defines a start."""
        return self.energy.start(*context) if isinstance(self.energy, Energy) else super().start(*context)

    @property
    def _current(self) -> EnergyLike:
        """The energy, with its tensors where this module has moved."""
        return self.energy if isinstance(self.energy, nn.Module) else self.held.value()

    def encode(self, *context: Any) -> tuple[Any, ...]:
        """The energy's own code."""
        return encode(self._current, context)

    def evaluate(self, x: Any, *code: Any) -> Tensor:  # -> (B,)
        value = evaluate(self._current, x, code)
        squares = [leaf.square().unsqueeze(-1).flatten(value.ndim).sum(-1) for leaf in _tree.leaves(x)]
        return value + 0.5 * self.strength * sum(squares)

    def extra_repr(self) -> str:
        return f"strength={self.strength}"


class NonNegative(nn.Module):
    """A parametrization that keeps a weight positive, as the softplus of another.

    Example:
        >>> import torch
        >>> NonNegative()(torch.tensor([-100.0, 0.0])).round(decimals=4)
        tensor([0.0000, 0.6931])
    """

    def forward(self, raw: Tensor) -> Tensor:
        return softplus(raw)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The raw weight that gives a weight; entries that are not positive become tiny."""
        weight = weight.clamp_min(1e-6)
        return weight + torch.log(-torch.expm1(-weight))


class ConvexNetwork(Energy):
    r"""A network that is convex and smooth in x, for any weights and any context z:

    .. math::
        u = s(U z), \quad h_{k+1} = s\bigl(W_k (h_k \circ s(G_k u)) + A_k x + C_k u\bigr), \quad
        E = w^\top h_K + (a(u))^\top x, \qquad W_k, w \ge 0,

    with s the softplus: each layer is a convex, nondecreasing function of convex ones. What depends on z alone is computed
    once per solve. The energy may decrease forever in some direction; ``StronglyConvex(ConvexNetwork(...), strength)`` has a
    minimum.

    Example:
        >>> import torch
        >>> from energynet import FPI_GD
        >>> energy = StronglyConvex(ConvexNetwork(3, 5), strength=1.0)
        >>> FPI_GD(energy, step_size=0.5)(torch.ones(4, 5)).shape       # z (B, 5) -> x* (B, 3)
        torch.Size([4, 3])

    Args:
        num_variables: n, the length of x.
        num_context: d, the length of z.
        hidden: width of each hidden layer, and of u.

    Raises:
        ValueError: without a hidden layer.

    Source: Amos, Xu and Kolter (2017), Input convex neural networks: the partially convex form, its features of z shared.
    """

    def __init__(self, num_variables: int, num_context: int, *, hidden: tuple[int, ...] = (64, 64)) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("ConvexNetwork needs a hidden layer, got hidden=(): without one it is linear in x. Try (64,).")
        self.num_variables, width = num_variables, hidden[0]
        self.features = nn.Linear(num_context, width)
        self.slope = nn.Linear(width, num_variables)
        self.shifts = nn.ModuleList(nn.Linear(width, m) for m in hidden)
        self.skips = nn.ModuleList(nn.Linear(num_variables, m, bias=False) for m in hidden)
        pairs = list(zip(hidden, (*hidden[1:], 1)))
        self.gates = nn.ModuleList(nn.Linear(width, m) for m, _ in pairs[:-1])
        self.layers = nn.ModuleList(_non_negative(m, k) for m, k in pairs)

    def start(self, z: Tensor) -> Tensor:  # (B, d) -> (B, n)
        """Zero."""
        return z.new_zeros(z.shape[0], self.num_variables)

    def encode(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The slope a(u) ``(B, n)``, and shifts and gates of each layer, ``(B, hidden)``."""
        u = softplus(self.features(z))
        return self.slope(u), tuple(f(u) for f in self.shifts), tuple(softplus(f(u)) for f in self.gates)

    def evaluate(self, x: Tensor, slope: Tensor, shifts: tuple[Tensor, ...], gates: tuple[Tensor, ...]) -> Tensor:  # -> (B,)
        h = softplus(self.skips[0](x) + shifts[0])
        for layer, skip, shift, gate in zip(self.layers[:-1], self.skips[1:], shifts[1:], gates):
            h = softplus(layer(h * gate) + skip(x) + shift)
        return self.layers[-1](h).squeeze(-1) + (slope * x).sum(-1)


def _non_negative(num_in: int, num_out: int) -> nn.Linear:
    """A layer without bias whose weights stay positive. They begin at about 1/num_in, so that the layer averages."""
    layer = nn.Linear(num_in, num_out, bias=False)
    with torch.no_grad():
        layer.weight.uniform_(0.5 / num_in, 1.5 / num_in)
    register_parametrization(layer, "weight", NonNegative())
    return layer
