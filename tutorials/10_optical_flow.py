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
# # 10 · Optical flow: what moved where between two frames
#
# You will learn
# - how the motion between two frames is the minimizer of an energy, and why robust potentials find edges of motion;
# - how a motion of many pixels is found from coarse to fine;
# - how to learn a weight of the energy *through* the solver from a pair whose motion is known.

# %%
import matplotlib.pyplot as plt
import torch
from skimage import data

from energynet import ConjugateGradient, HessianBlocks, ImplicitAdjoint, LaggedWeights, Termination, minimize
from energynet.energies import FlowEnergy, OpticalFlow, flow_to_color
from energynet.experiments.data.moving_pictures import MovingPictures

torch.manual_seed(0)
SIZE = (64, 96)
SEED = 5  # of the scene; another number gives another one
SLOW, FAST = 0.02, 0.1  # of the motions of FlyingChairs, which are up to 100 pixels long

# %% [markdown]
# ## A pair of frames with known motion
#
# Pieces of pictures move over a moving background. Each frame is drawn from the motions themselves, so the true flow is exact:
# for each pixel of the first frame, how far it moves to the right and down.

# %%
picture = torch.from_numpy(data.camera())[None] / 255
texture = torch.from_numpy(data.gravel())[None] / 255
slow = MovingPictures([picture, texture], SIZE, pace=SLOW).pair(SEED)
first, second, truth = slow.first[None], slow.second[None], slow.flow[None]  # (1, 1, H, W) twice, (1, 2, H, W)


def error(flow, truth):  # 2 × (1, 2, H, W) -> 0-d
    """The mean end-point error in pixels."""
    return torch.linalg.vector_norm(flow - truth, dim=1).mean()


def show(titles, images):
    _, axes = plt.subplots(1, len(images), figsize=(3.2 * len(images), 2.8), layout="constrained")
    for axis, title, image in zip(axes, titles, images):
        axis.imshow(image.movedim(0, -1).squeeze(-1).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=[])
    plt.show()


largest = float(torch.linalg.vector_norm(truth, dim=1).max())
show(["first frame", "second frame", "true flow"], [first[0], second[0], flow_to_color(truth, largest)[0]])
print(f"the flow is {float(error(0 * truth, truth)):.2f} pixels long on average and {largest:.1f} at most")

# %% [markdown]
# The color says where a pixel moves: red to the right, cyan to the left, green down, violet up; white is no motion.
#
# ## One energy, squares and robust potentials
#
# The data term says that a pixel looks alike in both frames, linearized around a flow that is known so far, here no
# motion. Where there is no texture it says nothing; there, the smoothness term decides, which compares the flow of neighbors.
# With squares this is the method of Horn and Schunck (1981), and one linear system. Squares punish a jump of the flow so much
# that edges of motion are blurred; `FlowEnergy` has robust potentials of both terms, and compares neighborhoods instead of
# brightness.
# `LaggedWeights` minimizes them as a sequence of quadratics, each preconditioned by its 2 × 2 blocks.

# %%
solver = LaggedWeights(inner=15, preconditioner=HessianBlocks())
still = torch.zeros_like(truth)
squares, robust = FlowEnergy.horn_schunck(0.002), FlowEnergy(smoothness=1.5, data_exponent=0.5, smooth_exponent=0.5)
budget = Termination(budget=10)
blurred = minimize(squares, None, first, second, still, solver=solver, termination=budget).value.detach()
sharp = minimize(robust, None, first, second, still, solver=solver, termination=budget).value.detach()
show(["Horn–Schunck", "robust", "true flow"], [flow_to_color(flow, largest)[0] for flow in (blurred, sharp, truth)])
print(f"end-point error: squares {float(error(blurred, truth)):.3f}, robust {float(error(sharp, truth)):.3f}")

# %% [markdown]
# ## From coarse to fine
#
# The linearization holds for motions of about a pixel. In the same scene, five times as fast, one level fails. So `OpticalFlow`
# starts with small copies of the frames, where motions are short, and warps the second frame by what it has found before it
# looks at what is left. It computes the flow in both directions: pixels that do not come back are hidden in the second frame,
# and their data are not used.

# %%
fast = MovingPictures([picture, texture], SIZE, pace=FAST).pair(SEED)
frames, far = (fast.first[None], fast.second[None]), fast.flow[None]
one_level = minimize(robust, None, *frames, still, solver=solver, termination=budget).value.detach()
estimate = OpticalFlow(robust).estimate(*frames)
largest = float(torch.linalg.vector_norm(far, dim=1).max())
show(["one level", "coarse to fine", "true flow", "found visible", "truly visible"],
     [*(flow_to_color(flow, largest)[0] for flow in (one_level, estimate.flow, far)), estimate.visible[0].float(),
      fast.visible.float()])  # fmt: skip
print(f"end-point error: one level {float(error(one_level, far)):.3f}, coarse to fine {float(error(estimate.flow, far)):.3f}")

# %% [markdown]
# ## Learning through the solver
#
# How smooth should the flow be? The minimizer depends on the weight λ, and `minimize` knows its derivative, exactly, without
# a record of the iterations. So the end-point error of the answer can be lowered by gradient steps on log λ. With both
# exponents ½ the energy is convex, and the adjoint equation is solved by conjugate gradients with the same blocks.

# %%
learned = FlowEnergy(smoothness=20.0, data_exponent=0.5, smooth_exponent=0.5)  # much too smooth
adjoint = ImplicitAdjoint(ConjugateGradient(preconditioner=HessianBlocks()), termination=Termination(rtol=0.03, budget=40))
optimizer = torch.optim.Adam([learned.log_smoothness], lr=0.3)
history = []
for _ in range(6):
    flow = minimize(learned, None, first, second, still, solver=solver, termination=budget, adjoint=adjoint).value
    loss = error(flow, truth)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append((float(learned.log_smoothness.detach().exp()), float(loss.detach())))
print("\n".join(f"λ = {weight:6.2f}   error before {value:.4f}" for weight, value in history))

# %% [markdown]
# `energynet run flow` goes on from here: a small network corrects the weights pixel by pixel, trained in this way on
# generated pairs. `energynet run flow --frames A.png B.png` computes the flow of your own pictures with its weights.
#
# ## What was claimed

# %%
assert float(error(sharp, truth)) < float(error(blurred, truth)) < float(error(still, truth))
assert float(error(estimate.flow, far)) < 0.5 * float(error(one_level, far))
assert float((estimate.visible == fast.visible[None]).float().mean()) > 0.8
assert history[-1][1] < 0.95 * history[0][1]
