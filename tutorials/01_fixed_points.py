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
# - which γ diverge, and how the library tells you;
# - that the gradient of the answer depends on the answer alone, not on γ or the path.

# %%
import matplotlib.pyplot as plt
import torch

from energynet import ConvergenceError, GradientStep, Picard, Status, Termination, gradient, minimize

torch.set_default_dtype(torch.float64)

# %% [markdown]
# ## An energy
#
# One unknown a sample, one context value a sample. `energy` returns one scalar a sample.
# Its second derivative, 1 + (1 − tanh²(x − z)), lies in (1, 2]: the energy is strongly convex and has one minimiser.


# %%
def energy(x, z):  # (B, 1), (B, 1) -> (B,)
    return (0.5 * x.square() + torch.log(torch.cosh(x - z))).sum(-1)


z = torch.tensor([[1.0], [3.0]])
x = torch.zeros(2, 1)
print("x", tuple(x.shape), "z", tuple(z.shape))
print("energy", tuple(energy(x, z).shape), "gradient", tuple(gradient(energy, x, z).shape))

# %% [markdown]
# ## A step and its fixed point
#
# One gradient step is the map g(x) = x − γ E′(x). Where it no longer moves x, the slope is zero: a fixed point of g is a
# minimiser of E. With the solver `Picard`, `minimize` iterates g until each sample has arrived. (Its default is L-BFGS, which
# needs no γ.)

# %%
tight = Termination(atol=1e-10, rtol=0.0)
solution = minimize(energy, x, z, step_size=0.5, solver=Picard(), termination=tight)
print(solution)
print("x*   ", solution.value.flatten().tolist())
print("slope", gradient(energy, solution.value, z).flatten().tolist())
print("steps", solution.num_steps.tolist())

# %% [markdown]
# ## The contraction factor
#
# Near x* the map shrinks distances by ρ = |1 − γ E″(x*)|. It contracts for 0 < γ < 2/E″ and is fastest at γ = 1/E″, where
# one unknown arrives faster than any geometric rate. Below that it comes from one side; above, it jumps from side to side.
# With many unknowns the curvatures spread over [μ, L], and 2/(L + μ) is the best compromise.

# %%
z1 = z[:1]
finest = Termination(atol=1e-14, rtol=0.0)
best = minimize(energy, torch.zeros(1, 1), z1, step_size=0.5, solver=Picard(), termination=finest).value
curvature = 2 - torch.tanh(best - z1).square().item()
print(f"x* = {best.item():.6f}, E'' = {curvature:.4f}, diverges beyond γ = {2 / curvature:.4f}")


def path(gamma, steps, start=4.0):
    """The iterates x_0 ... x_steps, (steps + 1,)."""
    step, points = GradientStep(energy, gamma), [torch.full((1, 1), start)]
    for _ in range(steps):
        points.append(step(points[-1], z1).detach())
    return torch.cat(points).flatten()


gammas = (0.1, 0.4, 1.0)
for gamma in gammas:
    errors = (path(gamma, 60) - best.item()).abs()
    k = int((errors > 1e-9).sum()) - 1  # the last error above rounding
    seen, predicted = float(errors[k] / errors[k - 1]), abs(1 - gamma * curvature)
    print(f"γ = {gamma:.2f}   predicted rate {predicted:.4f}   seen {seen:.4f}")
    assert abs(seen - predicted) < 0.02

# %% [markdown]
# ## What diverges, and how it is told
#
# γ may differ from sample to sample. Here each of four samples solves the same problem with its own γ; the last exceeds
# 2/E″ and must fail. The default policy raises, and the message names the sample, the likely cause and the remedy.


# %%
def quadratic(x, z):  # curvature 4 everywhere: γ must lie below 0.5
    return 2 * (x - z).square().sum(-1)


four = torch.ones(4, 1)
step_sizes = torch.tensor([0.05, 0.25, 0.45, 0.6])
try:
    minimize(quadratic, torch.zeros(4, 1), four, step_size=step_sizes, solver=Picard())
except ConvergenceError as error:
    message = str(error)
print(message)

# %% [markdown]
# With `on_failure="ignore"` the solve returns, and `Solution.status` tells of each sample: the failed one has not touched
# the others. Too few steps are another kind of failure, and NaN a third.

