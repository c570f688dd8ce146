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
# # 5 · Multi-label classification: an energy over the labels
#
# You will learn
# - how to train through a solver whose answer is a minimizer (`FPI_GD`) or a fixed point (`FPI_NN`);
# - what an energy over the labels adds to a network that scores each label independently, and what a wider network adds
#   instead;
# - what only the energy can do: use labels that are already known, without new training.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from energynet import FPI_GD, FPI_NN, AdjointReport, ImplicitAdjoint, Termination, gradient, minimize
from energynet.constraints import Box
from energynet.energies import LabelContraction, MultiLabelEnergy

# %% [markdown]
# You may want to change these numbers:

# %%
EPOCHS, BATCH, LEARNING_RATE = 16, 128, 2e-2
RIDGES = 32  # ridges of the energy, hidden units of the network
COUPLING = 0.9  # how strongly labels may act on each other; below 1 there is exactly one answer
TOLERANCE = Termination(rtol=1e-3, atol=0.0, max_steps=200)
KNOWN, CERTAIN = 3, 8.0  # known labels in the last part, and the logit that stands for "certain"

# %% [markdown]
# ## The data
#
# The data are scikit-learn's 8×8 digits, each labeled with the segments that a seven-segment display lights to show it. Each
# row has seven labels, which are far from independent: of 128 patterns only ten occur.

# %%
SEGMENTS = "abcdefg"
LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
table = torch.tensor([[float(name in lit) for name in SEGMENTS] for lit in LIT])  # (10, 7)

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)  # (N, 8, 8)
features, labels = images.flatten(1), table[digits.target]
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
test, train = order[:599], order[599:]
print("features", tuple(features.shape), "labels", tuple(labels.shape), f"{len(train)} rows to train, {len(test)} to test")

# %% [markdown]
# ## Six models, one loss
#
# A *reader* gives a score to each label: it is a linear map or a small perceptron. On top of it, the answer u (one logit per
# label) may settle where an energy is lowest,
#
# $$E(u; s) = \tfrac12 \lVert u - s\rVert^2 - c \sum_k a_k \log\cosh(w_k^\top u + b_k),$$
#
# which stays near the scores s but is rewarded or penalized for 32 learned combinations of labels. With c < 1 and bounded
# weights it has exactly one minimizer, whatever the learned weights are. `FPI_NN` does the same with a contracting network, u
# = s + V tanh(Wu + b). Both are ready-made; tutorials 3 and 9 write their own.


# %%
class ByEnergy(nn.Module):
    """u* = argmin E(u; scores)."""

    def __init__(self, reader):
        super().__init__()
        self.reader, self.report = reader, AdjointReport()
        energy = MultiLabelEnergy(7, num_ridges=RIDGES, coupling=COUPLING)
        adjoint = ImplicitAdjoint(report=self.report)
        self.layer = FPI_GD(energy, step_size=energy.step_size, termination=TOLERANCE, adjoint=adjoint)

    def forward(self, z):  # (B, 64) -> (B, 7)
        return self.layer(self.reader(z)[:, None])  # the energy takes the scores of several readers, (B, M, 7); here M = 1


