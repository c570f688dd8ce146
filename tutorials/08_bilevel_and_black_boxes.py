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
# # 8 · Bilevel problems and black boxes: a toll for a shortcut
#
# You will learn
# - how to give exact derivatives to an external solver, here SciPy, with `implicit`;
# - how to minimize an energy whose value contains another solve: a bilevel problem;
# - how to differentiate the outer answer as well, through both levels.

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
import torch

from energynet import ConvergenceError, NewtonCG, gradient, implicit, minimize

# %%
torch.set_default_dtype(torch.float64)
CONSTANT = 1.0  # minutes on each of the two wide roads
SPREAD = 0.15  # minutes by which travelers misjudge a route
COLLECTING = 0.02  # what it costs to collect a toll, times its square
DEMANDS = torch.linspace(0.55, 1.9, 28)  # travelers, in thousands
TOLLS = torch.linspace(0.0, 1.2, 31)  # minutes that one would drive to save the toll
SHOWN = 1.2  # a demand to look at closely

BLUE, GREEN, ORANGE, GRAY = "#0072b2", "#009e73", "#d55e00", "#666666"
plt.rcParams.update({"figure.dpi": 110, "legend.frameon": False})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The problem
#
# Travelers go from S to T. Two narrow roads, S–A and B–T, take as many minutes as they carry thousands of cars. Two wide
# roads, A–T and S–B, always take one minute. Somebody builds a shortcut A–B that takes no time at all, and everybody is late:
# the shortcut draws all cars onto both narrow roads. This is Braess's paradox (1968). Which toll on the shortcut makes the
# average trip shortest?
#
# On the *lower level*, for a given toll, traffic settles: each traveler takes the route that seems quickest, with a small
# error of judgment. The two delays x on the narrow roads are then the minimizer of a convex energy (Fisk, 1980; this is its
# dual form). Its slope is x − cars, so at the minimum each delay equals the one that its cars cause. On the *upper level*, we
# choose the toll by the average time of a trip, which depends on where traffic settles. A minimization over the answer of
# another minimization is called a *bilevel* problem.


# %%
def route_times(x):  # (B, 2) -> (B, 3): S–A–T, S–B–T, S–A–B–T
    return torch.stack([x[:, 0] + CONSTANT, x[:, 1] + CONSTANT, x[:, 0] + x[:, 1]], dim=-1)


def felt(x, toll):  # (B, 2), (B, 1) -> (B, 3), the toll counts like minutes
    return route_times(x) + toll * torch.tensor([0.0, 0.0, 1.0])


def traffic(x, toll, demand):  # (B, 2), (B, 1), (B,) -> (B,)
    choice = SPREAD * torch.logsumexp(-felt(x, toll) / SPREAD, dim=-1)
    return 0.5 * x.square().sum(-1) + demand * choice


def settle(toll, demand):  # (B, 1), (B,) -> (B, 2)
    return minimize(traffic, torch.zeros(len(toll), 2), toll, demand).value


def trip(x, toll):  # (B, 2), (B, 1) -> (B,), minutes of an average trip
    return (torch.softmax(-felt(x, toll) / SPREAD, dim=-1) * route_times(x)).sum(-1)


def city(toll, demand):  # (B, 1), (B,) -> (B,): an energy with a solve inside
    return trip(settle(toll, demand), toll) + COLLECTING * toll.square().sum(-1)


# %% [markdown]
# ## The picture
#
# The left and middle panels show the network for 1,200 travelers, without a toll and with the best one. The width of a road
# is the share of travelers that use it; narrow roads are blue, wide ones green, and the shortcut is orange. The right panel
# shows the average trip for every demand and toll. The black curve is the best toll, found by one call of `minimize` on
# `city` for all demands at once, and the orange tangents are its derivative with respect to the demand, through both levels.

# %%
demand = DEMANDS.clone().requires_grad_()
best = minimize(city, torch.full((len(DEMANDS), 1), 0.4), demand, solver=NewtonCG())
(slope,) = torch.autograd.grad(best.value.sum(), demand)  # d toll* / d demand
print(best)
print("demand", tuple(demand.shape), "  toll*", tuple(best.value.shape), "  slope", tuple(slope.shape))

