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
# # 3 · Your own energy: a chain that hangs as you wish
#
# You will learn
# - how to write an energy, and how `check_energy` finds mistakes that do not crash;
# - how to read a `Solution` that failed, and what to change;
# - how to train through the finished solver.

# %%
import textwrap

import matplotlib.pyplot as plt
import torch

from energynet import FPI_GD, LBFGS, Energy, NewtonCG, Status, diagnostics, minimize
from energynet.testing import CheckError, check_energy, check_layer

# %%
torch.set_default_dtype(torch.float64)
BEADS = 15
STIFFNESS = 20.0  # of each spring, in force per length; the pins are a length of 1 apart
REST = 0.4 / (BEADS + 1)  # length of a spring that pulls with no force
TRAINING_STEPS = 40

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#666666"
plt.rcParams.update({"figure.dpi": 110, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The picture
#
# Beads hang on springs between two pins. Each bead carries a weight, which pulls it down, or a balloon, which pulls it up.
# The chain comes to rest where its energy is least: the sum of ½ k (length − rest)² over the springs and of load × height
# over the beads. *Which* weights and balloons make it rest on a given curve? We draw three curves and let gradients find out:
# the loss is differentiated through the solver with respect to the loads. Thin gray lines are the chains during training.
#
# The whole program is the class and the loop below. The rest of the page shows how to arrive there.


# %%
class Chain(Energy):
    """Beads on springs between two pins, each with its own load."""

    def evaluate(self, x, loads, pins):  # (B, n, 2), (B, n), (B, 2, 2) -> (B,)
        chain = torch.cat([pins[:, :1], x, pins[:, 1:]], dim=1)  # (B, n + 2, 2)
        lengths = chain.diff(dim=1).square().sum(-1).sqrt()  # (B, n + 1)
        springs = 0.5 * STIFFNESS * (lengths - REST).square().sum(-1)
        return springs + (loads * x[..., 1]).sum(-1)

    def start(self, loads, pins):  # a straight line
        along = torch.linspace(0, 1, loads.shape[1] + 2)[1:-1, None]  # (n, 1)
        return pins[:, :1] * (1 - along) + pins[:, 1:] * along


def curves(across):  # (3, n) -> (3, n), the heights that are wanted
    wave, bridge, camel = across
    humps = [0.3 * torch.exp(-((camel - center) / 0.12).square()) for center in (0.32, 0.68)]
    wave, bridge = 0.25 * torch.sin(2 * torch.pi * wave), 0.35 * torch.sin(torch.pi * bridge)
    return torch.stack([wave, bridge, humps[0] + humps[1]])


pins = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).expand(3, 2, 2)
loads = torch.zeros(3, BEADS, requires_grad=True)
hang = FPI_GD(Chain(), solver=NewtonCG())
optimizer = torch.optim.LBFGS([loads], max_iter=TRAINING_STEPS, line_search_fn="strong_wolfe")
losses, shapes = [], [hang(loads, pins).detach()]


def closure():
    optimizer.zero_grad()
    x = hang(loads, pins, x0=shapes[-1])  # from the last shape: less to do
    loss = (x[..., 1] - curves(x[..., 0])).square().sum()
    loss.backward()  # through the solve
    losses.append(loss.item())
    shapes.append(x.detach())
    return loss


optimizer.step(closure)
print("loads", tuple(loads.shape), "  pins", tuple(pins.shape), "  x", tuple(shapes[-1].shape))
print(f"loss {losses[0]:.3f} -> {losses[-1]:.1e} in {len(losses)} evaluations")

# %% tags=["hide-input"]
final = hang(loads, pins).detach()
miss = (final[..., 1] - curves(final[..., 0])).abs().amax(1)  # (3,)
figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.4), sharey=True, layout="constrained")
grid = torch.linspace(0, 1, 200).expand(3, 200)
largest = float(loads.detach().abs().max())
whole = torch.cat([pins[:, :1], final, pins[:, 1:]], dim=1)
for k, (axis, name) in enumerate(zip(axes, ("a wave", "a bridge", "a camel"), strict=True)):
    axis.plot(grid[k], curves(grid)[k], color="0.8", linewidth=7, zorder=0, solid_capstyle="round", label="the curve we drew")
    for x in shapes[1:-1:3]:
        between = torch.cat([pins[k, :1], x[k], pins[k, 1:]])
        axis.plot(between[:, 0], between[:, 1], color="0.55", linewidth=0.5, alpha=0.6, zorder=1)
    axis.plot(whole[k, :, 0], whole[k, :, 1], color="black", linewidth=1.2, zorder=2)
    size = 30 + 300 * loads.detach()[k].abs() / largest
    dots = axis.scatter(
        final[k, :, 0], final[k, :, 1], s=size, c=loads.detach()[k], cmap="coolwarm", vmin=-largest, vmax=largest,
        edgecolors="black", linewidths=0.7, zorder=3,
    )  # fmt: skip
    axis.plot([0, 1], [0, 0], "s", color="black", markersize=7, zorder=4)
    axis.set(title=name, xlabel="across", aspect="equal", xlim=(-0.07, 1.07), ylim=(-0.42, 0.52))
axes[0].set_ylabel("height")
axes[0].legend(loc="lower left")
figure.colorbar(dots, ax=axes, label="load: balloon (−), weight (+)")
plt.show()

# %% [markdown]
# ## A first try
#
# An energy is a function E(x, context) that returns one number per sample. That is all the library asks for. Here is a first
# attempt at the chain. It runs, its output has the right shape, and it is wrong.


