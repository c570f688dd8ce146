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
# # 6 · Constraints: box, simplex, L1
#
# You will learn
# - how to keep an answer inside a set, or make it sparse, with one more argument: `prox=`;
# - that values and gradients agree with SciPy's and scikit-learn's solvers, which do not provide gradients;
# - what an active constraint does to the gradient, and how to learn a bound or a weight.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.optimize import lsq_linear
from scipy.optimize import minimize as scipy_minimize
from sklearn.linear_model import Lasso
from torch.autograd import grad

from energynet import Termination, minimize
from energynet.constraints import L1, Box, Simplex

torch.set_default_dtype(torch.float64)

# %% [markdown]
# You may want to change these numbers:

# %%
NUM_TARGETS = 72  # problems in the picture, all solved in one call
BOX = 1.0  # −1 ≤ x ≤ 1
WEIGHT = 0.8  # of the L1 term in the picture
ROWS, COLUMNS, BATCH = 20, 6, 4  # of the least-squares problems
TIGHT = Termination(atol=1e-12, rtol=1e-12, max_steps=20_000)  # exact answers, to compare with
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The picture
#
# The energy is a bowl with its lowest point at z: E(x, z) = ½ (x − z)ᵀ Q (x − z). Without a constraint the minimizer is z
# itself. Let z move around a circle and ask, for each z, for the lowest point *inside a square*, *on a segment*, and *with a
# price on every number that is not zero*.


# %%
def bowl(x, z, Q):  # (B, n), (B, n), (n, n) -> (B,)
    return 0.5 * ((x - z) @ Q * (x - z)).sum(-1)


Q = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
angle = torch.linspace(0, 2 * torch.pi, NUM_TARGETS + 1)[:-1]
z = 2.2 * torch.stack([angle.cos(), angle.sin()], dim=1)
sets = {"Box: −1 ≤ x ≤ 1": Box(-BOX, BOX), "Simplex: x ≥ 0, Σx = 1": Simplex(), f"L1: E + {WEIGHT} ‖x‖₁": L1(WEIGHT)}
answers = {name: minimize(bowl, torch.zeros_like(z), z, Q, prox=prox).value for name, prox in sets.items()}
print("z", tuple(z.shape), " x*", {name: tuple(x.shape) for name, x in answers.items()})

