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
# # 9 · A first image: denoising by an energy with learned filters
#
# You will learn
# - how to write an energy of images in twenty lines: it keeps the image near the noisy one and penalizes its response to a
#   set of filters;
# - how to learn filters and penalties *through* the solver, from a few hundred small crops in less than a minute;
# - how to build the energy so that it has exactly one minimizer, whatever the learned weights are;
# - how sure the answer is, pixel by pixel, from the energy's curvature.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import color, data, transform
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_tv_chambolle
from torch import nn
from torch.nn.functional import conv2d, pad

from energynet import FPI_GD, Energy, ImplicitAdjoint, Termination, diagnostics
from energynet.energies import denoiser

# %% [markdown]
# You may want to change these numbers:

# %%
SIGMA = 25 / 255  # standard deviation of the noise; pictures are in [0, 1]
SIDE = 160  # of the test picture
WIDTH = 5  # of the filters, of which there are 5² − 1
STRENGTH = 0.9  # below 1 there is exactly one minimizer
STEPS, CROPS, CROP_SIDE, LEARNING_RATE = 80, 4, 32, 0.1
MARGIN = 4  # pixels at the border that see fewer filters: padded in the test, left out of the loss
torch.manual_seed(0)
generator = np.random.default_rng(0)

# %% [markdown]
# ## The pictures
#
# scikit-image comes with its own images. *camera* is the test image; the others, at half size, are for training.


# %%
def gray(picture):  # -> (H, W) float32 in [0, 1]
    return (color.rgb2gray(picture) if picture.ndim == 3 else picture / 255).astype(np.float32)


clean = transform.resize(gray(data.camera()), (SIDE, SIDE), anti_aliasing=True).astype(np.float32)
noisy = clean + SIGMA * generator.standard_normal(clean.shape, dtype=np.float32)
sources = (data.coins, data.moon, data.page, data.astronaut, data.chelsea, data.coffee, data.rocket)
training = [transform.rescale(gray(source()), 0.5, anti_aliasing=True).astype(np.float32) for source in sources]
print("test picture", clean.shape, " training pictures", [picture.shape for picture in training])


def draw_crops():  # -> (B, 1, H, W)
    """Clean crops of random pictures at random places, turned at random."""
    crops = []
    for _ in range(CROPS):
        picture = training[generator.integers(len(training))]
        i, j = (generator.integers(size - CROP_SIDE) for size in picture.shape)
        crops.append(np.rot90(picture[i : i + CROP_SIDE, j : j + CROP_SIDE], generator.integers(4)).copy())
    return torch.from_numpy(np.stack(crops))[:, None]


# %% [markdown]
# ## The energy
#
# $$E(x; y) = \tfrac12 \lVert x - y\rVert^2 + c \sum_k \sum_{\text{pixels}} ψ_k(w_k * x), \qquad
# ψ_k(r) = s_k \Bigl(\sqrt{r^2 + s_k^2/ρ_k^2} - \sqrt{r^2 + s_k^2}\Bigr).$$
#
# Each filter $w_k$ is convolved with the image, and its response $r$ is penalized by $ψ_k$: steeply when it is small, since
# that is noise, and less and less when it is larger than $s_k$, since that is an edge. The filters, $s_k$ and $ρ_k$ are
# learned. The filters have mean zero, so that brightness costs nothing, and begin as cosines.
#
# **There is one minimizer.** $ψ_k'' ≥ -1$ for any $s_k$, $ρ_k$. The filters are divided by their largest joint gain over all
# frequencies, so the curvature of the second term is at least $-c > -1$ where that of the first is 1. The sum is strongly
# convex although ψ is not. Such penalties are called *weakly convex*: they keep edges, and the answer is still unique.


# %%
def cosines(width):  # -> (width² − 1, 1, width, width): the patterns of the discrete cosine transform, without the constant
    place = (torch.arange(width) + 0.5) * torch.pi / width
    waves = torch.cos(place * torch.arange(width)[:, None])
    waves = waves / waves.norm(dim=1, keepdim=True)
    return torch.einsum("ai,bj->abij", waves, waves).reshape(-1, 1, width, width)[1:]


