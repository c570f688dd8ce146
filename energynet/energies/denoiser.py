"""A prior as a layer that denoises pictures."""

from torch import Tensor, nn
from torch.nn.functional import pad

from energynet.energies.priors import Prior
from energynet.energies.restoration import Restoration, noise_level
from energynet.engine.root_gradient import Adjoint
from energynet.solution import OnFailure, Solution
from energynet.solve import minimize
from energynet.solvers import LBFGS, Solver
from energynet.termination import Termination


class Denoiser(nn.Module):
    """The minimizer of ½‖x − y‖² + R(x; y, σ): a noisy picture in, a denoised one out, differentiably.

    The picture is mirrored at its border, as far as filters reach, and cropped again, so that the border is treated as the
    rest; colors are denoised one by one.

    Example:
        >>> import torch
        >>> from energynet.energies import CosineStart, Huber, RidgePrior
        >>> denoise = Denoiser(RidgePrior(CosineStart(3), Huber(8)))
        >>> denoise(torch.rand(2, 3, 9, 9), sigma=0.1).shape                    # y (B, C, H, W)
        torch.Size([2, 3, 9, 9])

    Args:
        prior: R, for one channel.
        solver: default `LBFGS`.
        termination: default: a relative error of 1e-4 of each picture, at most 500 steps.
        adjoint: default `ImplicitAdjoint`.
        on_failure: what to do about pictures that do not converge.
    """

    def __init__(self, prior: Prior, *, solver: Solver | None = None, termination: Termination | None = None,
                 adjoint: Adjoint | None = None, on_failure: OnFailure = "raise") -> None:  # fmt: skip
        super().__init__()
        self.energy = Restoration(prior)
        self.solver: Solver = solver or LBFGS()
        self.termination = termination or Termination(atol=0.0, rtol=1e-4, max_steps=500)
        self.adjoint, self.on_failure = adjoint, on_failure

    def solve(self, y: Tensor, sigma: Tensor | float) -> Solution:  # (B, 1, H, W), a number or (B,)
        """The solution for pictures as they are, without a margin.

        Args:
            y: noisy pictures of one channel.
            sigma: standard deviation of the noise, in units of the pictures, whose range is 1.

        Returns:
            `Solution`, its value like y.
        """
        return minimize(self.energy, None, y, noise_level(y, sigma), solver=self.solver, termination=self.termination,
                        adjoint=self.adjoint, on_failure=self.on_failure)  # fmt: skip

    def forward(self, y: Tensor, sigma: Tensor | float) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        flat, level = y.flatten(0, 1)[:, None], noise_level(y, sigma).repeat_interleave(y.shape[1])
        return cropped(self.solve(padded(flat, self.margin), level).value, self.margin).reshape(y.shape)

    @property
    def margin(self) -> int:
        """Pixels that are mirrored at each side."""
        return self.energy.prior.margin

    def with_termination(self, termination: Termination) -> "Denoiser":
        """The same denoiser, its weights shared, with other tolerances."""
        return Denoiser(self.energy.prior, solver=self.solver, termination=termination, adjoint=self.adjoint,
                        on_failure=self.on_failure)  # fmt: skip


def padded(y: Tensor, margin: int) -> Tensor:
    """Mirrored at the border; where a picture is smaller than the margin, its border is repeated."""
    return pad(y, (margin,) * 4, mode="reflect" if margin < min(y.shape[-2:]) else "replicate")


def cropped(x: Tensor, margin: int) -> Tensor:
    """Without the margin."""
    return x[..., margin : x.shape[-2] - margin, margin : x.shape[-1] - margin]