# %% tags=["hide-input"]
places = {"S": (0.0, 0.5), "A": (0.5, 0.95), "B": (0.5, 0.05), "T": (1.0, 0.5)}
roads = {"SA": (0, 2), "AT": (0,), "SB": (1,), "BT": (1, 2), "AB": (2,)}  # and the routes that use them
nearest = int((DEMANDS - SHOWN).abs().argmin())
best_toll = best.value.detach()[nearest]
figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), width_ratios=(1, 1, 1.45), layout="constrained")
averages = []
for axis, toll, title in zip(axes, (torch.zeros(1), best_toll), ("no toll", f"toll of {float(best_toll):.2f} min"), strict=False):
    x = settle(toll[None], torch.tensor([SHOWN]))
    share = torch.softmax(-felt(x, toll[None]) / SPREAD, dim=-1)[0]
    averages.append(float(trip(x, toll[None])))
    for road, routes in roads.items():
        (x0, y0), (x1, y1) = places[road[0]], places[road[1]]
        full = float(share[list(routes)].sum())
        color = ORANGE if road == "AB" else BLUE if road in ("SA", "BT") else GREEN
        axis.plot([x0, x1], [y0, y1], color=color, linewidth=1 + 20 * full, solid_capstyle="round", alpha=0.75)
        shift = (0.13, 0.0) if road == "AB" else (0.0, 0.14 if y0 + y1 > 1 else -0.14)
        axis.text((x0 + x1) / 2 + shift[0], (y0 + y1) / 2 + shift[1], f"{full:.0%}", ha="center", va="center", color=color)
    for name, (px, py) in places.items():
        axis.plot(px, py, "o", color="black", markersize=19)
        axis.text(px, py, name, color="white", ha="center", va="center", fontweight="bold")
    axis.set(title=f"{title}: trip of {averages[-1]:.2f} min", xlim=(-0.1, 1.1), ylim=(-0.1, 1.1), aspect="equal")
    axis.axis("off")
pairs = torch.cartesian_prod(DEMANDS, TOLLS)
with torch.no_grad():
    surface = city(pairs[:, 1:], pairs[:, 0]).reshape(len(DEMANDS), len(TOLLS))
above = 60 * (surface - surface.amin(1, keepdim=True))
shown = axes[2].contourf(DEMANDS, TOLLS, above.mT, levels=range(17), cmap="viridis_r", extend="max")
figure.colorbar(shown, ax=axes[2], label="seconds lost against the best toll", ticks=range(0, 17, 4))
tolls = best.value.detach().flatten()
axes[2].plot(DEMANDS, tolls, color="black", linewidth=2.5, label="best toll")
for k in range(1, len(DEMANDS), 6):
    reach = torch.tensor([-0.13, 0.13])
    axes[2].plot(DEMANDS[k] + reach, tolls[k] + reach * slope[k], color="#ff7f0e", linewidth=3, zorder=4)
    axes[2].plot(DEMANDS[k], tolls[k], "o", color="white", markeredgecolor="#ff7f0e", markeredgewidth=2, zorder=5)
axes[2].plot([], [], color="#ff7f0e", linewidth=3, label="its derivative, through both levels")
axes[2].set(xlabel="travelers, thousands", ylabel="toll on the shortcut, minutes", title="The best toll for each demand",
            xlim=(float(DEMANDS[0]), float(DEMANDS[-1])), ylim=(0, 1.2))  # fmt: skip
axes[2].legend(loc="upper right", frameon=True, framealpha=0.85)
plt.show()

# %% [markdown]
# ## A black box
#
# Traffic models are often somebody else's program. Suppose that ours is SciPy's `minimize` on a NumPy function, which knows
# nothing of tensors. `implicit(solve, optimality)` makes it differentiable. It needs the solver and a condition, written in
# torch, that its answers satisfy. Here the condition is that each delay equals the one that the cars cause.


# %%
def scipy_settles(toll, demand):  # (), () -> (2,)
    def numpy_energy(x):
        felt = np.array([x[0] + CONSTANT, x[1] + CONSTANT, x[0] + x[1] + toll.item()])
        return 0.5 * x @ x + demand.item() * SPREAD * np.log(np.exp(-felt / SPREAD).sum())

    return torch.from_numpy(scipy.optimize.minimize(numpy_energy, np.zeros(2), method="BFGS").x)


def delay_is_cars(x, toll, demand):  # (2,), (), () -> (2,): zero at the answer
    return gradient(traffic, x[None], toll.reshape(1, 1), demand.reshape(1))[0]