class Ridges(Energy):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(cosines(WIDTH))  # (K, 1, w, w)
        self.log_scale = nn.Parameter(torch.full((len(self.weight), 1, 1), 0.1).log())
        self.log_steepness = nn.Parameter(torch.full((len(self.weight), 1, 1), 10.0).log())

    def filters(self):  # -> (K, 1, w, w)
        weight = self.weight - self.weight.mean((2, 3), keepdim=True)
        gain = torch.fft.rfft2(weight, s=(32, 32)).abs().square().sum(0)  # of all filters together, at each frequency
        return weight / gain.max().sqrt()

    def penalty(self, r, scale, steepness):  # (B, K, H, W) -> like r
        square = r.square()
        return scale * ((square + (scale / steepness).square()).sqrt() - (square + scale.square()).sqrt())

    def encode(self, y):  # what does not depend on x, once per solve
        return y, self.filters(), self.log_scale.exp(), 1 + self.log_steepness.exp()  # ρ > 1

    def start(self, y):  # (B, 1, H, W)
        return y

    def evaluate(self, x, y, filters, scale, steepness):  # -> (B,)
        answers = conv2d(x, filters)  # (B, K, H − 4, W − 4)
        return 0.5 * (x - y).square().sum((1, 2, 3)) + STRENGTH * self.penalty(answers, scale, steepness).sum((1, 2, 3))


energy = Ridges()
layer = FPI_GD(
    energy,  # no step size: solved by L-BFGS
    termination=Termination(rtol=3e-3, atol=0.0, max_steps=300),
    adjoint=ImplicitAdjoint(termination=Termination(rtol=3e-2, max_steps=300)),
)
crops = draw_crops()
print("crops", tuple(crops.shape), "energies", tuple(energy(crops, crops).shape), "filters", tuple(energy.filters().shape))
print(sum(p.numel() for p in energy.parameters()), "parameters")

# %% [markdown]
# ## Learn it through the solver
#
# Each training step adds noise to a few crops, *solves*, compares the minimizer with the clean crop, and propagates the
# gradient back through the minimizer into filters and penalties. Nothing special is needed: the layer is a module like any
# other.


# %%
def psnr(picture):
    return peak_signal_noise_ratio(clean, np.clip(picture, 0, 1), data_range=1)


def denoise(picture):  # (H, W) -> (H, W)
    y = pad(torch.from_numpy(picture)[None, None], (MARGIN,) * 4, mode="reflect")
    with torch.no_grad():
        return layer(y)[0, 0, MARGIN:-MARGIN, MARGIN:-MARGIN].numpy()


