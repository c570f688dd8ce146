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
# # 4 · Second derivatives: Newton on hyperparameters
#
# You will learn
# - how to take a Hessian through a solver, and how to put a gradient penalty into a loss;
# - how to tune hyperparameters by Newton's method in a few steps;
# - why the usual way to write an implicit layer silently gives wrong second derivatives.

# %%
import matplotlib.pyplot as plt
import torch

from energynet import NewtonCG, Termination, gradient, minimize

# %%
torch.set_default_dtype(torch.float64)
torch.manual_seed(5)
COSINES = 16  # basis functions of the fit
TRAINING, VALIDATION = 24, 200  # numbers of points
NOISE = 0.25
START = (1.5, 0.5)  # hyperparameters: log strength, exponent
NEWTON_STEPS, DESCENT_STEPS, DESCENT_RATE = 8, 40, 8.0
LONGEST = 2.0  # a Newton step is not longer than this
ACCURATE = Termination(atol=1e-12, rtol=1e-12)

BLUE, GREEN, ORANGE, GRAY = "#0072b2", "#009e73", "#d55e00", "#666666"
plt.rcParams.update({"figure.dpi": 110, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The problem
#
# We fit a curve through noisy points by cosines. The weights w minimize an energy: a robust misfit, plus a penalty on each
# cosine that grows with its frequency k as strength · kᵖ. How strong should it be, and which p is best? These two
# *hyperparameters* h = (log strength, p) should make the fit good on validation points, which the energy does not see. The
# loss is a function of the answer of a solver:
#
# $$L(h) = \text{misfit on validation points of}\; w^*(h), \qquad w^*(h) = \arg\min_w E(w, h).$$

# %%
frequency = torch.arange(1, COSINES + 1, dtype=torch.float64)


def cosines(t):  # (m,) -> (m, n)
    return torch.cos(torch.pi * (frequency - 1) * t[:, None])


def truth(t):
    return torch.sin(5 * t) * torch.exp(-t) + 0.3 * t


t_train, t_valid = torch.rand(TRAINING), torch.linspace(0, 1, VALIDATION)
y_train = truth(t_train) + NOISE * torch.randn(TRAINING)
y_valid = truth(t_valid) + NOISE * torch.randn(VALIDATION)
train, valid = cosines(t_train), cosines(t_valid)


def energy(w, h):  # (B, n), (B, 2) -> (B,)
    misfit = torch.log(torch.cosh(w @ train.mT - y_train)).sum(-1)
    penalty = torch.exp(h[:, :1] + h[:, 1:] * frequency.log())  # strength · kᵖ, (B, n)
    return misfit + 0.5 * (penalty * w.square()).sum(-1)


def fit(h):  # (B, 2) -> (B, n)
    w0 = torch.zeros(len(h), COSINES)
    return minimize(energy, w0, h, solver=NewtonCG(), termination=ACCURATE).value


def loss(h):  # (2,) -> ()
    return torch.log(torch.cosh(fit(h[None])[0] @ valid.mT - y_valid)).mean()


start = torch.tensor(START)
print("h", tuple(start.shape), "  w*", tuple(fit(start[None]).shape), f"  loss {float(loss(start)):.4f}")

# %% [markdown]
# ## The picture
#
# The left panel shows the validation loss as a function of the two hyperparameters; each point of a grid is one solve, and
# all of them are one batch. Gradient descent creeps along the valley. Newton's method, which knows the curvature of the
# valley, reaches the bottom after a few steps. The right panel shows the fit before and after.


# %%
def newton(h):
    """The points of Newton's method, (steps + 1, 2)."""
    points = [h]
    for _ in range(NEWTON_STEPS):
        slope, hessian = torch.func.grad(loss)(h), torch.func.hessian(loss)(h)  # (2,), (2, 2)
        values, vectors = torch.linalg.eigh(hessian)
        curvatures = values.abs().clamp_min(1e-6)  # so that it goes downhill near a saddle, too
        step = vectors @ ((vectors.mT @ slope) / curvatures)
        h = h - step * min(1.0, LONGEST / float(step.norm()))
        points.append(h)
    return torch.stack(points)


def descent(h):
    """The points of gradient descent, (steps + 1, 2)."""
    points = [h]
    for _ in range(DESCENT_STEPS):
        h = h - DESCENT_RATE * torch.func.grad(loss)(h)
        points.append(h)
    return torch.stack(points)


by_newton, by_descent = newton(start), descent(start)

# %% tags=["hide-input"]
strength, exponent = torch.linspace(-8, 2, 41), torch.linspace(0, 5, 41)
grid = torch.cartesian_prod(strength, exponent)  # (1681, 2)
weights = fit(grid)
surface = torch.log(torch.cosh(weights @ valid.mT - y_valid)).mean(-1).reshape(len(strength), len(exponent))

figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), width_ratios=(1.2, 1), layout="constrained")
excess = (surface - loss(by_newton[-1])).clamp_min(1.1e-5)
levels = torch.logspace(-5, 0, 21)
shown = left.contourf(strength, exponent, excess.mT, levels=levels, cmap="viridis_r", norm="log", extend="max")
left.contour(strength, exponent, excess.mT, levels=levels, colors="white", linewidths=0.3)
colors = figure.colorbar(shown, ax=left, label="validation loss above the best")
colors.set_ticks([1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], labels=["10⁻⁵", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"])
left.plot(*by_descent.T, ".-", color="white", markersize=4, linewidth=1, label=f"gradient descent, {DESCENT_STEPS} steps")
left.plot(*by_newton.T, "o-", color="#ff7f0e", markersize=6, linewidth=1.8, label=f"Newton, {NEWTON_STEPS} steps")
left.plot(*start, "s", color="black", markersize=7, label="start")
left.plot(*by_newton[-1], "*", color="black", markersize=13, label="best")
left.set(xlabel="log strength", ylabel="exponent p", title="Tuning by derivatives through the solver")
left.legend(loc="lower left", facecolor="0.35", frameon=True, framealpha=0.75, labelcolor="white")
right.plot(t_train, y_train, "o", color=GRAY, markersize=5, label="training points")
right.plot(t_valid, truth(t_valid), color="0.75", linewidth=6, label="truth", zorder=0)
for h, color, name in ((start, BLUE, "fit at the start"), (by_newton[-1], ORANGE, "fit at the best")):
    right.plot(t_valid, fit(h[None])[0] @ valid.mT, color=color, linewidth=2, label=name)
right.set(xlabel="t", ylabel="y", title="The fit")
right.legend()
plt.show()

# %%
for k, h in enumerate(by_newton):
    slope = float(torch.func.grad(loss)(h).norm())
    print(f"Newton {k}   h = ({h[0]:7.4f}, {h[1]:7.4f})   loss {float(loss(h)):.8f}   |slope| {slope:.1e}")
print(f"descent {DESCENT_STEPS}  loss {float(loss(by_descent[-1])):.8f}")

# %% [markdown]
# ## A Hessian
#
# `torch.func.hessian(loss)` is all it takes: `minimize` works under `grad`, `jacrev`, `jacfwd`, `vmap` and their
# compositions. We compare it with central differences of the gradient. Internally, the gradient of a solve is the answer of
# another equation, (I − J)ᵀ c = v of tutorial 2. This equation is solved by a differentiable solve, so its answer can be
# differentiated in turn.


# %%
def difference(function, h, length=1e-4):
    """Jacobian of a function by central differences, two lengths extrapolated to zero."""

    def quotient(s):
        return torch.stack([(function(h + s * e) - function(h - s * e)) / (2 * s) for e in torch.eye(len(h))], -1)

    return (4 * quotient(length / 2) - quotient(length)) / 3


def relative(found, reference):
    return float((found - reference).norm() / reference.norm())


exact_gradient = difference(loss, start)
exact_hessian = difference(torch.func.grad(loss), start)
hessian = torch.func.hessian(loss)(start)
print("Hessian", tuple(hessian.shape), f"  relative difference {relative(hessian, exact_hessian):.1e}")

# %% [markdown]
# ## A gradient penalty
#
# Losses that include the squared length of their own gradient appear in flat-minimum training, meta-learning and
# physics-informed models. `create_graph=True` keeps the gradient differentiable, and one `backward` goes through both terms.


# %%
def penalized(layer_loss, h):
    """Gradient of L(h) + ‖∇L(h)‖², by plain autograd."""
    h = h.clone().requires_grad_()
    value = layer_loss(h)
    (slope,) = torch.autograd.grad(value, h, create_graph=True)
    return torch.autograd.grad(value + slope.square().sum(), h)[0]


exact_penalized = exact_gradient + 2 * exact_hessian @ exact_gradient
print(f"relative difference {relative(penalized(loss, start), exact_penalized):.1e}")

# %% [markdown]
# ## Where it usually goes wrong
#
# Most implicit layers are written like the one below: it solves without recording, takes one recorded step at the answer to
# connect it to its inputs, and registers a hook with a linear solve that corrects the gradient. Its first derivative is
# exact. But the answer is *detached*: for autograd, w* is a constant in the step and in the hook. A second derivative depends
# on how the step and the linear solve change with w*, and here this change is taken to be zero.


# %%
def usual_fit(h):  # (1, 2) -> (1, n)
    with torch.no_grad():
        w = minimize(energy, torch.zeros(1, COSINES), h.detach(), termination=ACCURATE).value
    w = w.detach()
    # I − J for a step of γ = 1:
    hessian = torch.func.hessian(lambda w: energy(w[None], h.detach())[0])(w[0])
    step = w - gradient(energy, w, h)  # equal to w, and tied to h
    if step.requires_grad:
        step.register_hook(lambda v: torch.linalg.solve(hessian, v[0])[None])  # (I − Jᵀ) c = v
    return step


def usual_loss(h):
    return torch.log(torch.cosh(usual_fit(h[None])[0] @ valid.mT - y_valid)).mean()


def by_autograd(layer_loss, h):
    """Gradient (2,) and Hessian (2, 2)."""
    h = h.clone().requires_grad_()
    (slope,) = torch.autograd.grad(layer_loss(h), h, create_graph=True)
    rows = [torch.autograd.grad(s, h, retain_graph=True)[0] for s in slope]
    return slope.detach(), torch.stack(rows)


errors = {}
for name, layer_loss in (("usual layer", usual_loss), ("energynet", loss)):
    slope, second = by_autograd(layer_loss, start)
    errors[name] = (
        relative(slope, exact_gradient),
        relative(penalized(layer_loss, start) - slope, exact_penalized - exact_gradient),
        relative(second, exact_hessian),
    )
    first, penalty, matrix = errors[name]
    print(f"{name:12} relative error of gradient {first:.1e}   gradient of the penalty {penalty:.1e}   Hessian {matrix:.1e}")

# %% tags=["hide-input"]
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
places = torch.arange(3)
for shift, (name, color) in zip((-0.19, 0.19), (("usual layer", ORANGE), ("energynet", BLUE)), strict=True):
    bars = axis.bar(places + shift, errors[name], 0.36, color=color, label=name, bottom=1e-14)
    axis.bar_label(bars, [f"{e:.0e}" if e < 0.01 else f"{e:.0%}" for e in errors[name]], padding=2)
axis.set(yscale="log", ylim=(1e-14, 300), ylabel="relative error", title="First derivatives agree, second ones do not")
axis.set_xticks(places, ("gradient", "gradient of the penalty", "Hessian"))
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# What remains of the error of energynet is the error of the finite differences. The usual layer gave no error message and no
# warning, but a number of the right shape and the wrong size. If it enters a training loss, training continues toward the
# wrong place. energynet keeps the answer connected in the graph, so that the chain rule is complete. An adjoint that is an
# approximation by design, such as `OneStepAdjoint`, raises when it is differentiated again.
#
# ## What this page claims

# %%
assert relative(hessian, exact_hessian) < 1e-6
assert relative(penalized(loss, start), exact_penalized) < 1e-6
assert torch.func.grad(loss)(by_newton[-1]).norm() < 1e-7
assert torch.linalg.eigvalsh(torch.func.hessian(loss)(by_newton[-1])).min() > 0
assert loss(by_newton[-1]) < loss(by_descent[-1]) < loss(start)
assert errors["usual layer"][0] < 1e-6 and min(errors["usual layer"][1:]) > 0.1
assert max(errors["energynet"]) < 1e-6