toll, one_demand = torch.tensor(0.3), torch.tensor(SHOWN)
try:
    implicit(scipy_settles, delay_is_cars, symmetric=True)(toll, one_demand)
except ConvergenceError as error:
    refused = str(error)
print(textwrap.fill(refused, 110))

# %% [markdown]
# The answer is refused, and rightly so: BFGS with difference quotients stops when the slope is below 10⁻⁵, and the gradient
# at a point that is not the answer is not the gradient of the answer. So we give SciPy the slope and let `root` find its zero
# to a tight tolerance. (`symmetric=True` says that the condition is itself a gradient, so that conjugate gradients may solve
# the adjoint equation.)


# %%
def scipy_settles_well(toll, demand):  # (), () -> (2,)
    def slope(x):
        felt = np.array([x[0] + CONSTANT, x[1] + CONSTANT, x[0] + x[1] + toll.item()])
        share = np.exp(-felt / SPREAD) / np.exp(-felt / SPREAD).sum()
        return x - demand.item() * np.array([share[0] + share[2], share[1] + share[2]])

    return torch.from_numpy(scipy.optimize.root(slope, np.zeros(2), tol=1e-13).x)


black_box = implicit(scipy_settles_well, delay_is_cars, symmetric=True)


def trip_of_black_box(toll):  # () -> ()
    return trip(black_box(toll, one_demand)[None], toll.reshape(1, 1))[0]


def trip_of_minimize(toll):  # () -> ()
    return trip(settle(toll.reshape(1, 1), one_demand.reshape(1)), toll.reshape(1, 1))[0]


print("delays     ", tuple(black_box(toll, one_demand).shape), black_box(toll, one_demand).tolist())
derivatives = {}
for name, function in (("black box", trip_of_black_box), ("minimize", trip_of_minimize)):
    first, second = torch.func.grad(function)(toll), torch.func.hessian(function)(toll)
    derivatives[name] = torch.stack([function(toll), first, second])
    print(f"{name:10}  trip {float(derivatives[name][0]):.8f}   d/dtoll {float(first):.8f}   d²/dtoll² {float(second):.8f}")

# %% [markdown]
# We get derivatives of any order, although SciPy provided none. The black box was called without gradients, and only its
# answer was used.
#
# ## An energy that contains a solve
#
# `city` calls `minimize` inside, and is an energy like any other: it returns one number per sample. Minimizing it needs its
# gradient, which is a gradient *through* the inner solve; `NewtonCG` needs second derivatives through it; and the derivative
# of the best toll with respect to the demand comes from the outer optimality condition, whose derivatives are needed in turn.
# The rule is the same at every level: differentiate the condition at the answer. We compare the outermost derivative with the
# best tolls of neighboring demands.

# %%
with torch.no_grad():
    nudge = 1e-4
    ahead = minimize(city, best.value, DEMANDS + nudge, solver=NewtonCG()).value
    behind = minimize(city, best.value, DEMANDS - nudge, solver=NewtonCG()).value
quotient = (ahead - behind).flatten() / (2 * nudge)
for k in range(1, len(DEMANDS), 6):
    print(f"demand {DEMANDS[k]:.2f}   toll* {tolls[k]:.4f}   slope {slope[k]:8.5f}   difference quotient {quotient[k]:8.5f}")

# %% [markdown]
# The inner problem is solved again in each evaluation of the outer one. This is the price of nesting in any library; here it
# is paid once for all demands, since they are one batch at both levels.
#
# For this to work, the inner answer must be unique (the energy of traffic is strictly convex) and accurate enough. If an
# inner solve fails, it raises inside the outer one, with the numbers of the samples, so that no failure goes unnoticed.
#
# ## What this page claims

# %%
assert best.converged.all()
assert averages[1] < averages[0] - 0.1  # the toll helps
assert ((TOLLS[surface.argmin(1)] - tolls).abs() <= TOLLS[1] - TOLLS[0]).all()  # the best of the grid is next to it
with torch.no_grad():
    assert (city(best.value, DEMANDS) <= surface.amin(1)).all()
assert "tolerance" in refused and "scipy_settles" in refused
assert torch.allclose(derivatives["black box"], derivatives["minimize"], rtol=1e-6)
assert torch.allclose(slope, quotient, atol=1e-4)