filters_before = energy.filters().detach()
untrained = psnr(denoise(noisy))
optimizer = torch.optim.Adam(energy.parameters(), LEARNING_RATE)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
gains = []
for _ in range(STEPS):
    crops = draw_crops()
    noise = SIGMA * torch.randn_like(crops)
    error = (layer(crops + noise) - crops)[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    loss = error.square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    gains.append(-10 * np.log10(loss.item() / noise.square().mean().item()))  # dB by which the noise fell
denoised = denoise(noisy)

weights = np.arange(0.03, 0.16, 0.01)
smoothed = max((denoise_tv_chambolle(noisy, weight=weight) for weight in weights), key=psnr)
pictures = {"noisy": noisy, "total variation": smoothed, "learned energy": denoised}
levels = {name: psnr(picture) for name, picture in pictures.items()}
print(f"learned energy before training {untrained:.2f} dB")
for name, level in levels.items():
    print(f"{name:16} {level:.2f} dB")

# %% [markdown]
# ## The picture
#
# Total variation is the classical energy, with one fixed pair of filters, one penalty and one weight. We give it the weight
# that is best for this very image, which requires the clean image; the learned energy has never seen it.

# %%
figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
zoom = slice(SIDE // 8, SIDE // 2), slice(SIDE * 5 // 16, SIDE * 11 // 16)
for column, (name, picture) in zip(axes.T, {**pictures, "clean": clean}.items(), strict=True):
    for axis, part in zip(column, (picture, picture[zoom]), strict=True):
        axis.imshow(part, cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    column[0].set_title(f"{name}, {levels[name]:.2f} dB" if name in levels else name)
plt.show()

# %% [markdown]
# ## What was learned
#
# The cosines have turned into short bars, spots and slanted edges. The penalties, which were all alike at first, now have a
# sharp notch at zero and level off, each filter at its own scale: small responses are suppressed, and large ones remain.

# %%
scale, steepness = energy.log_scale.exp().detach(), 1 + energy.log_steepness.exp().detach()
loudness = energy.filters().detach().flatten(1).norm(dim=1)
loudest = loudness.argsort(descending=True)


def mosaic(filters):  # (K, 1, w, w) -> one picture, each filter in its own contrast
    tiles = filters[:, 0] / filters.abs().amax((1, 2, 3))[:, None, None]
    tiles = pad(tiles, (0, 1, 0, 1), value=torch.nan).reshape(4, -1, WIDTH + 1, WIDTH + 1)
    return tiles.permute(0, 2, 1, 3).reshape(4 * (WIDTH + 1), -1)


figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
for axis, filters, title in zip(axes[0], (filters_before, energy.filters().detach()), ("before", "after"), strict=True):
    axis.imshow(mosaic(filters), cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_axis_off()
    axis.set_title(f"Filters {title} training")
r = torch.linspace(-0.2, 0.2, 801).expand(len(scale), 1, 801)
curves = energy.penalty(r, scale, steepness)[:, 0]
curves = curves - curves[:, 400:401]  # zero at zero
for rank, k in enumerate(loudest.tolist()):
    axes[1, 0].plot(r[0, 0], curves[k], color=plt.colormaps["viridis"](rank / len(loudest)), linewidth=1.1, alpha=0.8)
axes[1, 0].set(title="Learned penalties ψ (dark: the strongest filters)", xlabel="answer r of a filter", ylabel="ψ(r) − ψ(0)")
axes[1, 1].plot(gains, ".", color="0.7", label="each step, four crops")
running = np.convolve(gains, np.ones(10) / 10, mode="valid")
axes[1, 1].plot(np.arange(9, STEPS), running, color="#d55e00", linewidth=2, label="mean of ten")
axes[1, 1].set(title="Noise taken away from the training crops", xlabel="training step", ylabel="dB")
axes[1, 1].legend(frameon=False)
for axis in axes[1]:
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Is it really one minimizer?
#
# There are two checks. The smallest curvature of the energy at the answer (estimated by Lanczos' method) must not lie below 1
# − c. And a solve that begins somewhere else entirely must end in the same place.

# %%
y = torch.from_numpy(noisy[:64, :64])[None, None]
exact = Termination(rtol=1e-5, atol=0.0, max_steps=2000)
strict = FPI_GD(energy, termination=exact)
with torch.no_grad():
    here, there = strict.solve(y), strict.solve(y, x0=torch.rand_like(y))
    bent = diagnostics.curvature(energy, here.value, y)
apart = (here.value - there.value).abs().max().item()
print(bent)
print(f"{int(here.num_steps)} steps from the noisy picture, {int(there.num_steps)} from random numbers; apart by {apart:.1e}")

# %% [markdown]
# ## A trained one, and how sure it is
#
# `energynet.energies` holds such energies with more filters, a noise level as context and other data terms (blur, missing
# pixels), and `denoiser` gives one whose weights ship with the package. Its answer is the peak of a density, $e^{-E/σ^2}$, and
# the curvature there tells how wide the peak is: `diagnostics.laplace` computes standard deviations from the exact Hessian,
# by 16 linear solves.

# %%
trained = denoiser("ridge")
with torch.no_grad():
    y = torch.from_numpy(noisy)[None, None]
    answer = trained.solve(y, SIGMA)
    unsure = diagnostics.laplace(trained.energy, answer, y, SIGMA, noise=SIGMA)[0, 0].numpy()
ready = answer.value[0, 0].numpy()
error = np.abs(ready - clean)
covered = (error < 1.645 * unsure).mean()
print(f"trained energy {psnr(ready):.2f} dB in {int(answer.num_steps)} steps")
print(f"90 % intervals hold {100 * covered:.0f} % of the pixels")

figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
axes[0].imshow(ready, cmap="gray", vmin=0, vmax=1)
axes[0].set_title(f"trained energy, {psnr(ready):.2f} dB")
for axis, values, title in zip(axes[1:], (unsure, error), ("standard deviation (Laplace)", "true error"), strict=True):
    drawn = axis.imshow(255 * values, vmin=0, vmax=40)
    axis.set_title(title)
figure.colorbar(drawn, ax=axes[2], label="of 255")
for axis in axes:
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# The map is high at edges and in texture, where the energy penalizes little, and low where the picture is flat. It knows
# nothing of what the energy itself gets wrong, so it is to be compared with errors on known pictures before it is believed.
#
# To go further, train one of these energies on your own pictures: `energynet run denoising`, on the page on denoising.
#
# ## What this page claims

# %%
assert levels["learned energy"] > levels["noisy"] + 8
assert levels["learned energy"] > levels["total variation"] + 0.4
assert levels["learned energy"] > untrained + 0.8
assert bent.smallest.item() > 1 - STRENGTH
assert psnr(ready) > levels["noisy"] + 6
assert np.corrcoef(unsure.ravel(), error.ravel())[0, 1] > 0.1
assert apart < 2e-3
