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
# # 7 · Speed: encode, batch, choose a solver, compile
#
# You will learn
# - where the time of a solve goes, and four ways to shorten it, in the order in which to try them;
# - how much each of them gains, as measured on the machine that runs this page;
# - how to keep the answer the same while doing so.

# %%
import shutil
import time

import matplotlib.pyplot as plt
import torch
from torch import nn

from energynet import LBFGS, Anderson, Compiled, Energy, Nesterov, NewtonCG, Picard, Termination, minimize

# %% [markdown]
# You may want to change these numbers:

# %%
torch.manual_seed(0)
FEATURES, HIDDEN, UNKNOWNS = 1024, 256, 32
BATCHES = (1, 16, 256, 1024)
COMPILED_BATCH = 16  # one batch size only: a program is compiled for its shapes, and that takes seconds
REPEATS = 3  # each time is the median of so many
CONDITIONS = (10, 100, 1_000, 10_000)  # largest curvature over smallest
MOST_STEPS = 800

# %% [markdown]
# ## An energy, written twice
#
# The context z goes through a network F; the answer stays near F(z) and is modified by a learned term: E(x, z) = ½‖x − F(z)‖²
# + Σ log cosh(Mx). A solver evaluates this some twenty times, each time at another x, but F(z) is the same every time.
# `Energy.encode` is the place for what does not depend on x: it runs once per solve, and gradients pass through it as before.


# %%
class Plain(Energy):
    """Everything in `evaluate`."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, UNKNOWNS))
        self.mix = nn.Parameter(torch.randn(UNKNOWNS, UNKNOWNS) / UNKNOWNS**0.5)

    def start(self, z):  # (B, 1024) -> (B, 32)
        return z.new_zeros(len(z), UNKNOWNS)

    def evaluate(self, x, z):  # (B, 32), (B, 1024) -> (B,)
        return self.near(x, self.features(z))

    def near(self, x, center):  # (B, 32), (B, 32) -> (B,)
        return 0.5 * (x - center).square().sum(-1) + torch.log(torch.cosh(x @ self.mix)).sum(-1)


class Encoded(Plain):
    """What does not depend on x in `encode`."""

    def encode(self, z):  # (B, 1024) -> (B, 32)
        return self.features(z)

    def evaluate(self, x, center):
        return self.near(x, center)


plain, encoded = Plain(), Encoded()
encoded.load_state_dict(plain.state_dict())


def solve(energy, z, driver=None):
    with torch.no_grad():
        return minimize(energy, None, z, step_size=0.3, solver=Picard(), driver=driver)


def seconds(call):
    """Median of a few calls, after one that is not counted."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[REPEATS // 2]


contexts = {batch: torch.randn(batch, FEATURES) for batch in BATCHES}
print("z", {batch: tuple(z.shape) for batch, z in contexts.items()})
took = {
    "plain": {batch: seconds(lambda z=z: solve(plain, z)) for batch, z in contexts.items()},
    "encode": {batch: seconds(lambda z=z: solve(encoded, z)) for batch, z in contexts.items()},
}

# %% [markdown]
# ## The compiled driver
#
# Python runs the loop of a solve one operation at a time, and for small problems this costs more than the arithmetic.
# `driver=Compiled()` turns the whole loop into one program of machine code. The first call for an energy and its shapes
# compiles, which takes up to a minute; later calls, also with other weights, use the program. (The compiler also moves what
# does not depend on x out of the loop, as `encode` does.) Equal drivers share their programs. Compilation needs a C++
# compiler; without one, the solve warns once and runs in Python.

# %%
driver = Compiled()
can_compile = any(shutil.which(name) for name in ("g++", "clang++"))
z = contexts[COMPILED_BATCH]
if can_compile:
    begin = time.perf_counter()
    compiled = solve(encoded, z, driver)
    print(f"first call {time.perf_counter() - begin:.1f} s, programs {driver.compilations}")
    took["encode, compiled"] = {COMPILED_BATCH: seconds(lambda: solve(encoded, z, driver))}
    print(f"later calls {took['encode, compiled'][COMPILED_BATCH] * 1e3:.2f} ms, programs {driver.compilations}")
else:
    print("no C++ compiler here: the compiled driver is left out")

for name, times in took.items():
    print(f"{name:17}", "   ".join(f"batch {batch}: {t * 1e3:8.2f} ms" for batch, t in times.items()))

# %% [markdown]
# ## Choosing a solver
#
# How many steps a solve needs depends on the *condition number* κ, which is the largest curvature divided by the smallest.
# Plain gradient steps (`Picard`) need about κ of them, and momentum (`Nesterov`) about √κ. `LBFGS`, the default of
# `minimize`, learns the curvatures on its way. `NewtonCG` computes products with them, so its steps are few and expensive.


# %%
def valley(x, b, H):  # (B, n), (B, n), (n, n) -> (B,)
    return 0.5 * (x @ H * x).sum(-1) - (b * x).sum(-1) + 0.5 * torch.log(torch.cosh(x)).sum(-1) / len(H)


def hessian(condition, n=UNKNOWNS):  # -> (n, n), curvatures from 1 to the condition number
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return turn * torch.logspace(0, torch.tensor(float(condition)).log10().item(), n, dtype=torch.float64) @ turn.T