# %%
def first_try(x, loads, pins):  # (B, n, 2), (B, n), (B, 2, 2) -> (B,)
    chain = torch.cat([pins[:, :1], x, pins[:, 1:]], dim=1)
    lengths = chain.diff(dim=1).square().sum(-1).sqrt()
    return 0.5 * STIFFNESS * (lengths - REST).square().sum(-1) + (loads * x[..., 1]).sum()


given = torch.tensor([[0.1], [0.3], [-0.2]]).expand(3, BEADS)  # light, heavy, and all balloons
line = Chain().start(given, pins)
print("first_try returns", tuple(first_try(line, given, pins).shape))

# %% [markdown]
# ## Ask `check_energy`
#
# `check_energy` evaluates the energy at a point that you give, with at least three samples, and checks what every solver
# takes for granted: that derivatives agree with finite differences, that samples do not affect each other, that there is no
# randomness, that nothing is changed in place, and more.

# %%
try:
    check_energy(first_try, line, given, pins)
except CheckError as error:
    leak = str(error)
print(textwrap.fill(leak, 110))

# %% [markdown]
# The last `.sum()` runs over the batch as well, so that every chain carries the loads of all three. With a batch of one this
# would have been right, and no loss would have revealed it. With `.sum(-1)`, as in the class above, the check passes and
# reports more:

# %%
report = check_energy(Chain(), line, given, pins)
print(report)

# %% [markdown]
# `curvature` is that of E at the point we gave, from soft (a chain swings easily) to stiff (a spring is hard to stretch).
# `step_size` is a first guess of γ for gradient descent that is made from it.
#
# ## Read a failed `Solution`
#
# Now we solve. We begin with all beads at the origin, "because x0 = 0 always works", and with `on_failure="ignore"`, so that
# the solve returns whatever happens and we can look.

# %%
origin = torch.zeros_like(line)
failed = minimize(Chain(), origin, given, pins, on_failure="ignore")
print(failed)
print("status  ", [Status(s).name for s in failed.status.tolist()])
print("error   ", failed.error.tolist())
print("steps   ", failed.num_steps.tolist())
print()
print(textwrap.fill(diagnostics.explain(failed), 110))

# %% [markdown]
# All samples failed after 0 steps, so the cause is the starting point. Between two beads at the same place the length is √0,
# and the derivative of √ at 0 is infinite. The remedy is a better starting point, a straight line between the pins.
# `Energy.start` is the place for it; then nobody has to pass `x0`.
#
# The next mistake is the step size. `FPI_GD` takes gradient steps, as in tutorial 1, unless it is given another solver.

# %%
guess = report.step_size
attempts = {
    "γ = 1": FPI_GD(Chain(), step_size=1.0, on_failure="ignore"),
    f"γ = {guess:.3f}, from the report": FPI_GD(Chain(), step_size=guess, on_failure="ignore"),
    "LBFGS()": FPI_GD(Chain(), solver=LBFGS(), on_failure="ignore"),
    "NewtonCG()": FPI_GD(Chain(), solver=NewtonCG(), on_failure="ignore"),
}
solutions = {name: layer.solve(given, pins) for name, layer in attempts.items()}
for name, found in solutions.items():
    statuses = ", ".join(Status(s).name for s in found.status.tolist())
    print(f"{name:30} {statuses:32} steps {found.num_steps.tolist()}   error ≤ {float(found.error.max()):.0e}")

# %% [markdown]
# With γ = 1 the chain is torn apart: γ must stay below 2 / (largest curvature). The γ of the report is safe and slow, since a
# step that is small enough for the stiff direction is tiny for the soft one. The energy is right, but the method does not
# suit it. L-BFGS learns the curvatures on its way; `NewtonCG` computes products with them and needs the fewest steps. The
# answers agree.
#
# ## Check the layer
#
# `check_layer` does for the whole solver what `check_energy` does for the energy. It checks that the answer does not depend
# on the start, that samples do not affect each other, that first and second derivatives agree with finite differences, and
# that `vmap` and float32 work.

# %%
print(check_layer(FPI_GD(Chain(), solver=NewtonCG()), given[:, :5], pins))

# %% [markdown]
# Then we train with the loop at the top of the page. Its loss falls by many powers of ten, because the gradient is exactly
# that of the answer.

# %% tags=["hide-input"]
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.semilogy(range(1, len(losses) + 1), losses, "o-", color=BLUE, markersize=3.5)
axis.set(xlabel="solves, forward and backward", ylabel="sum of squared misses", title="Learning the loads through the solver")
axis.grid(alpha=0.25)
plt.show()

# %% [markdown]
# ## What this page claims

# %%
assert "batch" in leak and first_try(line, given, pins).shape == (3,)
assert failed.status.tolist() == [Status.NONFINITE] * 3 and failed.num_steps.tolist() == [0] * 3
assert not solutions["γ = 1"].converged.any()
lbfgs, newton = solutions["LBFGS()"], solutions["NewtonCG()"]
assert lbfgs.converged.all() and newton.converged.all() and torch.allclose(lbfgs.value, newton.value, atol=1e-6)
assert newton.num_steps.max() < lbfgs.num_steps.max()
heights = newton.value[..., 1]
assert (heights[:2] < 0).all() and (heights[2] > 0).all() and heights[1].min() < heights[0].min()
assert miss.max() < 1e-2 and losses[-1] < 1e-4 * losses[0]