# %%
ignored = minimize(quadratic, torch.zeros(4, 1), four, step_size=step_sizes, solver=Picard(), on_failure="ignore")
for gamma, status, steps in zip(step_sizes.tolist(), ignored.status.tolist(), ignored.num_steps.tolist(), strict=True):
    print(f"γ = {gamma:.2f}   {Status(status).name:10} after {steps} steps")

zero, one, nan = torch.zeros(1, 1), torch.ones(1, 1), torch.full((1, 1), torch.nan)
hasty = minimize(quadratic, zero, one, step_size=0.01, solver=Picard(), termination=Termination(max_steps=5), on_failure="ignore")
broken = minimize(quadratic, zero, nan, step_size=0.25, solver=Picard(), on_failure="ignore")
print(Status(hasty.status.item()).name, "and", Status(broken.status.item()).name)
print("MAX_STEPS:", Status.MAX_STEPS.sentence)

# %% [markdown]
# ## The gradient does not know the path
#
# E′(x*, z) = 0 for every z. Differentiating this in z gives dx*/dz = t/(1 + t) with t = 1 − tanh²(x* − z): nothing in it
# depends on γ or on how many steps were taken.

# %%
leaf = z.clone().requires_grad_()
slopes = []
for gamma in (0.2, 0.5, 0.9):
    fine = Termination(atol=1e-13, rtol=1e-13)
    x_star = minimize(energy, torch.zeros(2, 1), leaf, step_size=gamma, solver=Picard(), termination=fine).value
    (slope,) = torch.autograd.grad(x_star.sum(), leaf)
    slopes.append(slope)
    print(f"γ = {gamma}   dx*/dz = {slope.flatten().tolist()}")
t = 1 - torch.tanh(x_star.detach() - z).square()

# %% [markdown]
# ## The picture
#
# Left: the energy and the path of the iterates for three γ that converge. Right: distance from x* against step, with the
# predicted rate dashed, and one γ beyond 2/E″: it jumps to and fro for ever and never arrives.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
grid = torch.linspace(-4.3, 4.6, 200)[:, None]
left.plot(grid.flatten(), energy(grid, z1.expand_as(grid)), color="0.25", linewidth=1.5)
colours = ("#0072b2", "#009e73", "#d55e00")
for offset, gamma, colour in zip((0.0, 1.1, 2.2), gammas, colours, strict=True):
    points = path(gamma, 25)
    heights = energy(points[:, None], z1.expand(len(points), 1)) + offset
    left.plot(points, heights, "o-", color=colour, markersize=3.5, linewidth=1, label=f"γ = {gamma}")
    errors = (path(gamma, 60) - best.item()).abs().clamp_min(1e-16)
    shown = errors > 1e-12
    right.semilogy(torch.arange(61)[shown], errors[shown], "o", color=colour, markersize=3.5, label=f"γ = {gamma}")
    k = min(20, int(shown.sum()) - 1)
    rate = abs(1 - gamma * curvature)
    steps = torch.arange(61)
    line = errors[k] * rate ** (steps - k)
    keep = (line > 1e-12) & (line < 30)
    right.semilogy(steps[keep], line[keep], "--", color=colour, linewidth=1)
left.axvline(best.item(), color="0.7", linewidth=0.8, zorder=0)
left.set(title="The energy and the path (raised for clarity)", xlabel="x", ylabel="E(x, z = 1)")
left.legend(frameon=False)
diverging = 1.5
right.semilogy((path(diverging, 60) - best.item()).abs(), ".", color="#cc79a7", markersize=3.5, label=f"γ = {diverging}")
right.set(title="Distance from x*: seen (dots), predicted (dashed)", xlabel="step", ylabel="|x − x*|")
right.legend(frameon=False, ncols=2)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## What this page claims

# %%
assert solution.converged.all()
assert gradient(energy, solution.value, z).abs().max() < 1e-9
assert "DIVERGED" in message and "number 3" in message and "step size" in message
assert ignored.status.tolist() == [Status.CONVERGED] * 3 + [Status.DIVERGED]
assert torch.allclose(ignored.value[:3], four[:3])
assert hasty.status.item() == Status.MAX_STEPS and broken.status.item() == Status.NONFINITE
assert all(torch.allclose(slope, t / (1 + t), rtol=1e-8) for slope in slopes)
assert (path(diverging, 60) - best.item()).abs()[-10:].min() > 0.1