class ByNetwork(nn.Module):
    """u* = g(u*; scores)."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader
        network = LabelContraction(7, num_units=RIDGES, coupling=COUPLING)
        self.layer = FPI_NN(network, start=torch.zeros_like, termination=TOLERANCE)

    def forward(self, z):  # (B, 64) -> (B, 7)
        return self.layer(self.reader(z))


def linear():
    return nn.Linear(64, 7)


def perceptron(hidden):
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 7))


def fit(make):
    """Train from scratch; every model gets the same loss, optimizer and order of rows."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    shuffle = torch.Generator().manual_seed(1)
    for _ in range(EPOCHS):
        for rows in train[torch.randperm(len(train), generator=shuffle)].split(BATCH):
            loss = nn.functional.binary_cross_entropy_with_logits(model(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


makers = {
    "linear": linear,
    "linear + FPI_GD": lambda: ByEnergy(linear()),
    "linear + FPI_NN": lambda: ByNetwork(linear()),
    "MLP, 10 hidden": lambda: perceptron(10),
    "MLP, 32 hidden": lambda: perceptron(32),
    "MLP, 32 hidden + FPI_GD": lambda: ByEnergy(perceptron(32)),
}
models = {name: fit(make) for name, make in makers.items()}

with torch.no_grad():
    logits = {name: model(features[test]) for name, model in models.items()}  # (599, 7) each
right = {name: ((u > 0) == (labels[test] > 0)).all(1) for name, u in logits.items()}
exact = {name: 100 * r.float().mean().item() for name, r in right.items()}
size = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
print("logits", tuple(logits["linear"].shape))
for name in models:
    print(f"{name:24} {size[name]:5} parameters   all seven labels right {exact[name]:5.1f} %")

# %% [markdown]
# ## The picture
#
# The picture shows the first eight test images that the linear reader gets wrong: what it would show on a display, and what
# the display shows when its scores settle in the energy. Brightness is the probability of the segment.

# %%
STROKES = [
    ((0, 1), (2, 2)), ((1, 1), (2, 1)), ((1, 1), (1, 0)), ((0, 1), (0, 0)), ((0, 0), (1, 0)), ((0, 0), (2, 1)), ((0, 1), (1, 1)),
]  # fmt: skip


def draw_display(axis, u, is_right):
    """Seven segments, lit as bright as they are probable."""
    dark, bright = np.array([0.23, 0.23, 0.26]), np.array([1.0, 0.36, 0.25])
    for p, (x, y) in zip(torch.sigmoid(u).tolist(), STROKES, strict=True):
        axis.plot(x, y, color=dark + p * (bright - dark), linewidth=5, solid_capstyle="round")
    axis.set(xlim=(-0.45, 1.45), ylim=(-0.35, 2.35), aspect="equal", facecolor="#17171b", xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="#2ca02c" if is_right else "0.85", linewidth=2.5)


shown = (~right["linear"]).nonzero().flatten()[:8]
figure = plt.figure(figsize=(12, 4.7))
left, right_side = figure.subfigures(1, 2, width_ratios=[2.1, 1])
places = {"left": 0.05, "right": 0.99, "bottom": 0.03, "top": 0.9, "wspace": 0.08, "hspace": 0.06}
grid = left.subplots(3, 8, height_ratios=[0.75, 1, 1], gridspec_kw=places)
for column, k in zip(grid.T, shown.tolist(), strict=True):
    column[0].imshow(images[test[k]], cmap="gray_r")
    column[0].set(xticks=[], yticks=[])
    draw_display(column[1], logits["linear"][k], bool(right["linear"][k]))
    draw_display(column[2], logits["linear + FPI_GD"][k], bool(right["linear + FPI_GD"][k]))
for axis, text in zip(grid[:, 0], ("image", "linear reader", "+ energy"), strict=True):
    axis.set_ylabel(text)
left.suptitle("Segments read from a digit (green frame: all seven right)", fontsize=11)
axis = right_side.subplots(gridspec_kw={"left": 0.06, "right": 0.95, "bottom": 0.11, "top": 0.9})
colors = ["#d55e00" if "FPI" in name else "0.55" for name in models]
axis.barh(range(len(models)), list(exact.values()), color=colors)
for k, (name, value) in enumerate(exact.items()):
    axis.text(2, k, f"{name}\n{size[name]} parameters", color="white", va="center", fontsize=8.5)
    axis.text(value - 1.5, k, f"{value:.0f} %", color="white", va="center", ha="right", fontweight="bold")
axis.invert_yaxis()
axis.set(xlabel="all seven labels right, % of test rows", xlim=(0, 100), yticks=[])
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# The energy corrects a quarter of the errors of the linear reader, because it knows which segments go together. But so does a
# hidden layer: a perceptron with as many parameters as the linear reader and the energy together is equally good. A better
# reader leaves less to correct. If the score in this table were all that mattered, the wider network would be the simpler
# choice. What follows are things that it cannot do.
#
# ## What happens in a solve
#
# `layer.solve` returns how each sample went, and `trace=True` keeps every iterate. Here are the logits of one image on their
# way from the reader's scores to the minimizer.

# %%
model = models["linear + FPI_GD"]
scores = model.reader(features[test]).detach()[:, None]  # (599, 1, 7)
solution = model.layer.solve(scores, trace=True)
print(solution)
print("trace: values", tuple(solution.trace.value.shape), "errors", tuple(solution.trace.error.shape))
slope = gradient(model.layer.energy, solution.value.detach(), scores)
records = model.report.records
adjoint_steps = torch.cat([record.num_steps for record in records]).float().mean().item()
print(f"largest slope at the answers {slope.abs().max():.1e}")
print(f"mean steps: forward {solution.num_steps.float().mean():.1f} (test rows), adjoint {adjoint_steps:.1f} (training)")

# %% [markdown]
# ## What the energy has learned
#
# The second derivatives of the energy say how labels act on each other: −∂²E/∂uᵢ∂uⱼ > 0 means that segment i, once lit, pulls
# j up. The other panel shows the correlations of the labels in the data for comparison. The energy was not given these; it
# learned them by training through the solver.

# %%
with torch.no_grad():
    curvature = torch.func.vmap(
        torch.func.hessian(lambda u, s: model.layer.energy(u[None], s[None]).squeeze(0))
    )(solution.value.detach(), scores)  # (599, 7, 7)
pull = -curvature.mean(0).fill_diagonal_(0)
correlation = torch.corrcoef(labels[train].T).fill_diagonal_(0)

some = int(shown[int(right["linear + FPI_GD"][shown].nonzero()[0])])  # the first one that was mended
figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained", width_ratios=[1.25, 1, 1])
for j, name in enumerate(SEGMENTS):
    is_lit = bool(labels[test[some], j])
    line = solution.trace.value[:, some, j].detach()
    axes[0].plot(line, "o-", color="#d55e00" if is_lit else "0.5", markersize=3, linewidth=1.2)
    axes[0].annotate(name, (len(line) - 1, line[-1]), xytext=(4 + 9 * (j % 2), 0), textcoords="offset points", va="center")
axes[0].axhline(0, color="black", linewidth=0.7)
axes[0].set(title="Logits settle (orange: lit in truth)", xlabel="step", ylabel="logit")
axes[0].spines[["top", "right"]].set_visible(False)
pairs = (pull, "Pull learned by the energy"), (correlation, "Correlation of labels")
for axis, (matrix, title) in zip(axes[1:], pairs, strict=True):
    limit = matrix.abs().max().item()
    picture = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(title=title, xticks=range(7), yticks=range(7), xticklabels=SEGMENTS, yticklabels=SEGMENTS)
    figure.colorbar(picture, ax=axis, shrink=0.85)
plt.show()

# %% [markdown]
# ## Labels that are already known
#
# Suppose that three of the seven labels of each test image are known. A network that maps images to labels has no input for
# them. The energy does not need one: hold the known logits fixed by a box with equal bounds, and let the others settle
# (tutorial 6 explains `prox`). No new training is needed.

# %%
given = torch.rand(len(test), 7, generator=torch.Generator().manual_seed(2)).argsort(1) < KNOWN  # (599, 7) bool, three per row
certain = CERTAIN * (2 * labels[test] - 1)
box = Box(torch.where(given, certain, -torch.inf), torch.where(given, certain, torch.inf))
with torch.no_grad():
    informed = minimize(model.layer.energy, scores[:, 0], scores, prox=box).value  # (599, 7)


def error_on_the_rest(u):
    return 100 * ((u > 0) != (labels[test] > 0))[~given].float().mean().item()


before, after = error_on_the_rest(solution.value), error_on_the_rest(informed)
print(f"wrong among the {int((~given).sum())} labels that are not given: {before:.2f} % before, {after:.2f} % after")

# %% [markdown]
# The main experiment of the package does the same on real data, with five readers and a decision threshold that is chosen on
# held-out rows: `energynet run multilabel`.
#
# ## What this page claims

# %%
assert exact["linear + FPI_GD"] > exact["linear"] + 3 and exact["linear + FPI_NN"] > exact["linear"] + 3
assert abs(exact["linear + FPI_GD"] - exact["MLP, 10 hidden"]) < 8  # level: no free lunch
assert exact["MLP, 32 hidden + FPI_GD"] > exact["linear + FPI_GD"]
assert abs(size["MLP, 10 hidden"] / size["linear + FPI_GD"] - 1) < 0.05
assert solution.converged.all() and slope.abs().max() < 0.05
assert all((record.status == 0).all() for record in records)
assert (informed[given] == certain[given]).all()
assert after < 0.9 * before
off_diagonal = ~torch.eye(7, dtype=torch.bool)
assert torch.corrcoef(torch.stack([pull[off_diagonal], correlation[off_diagonal]]))[0, 1] > 0.5
