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
# # 1 · Fixed points: one scalar energy
#
# You will learn
# - how the step size γ sets the contraction factor, and with it the number of steps;
# - which step sizes never converge, and how the library reports this for each sample;
# - that the gradient of the answer depends on the answer alone, and not on γ or the path.

# %%
import textwrap

import matplotlib.pyplot as plt
import torch

from energynet import ConvergenceError, GradientStep, Picard, Status, Termination, diagnostics, gradient, minimize

# %%
torch.set_default_dtype(torch.float64)
START = -2.0  # where every solve begins
CONTEXT = (1.0, 3.0)  # z, one value per sample
SWEEP = torch.linspace(0.05, 3.4, 1200)  # step sizes γ for the picture
STEP_SIZES = (0.4, 1.6, 2.8)  # three of them, looked at closely
ACCURATE = Termination(atol=1e-10, rtol=0.0)  # when a solve may stop
PATIENT = Termination(atol=1e-8, rtol=0.0, max_steps=400)

BLUE, GREEN, ORANGE, GRAY = "#0072b2", "#009e73", "#d55e00", "#666666"
plt.rcParams.update({"figure.dpi": 110, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The picture
#
# This page has one unknown x and one energy, E(x) = eˣ − z x, which is convex and has a single minimizer. Walk downhill with
# steps of size γ, and look at where the walk is after many steps. Up to γ = 2 it finds the minimizer. Beyond that it jumps
# between two points, then four, then eight, and finally it is chaotic: the energy has not changed, only γ has. The lower
# panel shows the number of steps. The best γ needs a handful, and theory predicts the whole curve. The rest of this page
# explains the picture, in which each of the 1,200 step sizes is one sample of a single batch.


# %%
def energy(x, z):  # (B, 1), (B, 1) -> (B,)
    return (torch.exp(x) - z * x).sum(-1)


# %% tags=["hide-input"]
def settled(step_sizes, warm_up=600, shown=120):
    """Where the walk is after many steps, (shown, B)."""
    step, x, z = GradientStep(energy, step_sizes), torch.full((len(step_sizes), 1), START), torch.ones(len(step_sizes), 1)
    places = []
    for k in range(warm_up + shown):
        x = step(x, z).detach()
        if k >= warm_up:
            places.append(x.flatten())
    return torch.stack(places)


sweep = minimize(
    energy, torch.full((len(SWEEP), 1), START), torch.ones(len(SWEEP), 1), step_size=SWEEP, solver=Picard(),
    termination=PATIENT, on_failure="ignore",
)  # fmt: skip
arrived = sweep.converged
predicted = torch.log(torch.tensor(1e-8)) / torch.log((1 - SWEEP).abs())  # ρᵏ = 1e-8, with ρ = |1 − γ|

figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 2), layout="constrained")
places = settled(SWEEP)
top.plot(SWEEP.expand_as(places).flatten(), places.flatten(), ",", color="#1b2a49", alpha=0.35, rasterized=True)
top.axhline(0, color=GREEN, linewidth=1, zorder=0)
top.text(3.43, 0, "x*", color=GREEN, va="center")
top.set(ylabel="x after many steps", ylim=(-6.2, 2.4), title="Gradient descent on eˣ − x: one minimum, many fates")
bottom.semilogy(SWEEP[arrived], sweep.num_steps[arrived], ".", color=BLUE, markersize=4, label="measured")
below = SWEEP < 1.985
bottom.semilogy(SWEEP[below], predicted[below].clamp_min(1), color=ORANGE, linewidth=1, label="predicted, ρᵏ = 10⁻⁸")
bottom.set(xlabel="step size γ", ylabel="steps to x*, within 10⁻⁸", ylim=(1, 700), xlim=(0, 3.4))
bottom.legend(loc="lower left")
bottom.text(2.7, 25, "never converges:\nStatus.MAX_STEPS", ha="center", va="center", color=GRAY)
bottom.axvspan(2, 3.4, color="0.93", zorder=0)
for axis in (top, bottom):
    axis.axvline(1, color=GREEN, linewidth=0.8, linestyle=":")
    axis.axvline(2, color=ORANGE, linewidth=0.8, linestyle=":")
top.text(1.03, -5.9, "γ = 1/E″(x*): fastest", color=GREEN)
top.text(2.03, -5.9, "γ = 2/E″(x*): the limit", color=ORANGE)
plt.show()