figure, axes = plt.subplots(1, 3, figsize=(12, 4.6), layout="constrained")
colors = plt.colormaps["twilight_shifted"](angle / (2 * torch.pi))
outlines = [
    ([-BOX, BOX, BOX, -BOX, -BOX], [-BOX, -BOX, BOX, BOX, -BOX]),
    ([0, 1], [1, 0]),
    ([-2.5, 2.5, np.nan, 0, 0], [0, 0, np.nan, -2.5, 2.5]),
]
for axis, (name, x), outline in zip(axes, answers.items(), outlines, strict=True):
    axis.plot(*outline, color="0.3", linewidth=1.5, zorder=1)
    if name.startswith("Box"):
        axis.fill(*outline, color="0.94", zorder=0)
    axis.plot([z[:, 0], x[:, 0]], [z[:, 1], x[:, 1]], color="0.75", linewidth=0.5, zorder=2)
    axis.scatter(*z.T, s=14, c=colors, zorder=3)
    axis.scatter(*x.T, s=46, c=colors, edgecolors="black", linewidths=0.6, zorder=4)
    axis.set(title=name, xlabel="x₁", aspect="equal", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("x₂")
figure.suptitle("small dots: the lowest point z of each bowl · large dots: the constrained minimizer x*", fontsize=11)
plt.show()

# %% [markdown]
# There are three things to see. Many answers lie exactly on a corner, where x* does not change when z moves a little. On an
# edge, x* moves along the edge only. With the L1 term, many different z share an answer that contains a zero, which is why L1
# is used to select variables.
#
# ## How it works
#
# A gradient step may leave the set, so each step is followed by a *proximal map* that brings it back:
#
# $$x ← \mathrm{prox}\bigl(x − γ ∇E(x)\bigr).$$
#
# For a set, the proximal map is the projection; for L1, it moves every number toward zero by γ · weight and stops there. The
# minimizer is a fixed point of the combined map, so again its gradient does not depend on the path that led to it. With
# `prox=`, the step size γ is chosen for you. The solver is FISTA (`Nesterov`); for bounds (`Box`, `NonNegative`) it is
# `ProjectedLBFGS`, which takes quasi-Newton steps within them, as SciPy's L-BFGS-B does. The adjoint equation is solved by
# GMRES, because a projected step is not symmetric.

# %% [markdown]
# ## Box: least squares with bounds, against SciPy
#
# We minimize ½‖Ax − b‖² with 0 ≤ x ≤ 0.5 for four right-hand sides at once. SciPy solves them one by one.


# %%
def fit(x, A, b):  # (B, n), (m, n), (B, m) -> (B,)
    return 0.5 * (x @ A.T - b).square().sum(-1)


A = torch.randn(ROWS, COLUMNS, generator=generator)
b = torch.randn(BATCH, ROWS, generator=generator) + A.sum(1) * 0.3
x0 = torch.zeros(BATCH, COLUMNS)
b_leaf = b.clone().requires_grad_()
boxed = minimize(fit, x0, A, b_leaf, prox=Box(0.0, 0.5), termination=TIGHT)


def scipy_box(b):  # (m,) -> (n,)
    return lsq_linear(A.numpy(), b, bounds=(0.0, 0.5), method="bvls", tol=1e-14).x


theirs = np.stack([scipy_box(row) for row in b.numpy()])
print("A", tuple(A.shape), "b", tuple(b.shape), "x*", tuple(boxed.value.shape))
print(boxed)
print(boxed.value.detach().numpy().round(4))
box_error = np.abs(boxed.value.detach().numpy() - theirs).max()
print(f"largest difference from SciPy {box_error:.1e}")

# %% [markdown]
# SciPy has no gradient, so we compute finite differences of its answers, which takes two solves for each of the 20 numbers in
# b. energynet needs one linear solve for all of them. The gradient of a number at its bound is exactly zero, and the other
# numbers behave as if the bounded ones were constants.


# %%
def differences(solve, point, h=1e-5):
    """Central differences of Σ solve(point), one number of the point at a time."""
    steps = h * np.eye(len(point))
    return np.array([(solve(point + step).sum() - solve(point - step).sum()) / (2 * h) for step in steps])


(box_gradient,) = grad(boxed.value[0].sum(), b_leaf)
box_differences = differences(scipy_box, b[0].numpy())
print("gradient of Σ x*[0] in b[0], first five:", box_gradient[0, :5].numpy().round(6))
print("finite differences of SciPy:            ", box_differences[:5].round(6))

# %% [markdown]
# A bound may be a tensor to learn. How much does the sum of the answer rise when the upper bound rises? It rises by one for
# each number at that bound, plus the compensating changes of the others.

# %%
ceiling = torch.tensor(0.5, requires_grad=True)
bounded = minimize(fit, x0, A, b, prox=Box(0.0, ceiling), termination=TIGHT).value
(ceiling_gradient,) = grad(bounded[0].sum(), ceiling)


def scipy_ceiling(upper):  # (1,) -> (n,)
    return lsq_linear(A.numpy(), b[0].numpy(), bounds=(0.0, upper[0]), method="bvls", tol=1e-14).x


ceiling_difference = differences(scipy_ceiling, np.array([0.5]))[0]
print(f"d Σ x*[0] / d ceiling = {ceiling_gradient:.6f}, finite difference of SciPy {ceiling_difference:.6f}")

# %% [markdown]
# ## Simplex: a portfolio, against SLSQP
#
# The shares x of n assets, with x ≥ 0 and Σx = 1, trade expected return against risk: they minimize ½ xᵀΣx − rᵀx. Most shares
# of the answer are zero. The gradient says how the portfolio shifts when an asset's expected return rises.


# %%
def risk(x, r, covariance):  # (B, n), (B, n), (n, n) -> (B,)
    return 0.5 * (x @ covariance * x).sum(-1) - (r * x).sum(-1)


factors = torch.randn(12, COLUMNS, generator=generator)
covariance = factors.T @ factors / 12
r = 0.4 * torch.randn(1, COLUMNS, generator=generator)
r_leaf = r.clone().requires_grad_()
portfolio = minimize(risk, torch.full_like(r, 1 / COLUMNS), r_leaf, covariance, prox=Simplex(), termination=TIGHT).value


def slsqp(r):  # (n,) -> (n,)
    S = covariance.numpy()
    return scipy_minimize(
        lambda x: 0.5 * x @ S @ x - r @ x,
        np.full(len(r), 1 / len(r)),
        jac=lambda x: S @ x - r,
        bounds=[(0, 1)] * len(r),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: np.ones_like(x)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    ).x


simplex_error = np.abs(portfolio[0].detach().numpy() - slsqp(r[0].numpy())).max()
jacobian = torch.stack([grad(share, r_leaf, retain_graph=True)[0][0] for share in portfolio[0]])  # (n, n)
columns = [(slsqp(r[0].numpy() + h) - slsqp(r[0].numpy() - h)) / 2e-4 for h in 1e-4 * np.eye(COLUMNS)]
simplex_differences = np.stack(columns, axis=1)
print("shares        ", portfolio[0].detach().numpy().round(4), " sum", round(portfolio.sum().item(), 12))
print(f"largest difference from SLSQP {simplex_error:.1e}")
print("d shares / d return of each asset\n", jacobian.numpy().round(3))

# %% [markdown]
# Each column sums to zero, since what one asset gains the others lose, and an asset that is not held has a row and a column of
# zeros.
#
# ## L1: the lasso, against scikit-learn
#
# We minimize ½‖Ax − b‖²/m + λ‖x‖₁ for forty values of λ in one call: the weight is a tensor with one value per sample. The
# lines show energynet's answers and the dots scikit-learn's. The short strokes are energynet's derivatives dx*/dλ at a few
# values of λ; they must be tangent to the lines.


# %%
def lasso_fit(x, A, b):  # (B, n), (m, n), (m,) -> (B,)
    return 0.5 * (x @ A.T - b).square().mean(-1)


truth = torch.tensor([1.5, -1.0, 0.6, 0.0, 0.0, 0.0])
b_lasso = A @ truth + 0.5 * torch.randn(ROWS, generator=generator)
weights = torch.linspace(0.02, 1.6, 40)[:, None].requires_grad_()  # (B, 1)
path = minimize(lasso_fit, torch.zeros(40, COLUMNS), A, b_lasso, prox=L1(weights), termination=TIGHT).value
slopes = torch.stack([grad(path[:, j].sum(), weights, retain_graph=True)[0][:, 0] for j in range(COLUMNS)], dim=1)


def scikit_learn(weight, positive=False):
    lasso = Lasso(alpha=weight, fit_intercept=False, tol=1e-13, max_iter=1_000_000, positive=positive)
    return lasso.fit(A.numpy(), b_lasso.numpy()).coef_


lam = weights.detach().flatten().numpy()
x_path = path.detach().numpy()
learned = np.stack([scikit_learn(weight) for weight in lam])
lasso_error = np.abs(x_path - learned).max()
print("weights", tuple(weights.shape), "x*", tuple(path.shape), f" largest difference from scikit-learn {lasso_error:.1e}")

figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
for j in range(COLUMNS):
    color = plt.colormaps["viridis"](j / COLUMNS)
    axis.plot(lam, x_path[:, j], color=color, linewidth=1.5, label=f"x{'₁₂₃₄₅₆'[j]}, true value {truth[j]:g}")
    axis.plot(lam[::2], learned[::2, j], "o", color=color, markersize=4)
    for k in (4, 14, 24):
        reach = np.array([-0.09, 0.09])
        axis.plot(lam[k] + reach, x_path[k, j] + slopes[k, j].item() * reach, color="#d55e00", linewidth=3, alpha=0.7, zorder=0)
axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
axis.set(title="The lasso path: energynet (lines), its dx*/dλ (strokes), scikit-learn (dots)", xlabel="weight λ", ylabel="x*")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## A proximal map of your own
#
# Any callable that maps (x, γ) to something like x will do. Here it is a price λ on the sum of x together with x ≥ 0, which
# scikit-learn calls `positive=True`.

# %%
own = minimize(lasso_fit, torch.zeros(1, COLUMNS), A, b_lasso, prox=lambda x, gamma: (x - 0.2 * gamma).relu(), termination=TIGHT)
print("own prox    ", own.value[0].numpy().round(5))
print("scikit-learn", scikit_learn(0.2, positive=True).round(5))

# %% [markdown]
# ## Learn the weight
#
# Which λ predicts new data best? The error on held-out rows is a function of λ through the minimizer, so it has a gradient,
# and plain gradient descent on log λ finds its minimum. (There is a kink wherever a number becomes zero; there the gradient
# is that of one side.)

# %%
A_new = torch.randn(200, COLUMNS, generator=generator)
b_new = A_new @ truth + 0.5 * torch.randn(200, generator=generator)


def held_out(weight):  # () or (B, 1) -> (B,)
    start = torch.zeros(weight.numel(), COLUMNS)
    return lasso_fit(minimize(lasso_fit, start, A, b_lasso, prox=L1(weight), termination=TIGHT).value, A_new, b_new)


log_weight = torch.tensor(0.0, requires_grad=True)
for _ in range(60):
    loss = held_out(log_weight.exp()).sum()
    (slope,) = grad(loss, log_weight)
    log_weight = (log_weight - 2.0 * slope).detach().requires_grad_()
found = log_weight.exp().item()
grid = torch.logspace(-3, 0.3, 200)[:, None]
errors = held_out(grid).detach()
best = grid[errors.argmin()].item()
print(f"gradient descent finds λ = {found:.4f}, a grid of 200 values {best:.4f}")

# %% [markdown]
# ## Where to go on
#
# `energynet.constraints` also has `NonNegative`, `L2Ball`, `GroupL2`, `Affine` (linear equations) and `TotalVariation`.
#
# ## What this page claims

# %%
box_points, simplex_points, sparse_points = answers.values()
assert box_points.abs().max() <= BOX
assert (simplex_points > -1e-12).all() and torch.allclose(simplex_points.sum(1), torch.ones(NUM_TARGETS))
assert (sparse_points == 0).any(1).sum() > NUM_TARGETS / 4
assert box_error < 1e-9 and np.abs(box_gradient[0].numpy() - box_differences).max() < 1e-6
assert abs(ceiling_gradient.item() - ceiling_difference) < 1e-6
assert simplex_error < 1e-6 and np.abs(jacobian.numpy() - simplex_differences).max() < 1e-3
assert jacobian.sum(0).abs().max() < 1e-9
held = portfolio[0] > 0
assert (jacobian[~held] == 0).all() and (jacobian[:, ~held].abs() < 1e-9).all() and (~held).any()
assert lasso_error < 1e-8
on_support = np.isclose(np.diff(x_path, axis=0) / np.diff(lam)[:, None], slopes[1:].numpy(), atol=1e-6)
assert on_support.mean() > 0.8  # the path is piecewise linear: all but the intervals with a kink
assert np.abs(own.value[0].numpy() - scikit_learn(0.2, positive=True)).max() < 1e-8
assert held_out(torch.tensor(found)).item() <= errors.min().item() * 1.001
