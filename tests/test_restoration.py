"""Data terms, the energy of a restored picture, and denoisers."""

import pytest
import torch
from problems import TIGHT
from scipy.ndimage import convolve
from torch import Tensor

from energynet import Termination, minimize
from energynet.energies import Blur, CosineStart, Denoiser, Huber, Identity, Mask, Operator, Pair, Restoration, RidgePrior

DOUBLE = torch.float64
KERNEL = torch.tensor([[0.1, 0.3, 0.0], [0.0, 0.2, 0.1], [0.05, 0.05, 0.2], [0.1, 0.0, 0.1], [0.3, 0.1, 0.0]], dtype=DOUBLE)
OPERATORS: dict[str, tuple[Operator, tuple[Tensor, ...], tuple[int, ...]]] = {
    "identity": (Identity(), (), (2, 1, 8, 7)),
    "mask": (Mask(), ((torch.arange(56, dtype=DOUBLE).reshape(1, 1, 8, 7) % 3 > 0).to(DOUBLE),), (2, 1, 8, 7)),
    "blur": (Blur(), (KERNEL,), (2, 1, 8, 7)),
    "row": (Blur(), (KERNEL[:1],), (2, 1, 8, 7)),
    "pair": (Pair(lambda x: x[..., ::2, :], lambda y: torch.stack([y, 0 * y], 3).flatten(2, 3)), (), (2, 1, 4, 7)),
}


def quadratic() -> RidgePrior:
    """Potentials so wide that they are quadratic."""
    prior = RidgePrior(CosineStart(3), Huber(8), strength=5.0).to(DOUBLE)
    prior.log_scale.data[0] = 8.0
    return prior


@pytest.mark.parametrize("name", OPERATORS)
def test_transposes(name: str) -> None:
    operator, known, shape = OPERATORS[name]
    x, y = torch.randn(2, 1, 8, 7, dtype=DOUBLE), torch.randn(shape, dtype=DOUBLE)
    there, back = operator.apply(x, *known), operator.transpose(y, *known)
    assert there.shape == y.shape and back.shape == x.shape
    torch.testing.assert_close((there * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-12)


def test_blur_is_scipys_mirrored_convolution() -> None:
    x = torch.randn(1, 2, 8, 7, dtype=DOUBLE)
    got = Blur().apply(x, KERNEL)
    for channel in range(2):
        expected = convolve(x[0, channel].numpy(), KERNEL.numpy(), mode="mirror")
        torch.testing.assert_close(got[0, channel], torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["identity", "mask", "blur"])
def test_a_quadratic_prior_has_the_answer_of_linear_algebra(name: str) -> None:
    operator, known, _ = OPERATORS[name]
    prior, y, sigma = quadratic(), torch.randn(1, 1, 8, 7, dtype=DOUBLE), torch.tensor([0.1], dtype=DOUBLE)
    energy = Restoration(prior, operator)
    basis = torch.eye(56, dtype=DOUBLE).reshape(56, 1, 8, 7)
    A = operator.apply(basis, *known).flatten(1).T
    code = prior.encode(y, sigma)
    R = torch.func.hessian(lambda v: prior.evaluate(v.reshape(1, 1, 8, 7), *code)[0])(torch.zeros(56, dtype=DOUBLE))
    expected = torch.linalg.solve(A.T @ A + R, A.T @ y.flatten()).detach()
    answer = minimize(energy, None, y, sigma, *known, termination=TIGHT).value
    torch.testing.assert_close(answer.flatten(), expected, rtol=1e-5, atol=1e-6)


def test_inpainting_starts_from_neighbors() -> None:
    mask = torch.ones(1, 1, 9, 9)
    mask[..., 3:7, 2:8] = 0
    ramp = torch.linspace(1, 2, 9).expand(1, 1, 9, 9)
    filled = Mask().guide(mask * ramp, mask)
    torch.testing.assert_close(filled * mask, ramp * mask)
    assert (filled >= 1 - 1e-5).all() and (filled <= 2 + 1e-5).all()


def test_each_picture_has_its_noise_and_colors_are_channels() -> None:
    torch.manual_seed(0)
    denoise = Denoiser(RidgePrior(CosineStart(3), Huber(8)), termination=TIGHT).to(DOUBLE)
    y = torch.rand(2, 3, 9, 8, dtype=DOUBLE)
    sigma = torch.tensor([0.1, 0.3], dtype=DOUBLE)
    both = denoise(y, sigma)
    for sample in range(2):
        for channel in range(3):
            alone = denoise(y[sample, channel][None, None], float(sigma[sample]))
            torch.testing.assert_close(both[sample, channel], alone[0, 0], rtol=1e-7, atol=1e-8)


def test_a_flat_picture_stays_and_tiny_ones_are_served() -> None:
    denoise = Denoiser(RidgePrior(CosineStart(5), Huber(24)))
    for shape in ((1, 1, 12, 9), (1, 1, 1, 1), (2, 1, 2, 30)):
        flat = torch.full(shape, 0.4)
        torch.testing.assert_close(denoise(flat, 0.1), flat, rtol=1e-4, atol=1e-4)


def test_other_tolerances_share_the_weights() -> None:
    denoise = Denoiser(RidgePrior(CosineStart(3), Huber(8)))
    exact = denoise.with_termination(Termination(rtol=1e-6, max_steps=2000))
    assert exact.energy.prior is denoise.energy.prior
    y = torch.rand(1, 1, 8, 8)
    torch.testing.assert_close(exact(y, 0.1), denoise(y, 0.1), rtol=1e-3, atol=1e-3)


def test_gradients_reach_picture_and_noise_level() -> None:
    denoise = Denoiser(RidgePrior(CosineStart(3), Huber(8)), termination=TIGHT).to(DOUBLE)
    y = torch.rand(1, 1, 4, 4, dtype=DOUBLE, requires_grad=True)
    sigma = torch.tensor([0.2], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(denoise, (y, sigma), atol=1e-5, fast_mode=True)


def test_what_cannot_be_is_told() -> None:
    energy = Restoration(RidgePrior(CosineStart(3), Huber(8)))
    y = torch.rand(2, 1, 8, 8)
    for wrong in (0.0, -1.0, float("inf"), torch.tensor([0.1, 0.0])):
        with pytest.raises(ValueError, match="σ must be positive"):
            energy(y, y, wrong)
    with pytest.raises(ValueError, match="a number or one per sample"):
        energy(y, y, torch.ones(3))
    with pytest.raises(ValueError, match="odd sides"):
        Blur().apply(y, torch.ones(2, 3))
    with pytest.raises(ValueError, match="reaches over the whole picture"):
        Blur().apply(y, torch.ones(17, 3))