# %% [markdown]
# ## An energy
#
# `energy` above returns one scalar per sample: `x` and `z` have a leading batch dimension, and the result has no other
# dimension. It is the energy of a Poisson rate, where x is the logarithm of the rate and z the observed count. Its slope is
# eˣ − z, so the minimizer is x* = log z. Knowing the answer is convenient for a first page; only the checks make use of it.

# %%
z = torch.tensor(CONTEXT)[:, None]
x = torch.full_like(z, START)
print("x       ", tuple(x.shape), "  z       ", tuple(z.shape))
print("energy  ", tuple(energy(x, z).shape), "    gradient", tuple(gradient(energy, x, z).shape))

# %% [markdown]
# ## A step and its fixed point
#
# One gradient step is the map g(x) = x − γ E′(x). Where it no longer moves x, the slope is zero, so a *fixed point* of g is a
# minimizer of E. With the solver `Picard`, `minimize` iterates g until a sample has converged, and then leaves that sample
# alone. (The default solver of `minimize` is L-BFGS, which needs no γ. This page uses the plain iteration on purpose.)

# %%
solution = minimize(energy, x, z, step_size=0.5, solver=Picard(), termination=ACCURATE)
print(solution)
print("x*     ", solution.value.flatten().tolist())
print("log z  ", z.log().flatten().tolist())
print("slope  ", gradient(energy, solution.value, z).flatten().tolist())
print("steps  ", solution.num_steps.tolist())

# %% [markdown]
# ## The contraction factor
#
# Draw g as a curve and the diagonal y = x. A step goes vertically to the curve and horizontally to the diagonal; the fixed
# point is where they cross. If the absolute slope of the curve at the crossing is below 1, each step shrinks the distance by
# that factor, and the walk converges. The slope of g at x* is 1 − γ E″(x*), so the contraction factor is
#
# $$ρ = |1 - γ\,E''(x^*)|,$$
#
# which is below 1 for 0 < γ < 2/E″ and zero at γ = 1/E″. Here z = 1 and E″(x*) = e⁰ = 1. With many unknowns, the curvatures
# lie in an interval [μ, L]. Then γ must stay below 2/L, and γ = 2/(L + μ) is the best compromise.


# %% tags=["hide-input"]
def walk(gamma, steps):
    """The points x_0 ... x_steps, (steps + 1,)."""
    step, points = GradientStep(energy, gamma), [torch.full((1, 1), START)]
    for _ in range(steps):
        points.append(step(points[-1], torch.ones(1, 1)).detach())
    return torch.cat(points).flatten()


figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.9), sharey=True, layout="constrained")
line = torch.linspace(-3.2, 1.9, 200)[:, None]
for axis, gamma, color in zip(axes, STEP_SIZES, (BLUE, GREEN, ORANGE), strict=True):
    points = walk(gamma, 40)
    across, up = points[:-1].repeat_interleave(2), points.repeat_interleave(2)[1:-1]
    axis.plot(line, line, color="0.7", linewidth=1)
    axis.plot(line, GradientStep(energy, gamma)(line, torch.ones_like(line)).detach(), color="black", linewidth=1.5)
    axis.plot(across, up, color=color, linewidth=1)
    axis.plot(START, START, "o", color=color, markersize=5)
    axis.plot(0, 0, "*", color="black", markersize=9, zorder=5)
    slope = f"{1 - gamma:.1f}".replace("-", "−")
    axis.set(title=f"γ = {gamma}: slope of g at x* is {slope}", xlabel="x", xlim=(-3.2, 1.7), ylim=(-3.2, 1.7), aspect="equal")
axes[0].set_ylabel("g(x)")
axes[0].text(1.25, -0.35, "g", color="black")
axes[0].text(0.55, 1.05, "y = x", color="0.5", ha="right")
axes[0].text(-1.85, -2.25, "start", color=BLUE)
axes[0].text(0.1, -0.35, "x*", color="black")
plt.show()

# %% [markdown]
# The measured rate agrees with the formula. The library measures curvature and contraction for any energy, in any number of
# unknowns, by products with the Hessian:

# %%
rates = {}
for gamma in (0.2, 0.4, 1.6):
    errors = walk(gamma, 80).abs()  # x* = 0
    k = int((errors > 1e-9).sum()) - 1  # the last error above rounding
    rates[gamma] = float(errors[k] / errors[k - 1]), abs(1 - gamma)
    print(f"γ = {gamma:.1f}   measured {rates[gamma][0]:.4f}   predicted {rates[gamma][1]:.4f}")

curvature = diagnostics.curvature(energy, solution, z)
factor = diagnostics.contraction_factor(GradientStep(energy, 0.5), solution, z)
print("E″(x*)             ", curvature.largest.tolist())
print("γ must stay below  ", curvature.step_size_limit.tolist())
print("ρ at γ = 0.5       ", factor.tolist())

