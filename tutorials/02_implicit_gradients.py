# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · Implicit gradients: differentiate the answer, not the path
#
# You will learn
# - why the gradient of a solution depends on the solution only, and which equation gives it;
# - how to write an implicit layer by hand, in 20 lines, with a backward pass that is an iteration like the forward pass;
# - what implicit, unrolled and finite-difference gradients cost in accuracy, time and memory, as measured here.

# %%
import time
import weakref

import matplotlib.pyplot as plt
import torch

from energynet import GradientStep, ImplicitAdjoint, Picard, Termination, UnrolledAdjoint, diagnostics, gradient, minimize

# %%
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
ROWS, UNKNOWNS = 100, 120  # of the matrix A in the energy
STEP_SIZE = 0.1  # γ
ENOUGH = 1000  # iterations of the layer written by hand
ACCURATE = Termination(atol=1e-13, rtol=1e-13, max_steps=5000)
BUDGETS = (5, 10, 20, 40, 80, 160, 320, 640)  # numbers of iterations to compare

BLUE, GREEN, ORANGE, PINK, GRAY = "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#666666"
plt.rcParams.update({"figure.dpi": 110, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The picture
#
# The colors show an energy E(x, z) of one unknown x and one context z. For each z, the minimum in the vertical direction lies
# on the black curve: this is the answer x*(z), where the slope ∂E/∂x is zero. A solver moves along a vertical line by some
# path (the white dots). The derivative of the answer is the slope *along the curve*, which the orange tangents show. To
# compute it, one needs the curve near one point, and nothing about the path.


# %% tags=["hide-input"]
def valley(x, z):  # (B, 1), (B, 1) -> (B,)
    return (0.5 * (x - torch.sin(2 * z)).square() + 0.15 * (x + 0.8 * z).square() + 0.2 * torch.cosh(x)).sum(-1)


side = torch.linspace(-3, 3, 241)
grid_z, grid_x = torch.meshgrid(side, side, indexing="xy")
height = valley(grid_x.reshape(-1, 1), grid_z.reshape(-1, 1)).reshape(grid_x.shape)
curve_z = side[:, None]
curve = minimize(valley, torch.zeros_like(curve_z), curve_z).value

falls_z = torch.tensor([[-2.3], [-1.1], [0.2], [1.3], [2.4]], requires_grad=True)
falls_x = torch.tensor([[-2.7], [2.7], [-2.6], [-2.7], [2.7]])
fall = minimize(valley, falls_x, falls_z, step_size=0.22, solver=Picard(), termination=ACCURATE, trace=True)
(tangent,) = torch.autograd.grad(fall.value.sum(), falls_z)  # dx*/dz, one per sample

figure, axis = plt.subplots(figsize=(8.5, 5.6), layout="constrained")
levels = height.min() + torch.linspace(0, 1, 26) ** 2 * (height.max() - height.min())
colors = axis.contourf(side, side, height, levels=levels, cmap="viridis_r")
figure.colorbar(colors, ax=axis, label="energy E(x, z)", format="%.1f")
axis.plot(side, curve.flatten(), color="black", linewidth=2.5)
for k, (z, x, slope) in enumerate(zip(falls_z.detach().flatten(), fall.value.detach().flatten(), tangent.flatten(), strict=True)):
    axis.plot(z.expand(40), fall.trace.value[:40, k, 0].detach(), "o-", color="white", markersize=4, linewidth=1)
    reach = 0.6 / (1 + slope**2) ** 0.5
    axis.plot([z - reach, z + reach], [x - reach * slope, x + reach * slope], color="#ff7f0e", linewidth=3.5, zorder=4)
    axis.plot(z, x, "o", color="white", markeredgecolor="#ff7f0e", markeredgewidth=2, markersize=7, zorder=5)
axis.text(1.05, 0.95, "x*(z)", fontsize=13)
axis.set(xlabel="context z", ylabel="unknown x", title="Solvers fall; the derivative runs along the curve")
plt.show()

# %% [markdown]
# ## The derivation
#
# One step of gradient descent is g(x, z) = x − γ ∂E/∂x. The answer is the point that a step does not change:
#
# $$x^* = g(x^*, z).$$
#
# This holds for every z, so both sides have the same derivative. With the Jacobian J = ∂g/∂x at x*,
#
# $$\frac{dx^*}{dz} = J\,\frac{dx^*}{dz} + \frac{\partial g}{\partial z}
# \qquad\Longrightarrow\qquad \frac{dx^*}{dz} = (I - J)^{-1}\,\frac{\partial g}{\partial z}.$$
#
# Backpropagation does not need this matrix, but only its product with the gradient v = ∂L/∂x* that comes from the loss: dL/dz
# = (∂g/∂z)ᵀ c, where c solves (I − Jᵀ) c = v. Written as
#
# $$c = J^\top c + v,$$
#
# this is a fixed-point equation again! Iterate c ← Jᵀ c + v. The iteration converges because J contracts, just as the forward
# iteration does. Reverse-mode autograd computes products with Jᵀ, so that no matrix is formed. This is the *backward
# fixed-point iteration* of [arXiv 2002.02868](https://arxiv.org/abs/2002.02868).
#
# ## By hand, in 20 lines
#
# The energy of this page is a least-squares fit with a smooth absolute value that keeps the unknowns small. Its context is
# the right-hand side b.

# %%
matrix = torch.randn(ROWS, UNKNOWNS) / UNKNOWNS**0.5


def energy(x, b):  # (B, n), (B, m) -> (B,)
    return 0.5 * (x @ matrix.mT - b).square().sum(-1) + torch.log(torch.cosh(x)).sum(-1)


b = torch.randn(1, ROWS)
x0 = torch.zeros(1, UNKNOWNS)
answer = minimize(energy, x0, b, termination=ACCURATE).value
contraction = float(diagnostics.contraction_factor(GradientStep(energy, STEP_SIZE), answer, b))
print("b", tuple(b.shape), "  x", tuple(x0.shape), "  energy", tuple(energy(x0, b).shape))
print(f"With γ = {STEP_SIZE} a step comes closer to the answer by a factor of {contraction:.3f}.")


# %%
class HandMade(torch.autograd.Function):
    """The fixed point of g, and its gradient by the backward fixed-point iteration."""

    @staticmethod
    def forward(ctx, g, x, b, steps):
        for _ in range(steps):
            x = g(x, b).detach()  # keeps one iterate, the last
        ctx.g, ctx.steps = g, steps
        ctx.save_for_backward(x, b)
        return x

    @staticmethod
    def backward(ctx, v):
        x, b = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            step = ctx.g(x, b)  # one step at the answer, recorded
        c = v
        for _ in range(ctx.steps):
            c = torch.autograd.grad(step, x, c, retain_graph=True)[0] + v  # c ← Jᵀ c + v
        return None, None, torch.autograd.grad(step, b, c)[0], None  # (∂g/∂b)ᵀ c


def g(x, b):  # (B, n), (B, m) -> (B, n)
    return x - STEP_SIZE * gradient(energy, x, b)


target = torch.ones(UNKNOWNS)


def loss(x):  # (B, n) -> ()
    return 0.5 * (x - target).square().sum()


leaf = b.clone().requires_grad_()
x_hand = HandMade.apply(g, x0, leaf, ENOUGH)
(by_hand,) = torch.autograd.grad(loss(x_hand), leaf)
print("x*", tuple(x_hand.shape), "  dL/db", tuple(by_hand.shape))

# %% [markdown]
# ## The same from the library, and two witnesses
#
# `minimize` with `Picard` and `ImplicitAdjoint(Picard())` is the same pair of iterations, which stop by themselves when they
# have converged. By default the library solves the adjoint equation by conjugate gradients instead. For an energy this is
# possible because J is symmetric, and it needs far fewer products.
#
# The first witness is central finite differences, which make no use of any of this. The second is the closed form, which for
# this small problem is one dense linear system with the Hessian H = AᵀA + diag(1 − tanh² x*), namely dL/db = A H⁻¹ v.


# %%
def library_gradient(adjoint):
    how = {"solver": Picard(), "step_size": STEP_SIZE, "termination": ACCURATE}
    x = minimize(energy, x0, leaf, adjoint=adjoint, **how).value
    return torch.autograd.grad(loss(x), leaf)[0]


def finite_differences(h):
    nudges = h * torch.eye(ROWS)
    nudged = torch.cat([b + nudges, b - nudges])  # (2m, m): one batch of 200 problems
    x = minimize(energy, x0.expand(2 * ROWS, UNKNOWNS), nudged, termination=ACCURATE).value
    up, down = (0.5 * (x - target).square().sum(-1)).chunk(2)
    return ((up - down) / (2 * h))[None]


hessian = matrix.mT @ matrix + torch.diag(1 - torch.tanh(answer[0]).square())
exact = torch.linalg.solve(hessian, answer[0] - target)[None] @ matrix.mT  # (1, m)


def error_of(found):
    return float((found - exact).norm() / exact.norm())


errors = {
    "by hand": error_of(by_hand),
    "library, backward iteration": error_of(library_gradient(ImplicitAdjoint(Picard()))),
    "library, conjugate gradients": error_of(library_gradient(ImplicitAdjoint())),
    "unrolled": error_of(library_gradient(UnrolledAdjoint())),
    "finite differences": error_of(finite_differences(1e-5)),
}
for name, error in errors.items():
    print(f"{name:30} relative error {error:.1e}")

# %% [markdown]
# ## What each of them costs
#
# *Unrolling* is the other way to differentiate a solver: autograd records all iterations and goes back through them. This is
# correct too, once there are enough iterations, but it keeps every iterate until the backward pass. *Finite differences* keep
# nothing and solve twice for every entry of b.
#
# We give all three methods the same number k of iterations of g. Bytes are counted where autograd stores tensors for the
# backward pass, and times are the better of two.


# %%
class Kept:
    """A tensor that autograd keeps for the backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def forward_and_bytes(forward):
    """The result of a forward pass, and the memory that its graph holds, each piece counted once."""
    everything = weakref.WeakSet()

    def keep(tensor):
        kept = Kept(tensor)
        everything.add(kept)  # weakly: it goes when the graph lets it go
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        result = forward()
    memory = [kept.tensor.untyped_storage() for kept in everything]
    return result, sum({piece.data_ptr(): piece.nbytes() for piece in memory}.values())


def unrolled(k):
    x = x0
    for _ in range(k):
        x = g(x, leaf)
    return loss(x)


def implicit(k):
    return loss(HandMade.apply(g, x0, leaf, k))


def measure(method, k):
    """Relative error, seconds and bytes of a gradient with k iterations."""
    begin = time.perf_counter()
    if method == "finite differences":
        with torch.no_grad():
            nudges = 1e-5 * torch.eye(ROWS)
            nudged, x = torch.cat([b + nudges, b - nudges]), x0.expand(2 * ROWS, UNKNOWNS)  # all solves in one batch
            for _ in range(k):
                x = g(x, nudged).detach()
            up, down = (0.5 * (x - target).square().sum(-1)).chunk(2)
            found, kept = ((up - down) / 2e-5)[None], 0
    else:
        value, kept = forward_and_bytes(lambda: methods[method](k))
        (found,) = torch.autograd.grad(value, leaf)
    return error_of(found), time.perf_counter() - begin, kept


methods = {"unrolled": unrolled, "finite differences": None, "implicit": implicit}
measured = {}
for method in methods:
    measure(method, 5)  # the first call of anything is slow
    measured[method] = [min((measure(method, k) for _ in range(2)), key=lambda m: m[1]) for k in BUDGETS]
    for k, (error, seconds, kept) in zip(BUDGETS, measured[method], strict=True):
        print(f"{method:18} k = {k:4d}   error {error:.1e}   {1000 * seconds:7.1f} ms   {kept / 1024:9.1f} KiB kept")

# %% tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
titles = ("Error of the gradient", "Time, forward and backward", "Memory kept for the backward pass")
units = ("relative error", "milliseconds", "KiB")
for column, (axis, title, unit, scale) in enumerate(zip(axes, titles, units, (1, 1000, 1 / 1024), strict=True)):
    for method, color in zip(methods, (ORANGE, PINK, BLUE), strict=True):
        values = [scale * m[column] for m in measured[method]]
        if max(values) > 0:
            axis.loglog(BUDGETS, values, "o-", color=color, label=method, markersize=4)
    axis.set(title=title, xlabel="iterations k", ylabel=unit)
    axis.grid(alpha=0.25)
axes[0].legend(loc="lower left")
axes[2].text(BUDGETS[0], 0.3, "finite differences keep nothing", color=PINK)
axes[2].set_ylim(bottom=0.2)
plt.show()

# %% [markdown]
# *Error*: with few iterations all three methods are wrong, since none has reached x*. Then the errors of the two exact
# methods fall at the rate of the contraction, down to rounding. Finite differences stop near 10⁻⁹: a smaller h loses more to
# cancellation than it gains, and a larger h loses more to curvature. *Time*: implicit and unrolled gradients take about the
# same time, one backward iteration for each forward iteration. Finite differences solve 200 problems, here in one batch, and
# more for each further entry of b. *Memory*: the implicit method keeps the answer and the context for any k, and the unrolled
# method keeps everything. This is why implicit layers can afford thousands of iterations and large images.
#
# The library's default goes further: L-BFGS forward and conjugate gradients backward need a few dozen steps where the plain
# iteration needs hundreds.

# %%
default = minimize(energy, x0, leaf, termination=ACCURATE)
(by_default,) = torch.autograd.grad(loss(default.value), leaf)
print(f"{int(default.num_steps)} steps of L-BFGS, relative error of the gradient {error_of(by_default):.1e}")

# %% [markdown]
# ## What this page claims

# %%
along = torch.tensor(1e-5)
ahead, behind = (minimize(valley, fall.value.detach(), falls_z.detach() + s * along).value for s in (1, -1))
assert torch.allclose(tangent, (ahead - behind) / (2 * along), atol=1e-4)
assert all(error < 1e-9 for name, error in errors.items() if name != "finite differences")
assert errors["finite differences"] < 1e-6
kept = {method: [m[2] for m in values] for method, values in measured.items()}
assert len(set(kept["implicit"])) == 1  # memory does not grow
growth = [(later - sooner) / (m - k) for k, m, sooner, later in zip(BUDGETS, BUDGETS[1:], kept["unrolled"], kept["unrolled"][1:])]
assert max(growth) < 1.1 * min(growth)  # and there it grows by as much with each iteration
assert measured["implicit"][-1][0] < 1e-9 and measured["implicit"][0][0] > 0.01
assert int(default.num_steps) < 100 and error_of(by_default) < 1e-9
