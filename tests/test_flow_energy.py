"""Optical flow: images and fields, the energy beside closed forms and SciPy, its majorizer, known motions."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch import Tensor
from torch.autograd.functional import hessian
from torch.nn.functional import interpolate

from energynet import HessianBlocks, LaggedWeights, NewtonCG, Termination, gradient, minimize
from energynet.energies import Candidates, FlowCorrection, FlowEnergy, OpticalFlow, flow_to_color, pyramid, warp
from energynet.energies.flow import Charbonnier, census, derivatives, smooth_weights
from energynet.energies.flow_candidates import difference, matches
from energynet.energies.flow_fields import OFFSETS, both_ends, inside, median, positions, resize_flow, visible
from energynet.energies.flow_solver import Effort, lagged_weights
from energynet.testing import check_energy

F64 = torch.float64
EXACT = Termination(atol=1e-10, rtol=1e-10, max_steps=500)


def scene(height: int = 9, width: int = 11, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 1, height, width)
    first, second = torch.rand(shape, generator=generator, dtype=F64), torch.rand(shape, generator=generator, dtype=F64)
    return first, second, torch.randn((batch, 2, height, width), generator=generator, dtype=F64)


def waves(height: int, width: int, flow: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """A picture made of thirty waves in all directions, 6 to 40 pixels long, and the same moved by a constant flow."""
    generator = torch.Generator().manual_seed(5)
    angle, length, phase = torch.rand(3, 30, generator=generator, dtype=F64)
    length, angle = 6 * (40 / 6) ** length, 2 * math.pi * angle
    frequency = 2 * math.pi * torch.stack([torch.cos(angle), torch.sin(angle)]) / length
    rows, columns = torch.meshgrid(torch.arange(height, dtype=F64), torch.arange(width, dtype=F64), indexing="ij")
    x = torch.stack([columns, rows], -1)

    def picture(x: Tensor) -> Tensor:
        return (0.5 + 0.04 * torch.sin(x @ frequency + 6.3 * phase).sum(-1))[None, None]

    return picture(x), picture(x - torch.tensor(flow, dtype=F64))


# Images and fields


def test_a_pyramid_keeps_the_mean_and_ends_with_the_image() -> None:
    image = torch.rand(2, 3, 64, 96, dtype=F64)
    levels = pyramid(image, smallest=8)
    assert [tuple(level.shape[-2:]) for level in levels] == [(8, 12), (16, 24), (32, 48), (64, 96)]
    assert levels[-1] is image
    flat = pyramid(torch.full((1, 1, 37, 50), 0.7, dtype=F64))
    assert all(torch.allclose(level, torch.tensor(0.7, dtype=F64)) for level in flat)


def test_warping_by_whole_pixels_moves_them() -> None:
    image = torch.rand(1, 2, 8, 9, dtype=F64)
    moved = warp(image, torch.tensor([2.0, -1.0], dtype=F64).reshape(1, 2, 1, 1).expand(1, 2, 8, 9))
    torch.testing.assert_close(moved[..., 1:, :-2], image[..., :-1, 2:])
    with pytest.raises(ValueError, match=r"\(1, 2, 8, 9\) and \(1, 2, 8, 8\)"):
        warp(image, torch.zeros(1, 2, 8, 8, dtype=F64))


def test_warping_is_differentiable() -> None:
    image = torch.rand(1, 1, 6, 7, dtype=F64, requires_grad=True)
    flow = 0.3 * torch.randn(1, 2, 6, 7, dtype=F64) + 0.07
    assert torch.autograd.gradcheck(warp, (image, flow.requires_grad_()))


def test_a_flow_is_resized_with_its_units() -> None:
    flow = torch.ones(1, 2, 6, 8, dtype=F64)
    larger = resize_flow(flow, (12, 20))
    torch.testing.assert_close(larger[:, 0], torch.full((1, 12, 20), 2.5, dtype=F64))
    torch.testing.assert_close(larger[:, 1], torch.full((1, 12, 20), 2.0, dtype=F64))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_median_is_that_of_scipy(size: int) -> None:
    flow = torch.randn(2, 2, 13, 9, dtype=F64)
    expected = median_filter(flow.numpy(), (1, 1, size, size), mode="nearest")
    np.testing.assert_array_equal(median(flow, size).numpy(), expected)


def test_pixels_that_come_back_are_visible() -> None:
    flow = torch.zeros(1, 2, 5, 8, dtype=F64)
    flow[:, 0] = 3.0
    back = -flow
    assert visible(flow, back)[..., :5].all() and inside(flow)[..., :5].all() and not inside(flow)[..., 5:].any()
    back[..., 4] = 0.0  # what the pixels of column 1 meet there does not come back
    assert visible(flow, back)[0, 0, 0].tolist() == [True, False, True, True, True, True, True, True]
    assert positions(flow)[0, :, 2, 3].tolist() == [6.0, 2.0]


def test_colors_show_direction_and_length() -> None:
    right, left = torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4)
    right[:, 0], left[:, 0] = 1.0, -1.0
    colors = flow_to_color(torch.stack([right[0], left[0], 0 * right[0]]), largest=1.0)
    assert colors.shape == (3, 3, 4, 4) and colors.min() >= 0 and colors.max() <= 1
    assert colors[0, 0, 0, 0] == 1 and colors[0, 1:, 0, 0].max() < 0.1  # red
    assert colors[1, 0, 0, 0] < 0.1  # its complement
    assert (colors[2] == 1).all()  # white: no motion
    assert torch.equal(flow_to_color(right), flow_to_color(5 * right))  # in units of the longest


# Parts of the energy


def test_derivatives_are_exact_for_polynomials() -> None:
    rows, columns = torch.meshgrid(torch.arange(9, dtype=F64), torch.arange(10, dtype=F64), indexing="ij")
    x, y = derivatives((columns**3 * rows + rows**4)[None, None])
    torch.testing.assert_close(x[0, 0, 2:-2, 2:-2], (3 * columns**2 * rows)[2:-2, 2:-2])
    torch.testing.assert_close(y[0, 0, 2:-2, 2:-2], (columns**3 + 4 * rows**3)[2:-2, 2:-2])


def test_the_census_hardly_sees_brightness() -> None:
    image = torch.rand(1, 1, 7, 8, dtype=F64)
    torch.testing.assert_close(census(image), census(image + 0.3))
    spot = torch.zeros(1, 1, 3, 3, dtype=F64)
    spot[..., 1, 1] = 0.02
    torch.testing.assert_close(census(spot)[0, :, 1, 1], torch.full((8,), -math.sqrt(0.5), dtype=F64))


def test_the_potential_is_a_square_at_zero_and_its_slope_is_its_derivative() -> None:
    t = torch.linspace(0, 3, 7, dtype=F64, requires_grad=True)
    for exponent in (0.3, 0.5, 1.0):
        potential = Charbonnier(0.2, exponent)
        torch.testing.assert_close(torch.autograd.grad(potential(t).sum(), t)[0], 0.5 * potential.slope(t))
        assert float(potential(t.detach())[0]) == 0
    torch.testing.assert_close(Charbonnier(0.2, 1.0)(t), 0.5 * t)


def test_each_pair_of_neighbors_counts_once() -> None:
    image = torch.arange(12, dtype=F64).reshape(1, 1, 3, 4)
    pairs = {(int(a), int(b)) for offset in OFFSETS for a, b in zip(*(end.flatten() for end in both_ends(image, offset)))}
    assert len(pairs) == 3 * 3 + 2 * 4 + 2 * 2 * 3  # beside, below, both diagonals
    weights = smooth_weights(torch.zeros(1, 1, 3, 4, dtype=F64), 10.0)
    torch.testing.assert_close(weights.flatten(2).amax(-1)[0], torch.tensor([1, 1, 0.5**0.5, 0.5**0.5], dtype=F64))


# The energy


def dense(energy: FlowEnergy, context: tuple[Tensor, ...]) -> Tensor:
    """The minimizer of a quadratic energy, from its Hessian."""
    around = context[2]
    zero = torch.zeros_like(around[:1])
    answers = []
    for k in range(len(around)):
        one = [t[k : k + 1] for t in context]
        H = hessian(lambda w, one=one: energy(w, *one).sum(), zero).reshape(zero.numel(), zero.numel())
        answers.append(torch.linalg.solve(H, -gradient(energy, zero, *one).flatten()).reshape(zero.shape))
    return torch.cat(answers)


def test_horn_and_schunck_is_a_linear_system() -> None:
    context = scene(5, 6)
    energy = FlowEnergy.horn_schunck(0.3, ridge=1e-2).double()
    expected = dense(energy, context)
    found = minimize(energy, None, *context, solver=NewtonCG(), termination=EXACT).value
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    code = energy.encode(*context)
    lagged = lagged_weights(energy, context[2], code, 1, 100)  # the weights of squares do not change
    torch.testing.assert_close(lagged, expected, rtol=1e-7, atol=1e-8)


def test_horn_and_schunck_find_the_normal_flow_of_a_ramp() -> None:
    """A ramp of slope (a, b) whose brightness changes by t: w = −t (a, b) / (a² + b² + ρ) everywhere."""
    a, b, t, ridge = 0.03, 0.04, 0.02, 1e-4
    energy = FlowEnergy.horn_schunck(1.0, ridge=ridge).double()
    shape = (1, 1, 6, 7)
    tensor = torch.tensor([a * a, a * b, b * b, a * t, b * t, t * t], dtype=F64).reshape(1, 6, 1, 1).expand(1, 6, *shape[2:])
    flat = torch.zeros(shape, dtype=F64)
    code = flat.expand(1, 2, *shape[2:]), tensor, flat + 1, smooth_weights(flat, 0.0)
    found = energy.majorizer(code[0], *code).minimizer(code[0], 200)
    expected = -t / (a * a + b * b + ridge) * torch.tensor([a, b], dtype=F64)
    torch.testing.assert_close(found, expected.reshape(1, 2, 1, 1).expand_as(found), rtol=1e-10, atol=0)


def test_the_motion_tensor_is_the_squared_difference_of_features() -> None:
    first, second, around = scene()
    energy = FlowEnergy(census=1.0, gradient=2.0, brightness=3.0).double()
    _, tensor, _, _ = energy.encode(first, second, around)
    one, two = energy.features(first), energy.features(warp(second, around))
    torch.testing.assert_close(tensor[:, 5], (two - one).square().sum(1))
    assert one.shape[1] == 8 + 2 + 1


def test_the_majorizer_touches_the_energy_and_lies_above_it() -> None:
    context = scene()
    energy = FlowEnergy().double()
    code, at = energy.encode(*context), context[2] + 0.3
    quadratic = energy.majorizer(at, *code)
    slope = quadratic.product(at) - quadratic.right()
    torch.testing.assert_close(slope, gradient(energy, at, *context))

    def above(p: Tensor) -> Tensor:
        return energy(at, *context) + (slope * p).sum((1, 2, 3)) + 0.5 * (p * quadratic.product(p)).sum((1, 2, 3))

    torch.testing.assert_close(gradient(quadratic, at), slope)
    for length in (0.01, 1.0, 100.0):
        p = length * torch.randn(at.shape, dtype=F64)
        assert (above(p) >= energy(at + p, *context) - 1e-9).all()


def test_the_blocks_are_those_of_the_majorizer() -> None:
    context = scene(4, 5, batch=1)
    energy = FlowEnergy().double()
    code = energy.encode(*context)
    quadratic = energy.majorizer(context[2], *code)
    H = torch.stack([quadratic.product(e.reshape(1, 2, 4, 5)).flatten() for e in torch.eye(40, dtype=F64)]).reshape(2, 20, 2, 20)
    blocks = torch.stack([H[:, k, :, k] for k in range(20)])  # (20, 2, 2)
    torch.testing.assert_close(quadratic.hessian_blocks(context[2]).flatten(3)[0].movedim(-1, 0), blocks)
    p = torch.randn(1, 2, 4, 5, dtype=F64)
    expected = torch.linalg.solve(blocks, p.reshape(2, 20).T).T.reshape(1, 2, 4, 5)
    torch.testing.assert_close(quadratic.inverse_blocks(p), expected)


def test_lagged_weights_find_the_minimizer_that_newton_finds() -> None:
    context = scene(5, 6)
    energy = FlowEnergy(data_exponent=0.5, smooth_exponent=0.5, smooth_scale=0.3, ridge=0.1).double()
    expected = minimize(energy, None, *context, solver=NewtonCG(), termination=EXACT).value
    found = lagged_weights(energy, context[2], energy.encode(*context), 60, 20)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    solver = LaggedWeights(preconditioner=HessianBlocks())
    found = minimize(energy, None, *context, solver=solver, termination=EXACT).value
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_every_round_lowers_the_energy() -> None:
    context = scene(seed=3)
    energy = FlowEnergy().double()
    code, flow = energy.encode(*context), context[2]
    for _ in range(5):
        lower = lagged_weights(energy, flow, code, 1, 3)
        assert (energy(lower, *context) < energy(flow, *context)).all()
        flow = lower


def test_derivatives_of_the_minimizer_are_those_of_finite_differences() -> None:
    first, second, around = scene(3, 3, batch=1)
    energy = FlowEnergy(data_exponent=0.5, smooth_exponent=0.5, ridge=0.05).double()
    weights = torch.rand(2, 5, 3, 3, dtype=F64)  # of the data and of the four neighbors; a direction to go

    def answer(weights: Tensor) -> Tensor:
        context = first, second, around, weights[None, :1], weights[None, 1:]
        return minimize(energy, None, *context, solver=NewtonCG(), termination=EXACT).value.square().sum()

    given = weights[0].clone().requires_grad_()
    slope = (torch.autograd.grad(answer(given), given)[0] * weights[1]).sum()
    h = 1e-4
    expected = (answer(weights[0] + h * weights[1]) - answer(weights[0] - h * weights[1])) / (2 * h)
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-5, atol=0)


def test_an_untrained_correction_changes_nothing_and_learns() -> None:
    first, second, around = scene()
    energy = FlowEnergy(correction=FlowCorrection(4)).double()
    torch.testing.assert_close(energy(around, first, second, around), FlowEnergy().double()(around, first, second, around))
    energy(around + 1, first, second, around).sum().backward()
    last = energy.correction.layers[-1]
    assert last.weight.grad.abs().sum() > 0
    with torch.no_grad():
        last.weight[0].normal_()  # where the data count more
    plain, corrected = FlowEnergy().double().encode(first, second, around), energy.encode(first, second, around)
    log_factor = (corrected[2] / plain[2])[plain[2] > 0].log()
    assert 0 < float(log_factor.detach().abs().max()) < 3
    torch.testing.assert_close(corrected[3], plain[3])


def test_the_energy_is_one_per_sample_and_fit_for_solving() -> None:
    first, second, around = scene()
    report = check_energy(FlowEnergy().double(), around, first, second, around)
    assert report.samples == 2 and report.batch_leak == 0


def test_frames_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 16, 16\), \(1, 1, 16, 17\)"):
        FlowEnergy()(torch.zeros(1, 2, 16, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 17), torch.zeros(1, 2, 16, 16))
    with pytest.raises(ValueError, match=r"one shape"):
        OpticalFlow(FlowEnergy())(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 17))
    no_feature = {"census": 0.0, "gradient": 0.0}
    for wrong in ({"smoothness": 0.0}, {"data_exponent": 1.5}, {"ridge": -1.0}, {"data_scale": 0.0}, no_feature):
        with pytest.raises(ValueError):
            FlowEnergy(**wrong)


# The whole


@pytest.mark.parametrize("motion", [(1.3, -0.6), (5.0, 3.0)])
def test_a_constant_motion_is_found(motion: tuple[float, float]) -> None:
    first, second = waves(64, 80, motion)
    flow = OpticalFlow(FlowEnergy().double())(first, second)
    error = (flow[0] - torch.tensor(motion, dtype=F64)[:, None, None])[:, 12:-12, 12:-12]
    assert float(error.abs().mean()) < 0.03


def test_pairs_do_not_disturb_each_other() -> None:
    both = [waves(32, 40, motion) for motion in ((1.0, 0.0), (0.0, -2.0))]
    model = OpticalFlow(FlowEnergy().double(), Effort(warps=2, outer=2, inner=5))
    together = model(*(torch.cat(frames) for frames in zip(*both)))
    for k, frames in enumerate(both):
        torch.testing.assert_close(together[k : k + 1], model(*frames))


def test_what_leaves_the_frame_is_not_visible_and_levels_are_told() -> None:
    first, second = waves(48, 64, (3.0, 0.0))
    told: list[tuple[int, int]] = []
    estimate = OpticalFlow(FlowEnergy().double()).estimate(first, second, lambda level, levels: told.append((level, levels)))
    assert told == [(1, 2), (2, 2)]
    torch.testing.assert_close(estimate.back[..., 16:-16, 16:-16], -estimate.flow[..., 16:-16, 16:-16], atol=0.5, rtol=0)
    assert estimate.visible[..., 16:-16, 16:-16].double().mean() > 0.95


# Long motions


def test_matches_are_those_of_a_search_by_hand() -> None:
    first, second = torch.rand(2, 2, 3, 7, 8, generator=torch.Generator().manual_seed(2), dtype=F64)
    found, cost = matches(first, second, (2, 1), window=1)
    for one, other, flows, costs in ((first, second, found[:2], cost[:2]), (second, first, found[2:], cost[2:])):
        for b in range(2):
            for i in range(7):
                for j in range(8):
                    away = {
                        (x, y): float((one[b, :, i, j] - other[b, :, i + y, j + x]).abs().mean().clamp(max=0.6))
                        for y in range(-2, 3) for x in range(-1, 2) if 0 <= i + y < 7 and 0 <= j + x < 8
                    }  # fmt: skip
                    assert float(costs[b, 0, i, j]) == pytest.approx(min(away.values()), abs=1e-15)
                    assert away[tuple(flows[b, :, i, j].int().tolist())] == pytest.approx(min(away.values()), abs=1e-15)


def test_differences_are_means_over_a_window() -> None:
    one = torch.zeros(1, 1, 5, 5)
    other = one.clone()
    other[..., 2, 2] = 0.45
    torch.testing.assert_close(difference(one, other, 3)[0, 0, 1:4, 1:4], torch.full((3, 3), 0.05))


def moving_square(height: int = 96, width: int = 128, shift: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """A textured square of 14 pixels that moves to the right by more than its size, before a still background."""
    generator = torch.Generator().manual_seed(1)
    ground, square = (
        interpolate(torch.rand(1, 1, *(-(-side // 3) for side in size), generator=generator), size=size, mode="bicubic")
        for size in ((height, width), (14, 14))
    )
    first, second = ground.clone(), ground.clone()
    first[..., 40:54, 30:44] = square
    second[..., 40:54, 30 + shift : 44 + shift] = square
    true = torch.zeros(1, 2, height, width)
    true[:, 0, 40:54, 30:44] = shift
    return first, second, true


def test_a_small_object_that_moves_by_more_than_its_size_is_found() -> None:
    first, second, true = moving_square()
    inner = (..., slice(43, 51), slice(33, 41))
    with_, without = (
        OpticalFlow(FlowEnergy(), Effort(candidates=candidates))(first, second) for candidates in (Candidates(), None)
    )
    assert (with_ - true)[inner].norm(dim=1).mean() < 1e-3
    assert (without - true)[inner].norm(dim=1).mean() > 10
    assert (with_ - true).norm(dim=1).median() < 0.05


def test_candidates_leave_a_right_flow_alone_and_levels_that_are_not_searched() -> None:
    first, second, true = moving_square()
    frames, back = torch.cat([first, second]), torch.zeros_like(true)
    back[:, 0, 40:54, 45:59] = -15
    seen = torch.cat([true, back])
    found = Candidates().better(frames, seen)
    assert ((found - seen).norm(dim=1) > 0).double().mean() < 0.02  # hidden pixels only
    fine = torch.zeros(2, 2, 160, 160)
    assert Candidates().better(torch.rand(2, 1, 160, 160), fine) is fine


def test_a_candidate_from_which_the_search_does_not_lead_back_is_not_taken() -> None:
    first, second, _ = moving_square()
    first[..., 40:54, 60:74] = first[..., 40:54, 30:44]  # two squares, of which the second frame shows one
    found = Candidates().better(torch.cat([first, second]), torch.zeros(2, 2, 96, 128))
    left, right = (found[0, 0, 45:49, columns : columns + 4].abs().amax() for columns in (35, 65))
    assert {float(left), float(right)} == {0.0, 15.0}


@pytest.mark.parametrize("wrong", [{"reach": 0.0}, {"window": 4}, {"ratio": 1.5}, {"margin": -0.1}])
def test_wrong_numbers_of_candidates_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="reach must lie"):
        Candidates(**wrong)  # type: ignore[arg-type]