# %% [markdown]
# ## What never converges, and how it is reported
#
# A solve ends with one `Status` for each sample of the batch. Here eight samples cause trouble in three ways: a step size
# that is too large or too small, a context that is NaN, and an energy without a minimizer (for z < 0, eˣ − z x decreases
# forever). By default the solve raises, and the message says which samples failed, why, and what to try.

# %%
troubled_z = torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0], [torch.nan], [-1.0], [1.0]])
troubled_γ = torch.tensor([0.5, 1.0, 1.9, 2.8, 0.001, 0.5, 1.0, 0.9])
try:
    minimize(energy, torch.full((8, 1), START), troubled_z, step_size=troubled_γ, solver=Picard())
except ConvergenceError as error:
    message = str(error)
print(textwrap.fill(message, 110))

# %% [markdown]
# With `on_failure="ignore"` the solve returns, and `Solution.status` holds the status of each sample. The failed samples have
# not affected the others. (`on_failure="warn"` warns and returns.)

# %%
ignored = minimize(
    energy, torch.full((8, 1), START), troubled_z, step_size=troubled_γ,
    solver=Picard(), on_failure="ignore",
)  # fmt: skip
columns = troubled_z.flatten(), troubled_γ, ignored.status, ignored.num_steps
for context, gamma, status, steps in zip(*(c.tolist() for c in columns), strict=True):
    print(f"z = {context:4.1f}   γ = {gamma:5.3f}   {Status(status).name:10} {steps:5d} steps")

# %% [markdown]
# Energies that grow fast in every direction fail in another way. The energy 2 (x − z)² has curvature 4, so a γ above 2/4
# overshoots by more each time, and the walk goes to infinity: the status is `DIVERGED`.


# %%
def quadratic(x, z):  # (B, 1), (B, 1) -> (B,)
    return 2 * (x - z).square().sum(-1)


steep = minimize(
    quadratic, torch.zeros(2, 1), torch.ones(2, 1), step_size=torch.tensor([0.45, 0.6]),
    solver=Picard(), on_failure="ignore",
)  # fmt: skip
print([Status(s).name for s in steep.status.tolist()])
print(textwrap.fill("DIVERGED: " + Status.DIVERGED.sentence, 110))

# %% [markdown]
# ## The gradient does not know the path
#
# At the answer the slope is zero for every z: eˣ* − z = 0. Differentiating this equation with respect to z gives eˣ* dx*/dz −
# 1 = 0, so dx*/dz = e⁻ˣ* = 1/z. Neither γ, nor the starting point, nor the number of steps appears in it. The library does
# the same for any energy: `backward` differentiates the *condition* that the answer satisfies, and not the iterations that
# found it. Tutorial 2 shows how.

# %%
leaf = z.clone().requires_grad_()
slopes = {}
for gamma in (0.1, 0.3, 0.6):
    found = minimize(energy, x, leaf, step_size=gamma, solver=Picard(), termination=ACCURATE)
    (slopes[gamma],) = torch.autograd.grad(found.value.sum(), leaf)
    print(f"γ = {gamma}   {int(found.num_steps.max()):4d} steps   dx*/dz = {slopes[gamma].flatten().tolist()}")
print(f"1/z                   dx*/dz = {(1 / z).flatten().tolist()}")

# %% [markdown]
# ## What this page claims

# %%
assert solution.converged.all() and torch.allclose(solution.value, z.log(), atol=1e-9)
assert arrived[SWEEP < 1.9].all() and not arrived[SWEEP > 2].any() and (sweep.value[arrived].abs() < 1e-7).all()
slow = ((1 - SWEEP).abs() > 0.5) & (SWEEP < 1.9)  # around γ = 1 the first steps, far from x*, are most of the walk
assert (sweep.num_steps / predicted - 1)[slow].abs().max() < 0.25
assert all(abs(measured - formula) < 1e-3 for measured, formula in rates.values())
assert torch.allclose(curvature.largest, z.flatten()) and torch.allclose(factor, (1 - 0.5 * z).abs().flatten())
assert [Status(s).name for s in ignored.status.tolist()].count("CONVERGED") == 4 and "number" in message
assert torch.allclose(ignored.value[[0, 1, 2, 7]], torch.zeros(4, 1), atol=1e-6)
assert steep.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
assert all(torch.allclose(slope, 1 / z, rtol=1e-8) for slope in slopes.values())