accurate = Termination(rtol=1e-6, atol=0.0, max_steps=MOST_STEPS)
solvers = (Picard(), Nesterov(), Anderson(), LBFGS(), NewtonCG())
names = [type(solver).__name__ for solver in solvers]
b = torch.randn(8, UNKNOWNS, dtype=torch.float64)
solver_time, solver_steps, arrived = {}, {}, {}
for condition in CONDITIONS:
    H = hessian(condition)
    for name, solver in zip(names, solvers, strict=True):
        begin = time.perf_counter()
        with torch.no_grad():
            found = minimize(valley, torch.zeros_like(b), b, H, step_size=1 / (condition + 1), solver=solver,
                             termination=accurate, on_failure="ignore")  # fmt: skip
        solver_time[name, condition] = time.perf_counter() - begin
        solver_steps[name, condition] = int(found.num_steps.max())
        arrived[name, condition] = bool(found.converged.all())
print(f"{'steps':10}" + "".join(f"{f'κ = {c:,}':>16}" for c in CONDITIONS))
for name in names:
    cells = [str(solver_steps[name, c]) if arrived[name, c] else f"more than {MOST_STEPS}" for c in CONDITIONS]
    print(f"{name:10}" + "".join(f"{cell:>16}" for cell in cells))

# %% [markdown]
# ## The picture
#
# Both panels were measured by this page.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
colors = {"plain": "0.5", "encode": "#0072b2", "encode, compiled": "#d55e00"}
for name, times in took.items():
    per_sample = [t / batch * 1e3 for batch, t in times.items()]
    marker, size = ("*", 18) if len(times) == 1 else ("o", 6)
    left.loglog(list(times), per_sample, marker=marker, markersize=size, color=colors[name], label=name, linewidth=1.8)
if can_compile:
    high, low = (took[name][COMPILED_BATCH] / COMPILED_BATCH * 1e3 for name in ("encode", "encode, compiled"))
    left.annotate("", (COMPILED_BATCH, low * 1.25), (COMPILED_BATCH, high), arrowprops={"arrowstyle": "->", "color": "#d55e00"})
    left.text(COMPILED_BATCH * 0.8, (high * low) ** 0.5, f"{high / low:.0f} × faster", color="#d55e00", ha="right")
left.set(title="Time of a solve, for each sample of a batch", xlabel="batch size", ylabel="ms per sample", xticks=BATCHES)
left.set_xticklabels([f"{batch:,}" for batch in BATCHES])
left.minorticks_off()
left.legend(frameon=False)
shades = ("0.6", "#56b4e9", "#009e73", "#0072b2", "#cc79a7")
for name, color in zip(names, shades, strict=True):
    times = [solver_time[name, c] for c in CONDITIONS]
    right.loglog(CONDITIONS, times, color=color, linewidth=1.8)
    for c, t in zip(CONDITIONS, times, strict=True):
        right.plot(c, t, "o", color=color, markersize=7, markerfacecolor=color if arrived[name, c] else "white")
    right.plot([], [], "o-", color=color, label=name)
right.set(title=f"Time to six digits (hollow: not there after {MOST_STEPS} steps)", xlabel="condition number κ", ylabel="s")
right.legend(frameon=False)
for axis in (left, right):
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Here are the four changes, from the cheapest to the most expensive.
#
# 1. **Batch.** One solve of many samples costs little more than a solve of one, because each step is paid for once. Each
#    sample still has its own tolerance, step count and status, and a finished sample is frozen.
# 2. **Encode.** The wider the batch, the larger the share of F in the total time, and the more there is to gain.
# 3. **Solver.** On an ill-conditioned energy this gains more than everything else. Start with the default, and use `NewtonCG`
#    where it needs hundreds of steps. On a well-conditioned energy with a known step size, `Picard` has the cheapest steps.
# 4. **Compile.** Do this last, when the energy no longer changes: the first call takes up to a minute, and the gain is
#    largest for small batches.
#
# ## Do less
#
# Two more numbers decide how many steps are taken: the tolerance, and the distance from the starting point to the answer.
# Training seldom needs more than three digits. Where an input changes little, as in the next frame of a video, begin at the
# last answer.

# %%
z = contexts[256]
steps_at = {}
with torch.no_grad():
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
        loose = minimize(encoded, None, z, step_size=0.3, solver=Picard(), termination=Termination(rtol=rtol, atol=0.0))
        steps_at[rtol] = loose.num_steps.float().mean().item()
    before = solve(encoded, z)
    moved = z + 0.01 * torch.randn_like(z)
    cold = solve(encoded, moved)
    warm = minimize(encoded, before.value, moved, step_size=0.3, solver=Picard())
print("mean steps at rtol", {rtol: round(steps, 1) for rtol, steps in steps_at.items()})
print(f"z has changed by 1 %: {cold.num_steps.float().mean():.1f} steps from zero,",
      f"{warm.num_steps.float().mean():.1f} from the last answer")  # fmt: skip

# %% [markdown]
# ## What this page claims
#
# Speeds are claimed with a wide margin, since machines differ and other programs may run beside this one.

# %%
largest = BATCHES[-1]
assert torch.allclose(solve(plain, z).value, before.value, atol=1e-4)  # encode changes no answer
assert took["encode"][largest] < took["plain"][largest] / 1.2
assert took["encode"][largest] / largest < took["encode"][1] / 5  # a batch is cheaper than its samples one by one
if can_compile:
    assert torch.allclose(compiled.value, solve(encoded, contexts[COMPILED_BATCH]).value, atol=1e-4)
    assert driver.compilations == 1
    assert took["encode, compiled"][COMPILED_BATCH] < took["encode"][COMPILED_BATCH] / 1.2
assert all(arrived["NewtonCG", c] for c in CONDITIONS) and arrived["LBFGS", 1_000]
assert all(arrived[name, 10] and solver_steps[name, 10] < solver_steps["Picard", 10] for name in names[1:])
assert not arrived["Picard", 1_000]
assert steps_at[1e-2] < steps_at[1e-5]
assert warm.num_steps.float().mean() < 0.8 * cold.num_steps.float().mean()
