"""Filter banks against conv2d, and the image energy: its bounds, its symmetry, its minimizer and its derivatives."""

import math
from typing import Any

import pytest
import torch
from compiling import records
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import TIGHT
from torch import Tensor
from torch.nn.functional import conv2d, pad

from energynet import FPI_GD, Compiled, Picard, minimize
from energynet.energies import Boundary, BoundedFilters, ImageEnergy, cosine_filters, filter_bank, largest_response
from energynet.testing import check_energy

DOUBLE = torch.float64
BOUNDED = [Boundary.INSIDE, Boundary.ZERO, Boundary.PERIODIC, Boundary.REFLECT, Boundary.REPLICATE]


def reference(x: Tensor, weight: Tensor, boundary: Boundary) -> Tensor:
    margin = (weight.shape[-1] // 2,) * 4
    return conv2d(x if boundary is Boundary.INSIDE else pad(x, margin, mode=boundary.value), weight)


def image_energy(boundary: Boundary = Boundary.REFLECT, channels: int = 1, concavity: float = 0.0, seed: int = 0,
                 strength: float = 8.0) -> ImageEnergy:  # fmt: skip
    torch.manual_seed(seed)
    energy = ImageEnergy(channels, num_filters=4, size=3, strength=strength, concavity=concavity, boundary=boundary).to(DOUBLE)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.copy_(3 * torch.randn_like(parameter))
        energy.log_scale.copy_(0.3 * torch.randn_like(energy.log_scale) - 2)
    return energy


def hessian(energy: ImageEnergy, x: Tensor, *context: Tensor) -> Tensor:  # (C, H, W) -> (n, n)
    flat = torch.func.hessian(lambda v: energy(v.reshape(1, *x.shape), *context)[0])(x.flatten())
    return flat.detach()


@pytest.mark.parametrize("boundary", Boundary)
@pytest.mark.parametrize("channels, size", [(1, 3), (3, 5), (2, 7)])
def test_filter_bank_is_conv2d_with_its_derivatives(boundary: Boundary, channels: int, size: int) -> None:
    x = torch.randn(2, channels, 9, 8, dtype=DOUBLE, requires_grad=True)
    weight = (torch.randn(4, channels, size, size, dtype=DOUBLE) / size**2).requires_grad_()
    results = []
    for bank in (filter_bank, reference):
        value = bank(x, weight, boundary)
        first = torch.autograd.grad(value.sin().sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight), create_graph=True)
        third = torch.autograd.grad(sum((0.1 * g).cos().sum() for g in second), (x, weight))
        results.append([value, *first, *second, *third])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("boundary", Boundary)
def test_filter_bank_under_torch_func(boundary: Boundary) -> None:
    x, v = torch.randn(2, 3, 2, 6, 7, dtype=DOUBLE)
    weight, tangent = torch.randn(2, 4, 2, 3, 3, dtype=DOUBLE)
    value, push = torch.func.jvp(lambda x, w: filter_bank(x, w, boundary), (x, weight), (v, tangent))
    torch.testing.assert_close(value, reference(x, weight, boundary))
    torch.testing.assert_close(push, reference(v, weight, boundary) + reference(x, tangent, boundary))
    many = torch.func.vmap(lambda x: torch.func.grad(lambda x: filter_bank(x[None], weight, boundary).sin().sum())(x))(x)
    a = x.requires_grad_()
    torch.testing.assert_close(many, torch.autograd.grad(reference(a, weight, boundary).sin().sum(), a)[0])
    weights = torch.stack([weight, tangent])
    both = torch.func.vmap(lambda w: filter_bank(x, w, boundary))(weights)
    torch.testing.assert_close(both, torch.stack([reference(x, w, boundary) for w in weights]))


@pytest.mark.parametrize(
    "shape, weight_shape, boundary, match",
    [
        ((2, 8, 8), (4, 1, 3, 3), Boundary.ZERO, r"unsqueeze\(1\)"),
        ((2, 3, 8, 8), (4, 1, 3, 3), Boundary.ZERO, "same C"),
        ((2, 1, 8, 8), (4, 1, 4, 4), Boundary.REFLECT, "odd size"),
        ((2, 1, 8, 3), (4, 1, 7, 7), Boundary.REFLECT, "at least 4 × 4"),
        ((2, 1, 8, 4), (4, 1, 5, 5), Boundary.INSIDE, "at least 5 × 5"),
    ],
)
def test_mismatched_shapes_are_refused(shape: tuple, weight_shape: tuple, boundary: Boundary, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        filter_bank(torch.ones(shape), torch.ones(weight_shape), boundary)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 3), size=st.sampled_from([3, 5]), boundary=st.sampled_from(BOUNDED))
def test_bounded_filters_never_lengthen_an_image(seed: int, channels: int, size: int, boundary: Boundary) -> None:
    torch.manual_seed(seed)
    raw = torch.randn(2, channels, size, size, dtype=DOUBLE) * torch.rand(2, 1, size, size) ** 4
    weight = BoundedFilters(boundary)(raw)
    torch.testing.assert_close(weight.mean((2, 3)), torch.zeros(2, channels, dtype=DOUBLE), rtol=0, atol=1e-12)
    basis = torch.eye(channels * 49, dtype=DOUBLE).reshape(-1, channels, 7, 7)
    largest = torch.linalg.matrix_norm(filter_bank(basis, weight, boundary).flatten(1), 2)
    assert 0.15 < largest <= 1 + 1e-9


def test_largest_response_misses_nothing_between_the_samples() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        weight = torch.randn(3, 2, 5, 5, dtype=DOUBLE)
        fine = torch.fft.rfft2(weight, (301, 301)).permute(2, 3, 0, 1)
        largest = torch.linalg.matrix_norm(fine, 2).amax().square()
        assert largest <= largest_response(weight) <= 1.3 * largest


def test_energy_is_what_its_docstring_says() -> None:
    energy = image_energy(Boundary.ZERO, channels=2, concavity=0.5)
    x, y = torch.randn(2, 2, 2, 6, 5, dtype=DOUBLE)
    p = torch.rand(2, 2, 6, 5, dtype=DOUBLE)
    s, strength = energy.log_scale.exp(), 8.0 * torch.sigmoid(energy.raw_strength)
    kappa = 0.5 / strength.clamp(min=0.5) * torch.sigmoid(energy.raw_mixing)

    def huber(t: Tensor, s: Tensor) -> Tensor:
        return s * ((s**2 + t**2).sqrt() - s)

    s, kappa, t = s[:, None, None], kappa[:, None, None], conv2d(x, energy.weight, padding=1)
    regularizer = strength * (huber(t, s) - kappa * huber(t, s / kappa)).sum((1, 2, 3))
    torch.testing.assert_close(energy(x, y, p), 0.5 * (p * (x - y) ** 2).sum((1, 2, 3)) + regularizer)
    weighted = energy(x, y, torch.tensor([0.5, 2.0], dtype=DOUBLE))
    torch.testing.assert_close(weighted - energy(x, y), torch.tensor([-0.25, 0.5]) * (x - y).square().sum((1, 2, 3)))


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10_000), boundary=st.sampled_from(BOUNDED), concavity=st.sampled_from([0.0, 0.9]), spread=st.floats(0, 2)
)
def test_hessian_is_symmetric_and_within_its_bounds(seed: int, boundary: Boundary, concavity: float, spread: float) -> None:
    energy = image_energy(boundary, concavity=concavity, seed=seed)
    x = spread * torch.randn(1, 6, 6, dtype=DOUBLE)
    H = hessian(energy, x, x[None])
    torch.testing.assert_close(H, H.T)
    eigenvalues = torch.linalg.eigvalsh(H)
    assert eigenvalues[0] >= 1 - concavity - 1e-9
    assert eigenvalues[-1] <= 1 + 8.0 + 1e-9
    assert energy.step_size == pytest.approx(2 / (1 - concavity + 1 + 8.0))


@pytest.mark.parametrize("boundary", [Boundary.INSIDE, Boundary.ZERO, Boundary.PERIODIC])
def test_cosines_come_close_to_the_bound(boundary: Boundary) -> None:
    """Where λ = S, the strongest curvature of a flat image is near p + S."""
    energy = ImageEnergy(size=3, num_filters=8, strength=10.0, concavity=0.9, boundary=boundary).to(DOUBLE)
    with torch.no_grad():
        energy.raw_strength.fill_(30.0)
        energy.raw_mixing.fill_(-30.0)
    flat = torch.zeros(1, 9, 9, dtype=DOUBLE)
    assert 9.0 < torch.linalg.eigvalsh(hessian(energy, flat, flat[None]))[-1] - 1 <= 10.0


@pytest.mark.parametrize("raw_strength", [-6.0, -1.0, 30.0])
def test_concavity_has_its_bound_at_every_strength(raw_strength: float) -> None:
    energy = image_energy(Boundary.ZERO, concavity=0.9)
    with torch.no_grad():
        energy.raw_strength.fill_(raw_strength)
        energy.raw_mixing.fill_(30.0)
    _, _, _, factor, mixing = energy.encode(torch.zeros(1, 1, 6, 6, dtype=DOUBLE))
    strength = (factor / energy.log_scale.exp().square())[0].detach()
    torch.testing.assert_close((strength * mixing.detach()).amax(), strength.clamp(max=0.9))


def test_filters_can_be_set_and_begin_as_cosines() -> None:
    energy = ImageEnergy(num_filters=8, size=3, boundary=Boundary.ZERO)
    cosines = cosine_filters(3)
    ratio = energy.weight.detach() / cosines
    torch.testing.assert_close(ratio[cosines.abs() > 1e-3], ratio[0, 0, 0, 0].expand(int((cosines.abs() > 1e-3).sum())))
    flat = cosine_filters(5).flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(24), rtol=0, atol=1e-6)
    assert cosine_filters(3, 2).shape == (16, 2, 3, 3) and not cosine_filters(3, 2)[0::2, 1].any()
    given = 0.1 * torch.randn(8, 1, 3, 3)
    energy.weight = given
    centered = given - given.mean((2, 3), keepdim=True)
    torch.testing.assert_close(energy.weight, centered / largest_response(centered).sqrt())
    kept = energy.weight.detach().clone()
    energy.weight = kept
    torch.testing.assert_close(energy.weight, kept)


def test_each_sample_may_have_its_own_filters() -> None:
    x, weight = torch.randn(3, 2, 6, 7, dtype=DOUBLE), torch.randn(3, 4, 2, 3, 3, dtype=DOUBLE)
    expected = torch.cat([conv2d(one[None], own) for one, own in zip(x, weight)])
    torch.testing.assert_close(filter_bank(x, weight), expected)
    with pytest.raises(ValueError, match="with the same C"):
        filter_bank(x, weight[:2])


def test_concavity_makes_the_regularizer_concave_somewhere() -> None:
    energy = image_energy(Boundary.PERIODIC, concavity=0.9)
    with torch.no_grad():
        energy.raw_mixing.fill_(4.0)
        energy.raw_strength.fill_(4.0)
    x = 3 * torch.randn(1, 6, 6, dtype=DOUBLE)
    assert torch.linalg.eigvalsh(hessian(energy, x, x[None]))[0] < 0.97


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), down=st.integers(-3, 3), across=st.integers(-3, 3))
def test_a_shifted_image_has_the_same_energy_and_a_shifted_minimizer(seed: int, down: int, across: int) -> None:
    energy = image_energy(Boundary.PERIODIC, seed=seed)
    torch.manual_seed(seed)
    x, y = torch.randn(2, 2, 1, 6, 7, dtype=DOUBLE)

    def shifted(t: Tensor) -> Tensor:
        return t.roll((down, across), (2, 3))

    torch.testing.assert_close(energy(shifted(x), shifted(y)), energy(x, y))
    answer = minimize(energy, None, torch.cat([y, shifted(y)]), termination=TIGHT).value
    torch.testing.assert_close(answer[2:], shifted(answer[:2]), rtol=1e-8, atol=1e-8)


def test_away_from_the_border_every_boundary_is_the_same_and_equivariant() -> None:
    x, weight = torch.randn(1, 1, 12, 12, dtype=DOUBLE), torch.randn(3, 1, 3, 3, dtype=DOUBLE)
    inside = filter_bank(x, weight)
    for boundary in BOUNDED[1:]:
        torch.testing.assert_close(filter_bank(x, weight, boundary)[..., 1:-1, 1:-1], inside)
    torch.testing.assert_close(filter_bank(x[..., 2:, 1:], weight), inside[..., 2:, 1:])


@pytest.mark.parametrize("concavity", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_minimizer_and_exact_gradients(concavity: float) -> None:
    energy = image_energy(concavity=concavity, strength=2.0)
    layer = FPI_GD(energy, energy.step_size, termination=TIGHT)
    y = torch.randn(2, 1, 3, 3, dtype=DOUBLE, requires_grad=True)
    p = (0.3 + 0.7 * torch.rand(2, dtype=DOUBLE)).requires_grad_() if not concavity else None
    context = (y,) if p is None else (y, p)
    x = layer(*context)
    slope = torch.func.grad(lambda x: energy(x, *context).sum())(x.detach())
    assert slope.norm() < 1e-9
    assert torch.autograd.gradcheck(layer, context, atol=1e-6, fast_mode=True)

    def of_parameters(*parameters: Tensor) -> Tensor:
        names = [name for name, _ in energy.named_parameters()]
        return torch.func.functional_call(layer, {f"energy.{n}": t for n, t in zip(names, parameters)}, context)

    assert torch.autograd.gradcheck(of_parameters, tuple(energy.parameters()), atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(of_parameters, tuple(energy.parameters()), atol=1e-5, fast_mode=True)


def test_each_image_is_judged_by_itself_and_check_energy_agrees() -> None:
    energy = image_energy(channels=3)
    check_energy(energy, torch.randn(3, 3, 5, 6, dtype=DOUBLE), torch.randn(3, 3, 5, 6, dtype=DOUBLE))


def test_filters_are_learned_through_the_solver() -> None:
    clean = torch.zeros(1, 1, 16, 16)
    clean[..., 4:12, 5:13] = 1.0
    noisy = clean + 0.1 * torch.randn_like(clean)
    energy = ImageEnergy(num_filters=8, size=3, strength=20.0, concavity=0.9)
    layer = FPI_GD(energy, energy.step_size)
    optimizer = torch.optim.Adam(energy.parameters(), lr=0.15)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (layer(noisy) - clean).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.4 * (noisy - clean).square().mean(), losses


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"strength": math.inf}, {"scale": -1.0}, {"concavity": 1.0},
                                     {"concavity": 0.5, "strength": 0.4}, {"concavity": -0.1}])  # fmt: skip
def test_bounds_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        ImageEnergy(**options)


@pytest.mark.parametrize(("options", "match"), [
    ({"num_filters": 0}, "at least one channel"), ({"channels": 0}, "at least one channel"), ({"size": 1}, "odd and at least 3"),
    ({"size": 4, "boundary": Boundary.REFLECT}, "odd and at least 3"),
])  # fmt: skip
def test_filters_that_cannot_be_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ImageEnergy(**options)
    with pytest.raises(ValueError, match=r"2 × 2 and more, got \(2, 1, 1, 1\)"):
        BoundedFilters(Boundary.ZERO)(torch.ones(2, 1, 1, 1))
    x = torch.rand(3, 1, 5, 6)
    assert ImageEnergy(num_filters=2, size=4, boundary=Boundary.INSIDE)(x, x).shape == (3,)


def test_broadcasting_over_other_samples_is_refused() -> None:
    energy = ImageEnergy(num_filters=2, size=3)
    x, y, mask = torch.rand(3, 3, 1, 3, 8)
    for wrong in (y[:, 0], y[0]):
        for solve in (energy, lambda x, *z: minimize(energy, None, *z)):
            with pytest.raises(ValueError, match=r"images \(B, C, H, W\), got y"):
                solve(x, wrong)
    for wrong in (mask[:, 0], mask[0, 0], mask[:, 0, 0, 0][:2], mask[:2]):
        with pytest.raises(ValueError, match=r"one per pixel like y \(3, 1, 3, 8\), got"):
            minimize(energy, None, y, wrong)
    same = torch.full((3,), 0.5)
    for right in (0.5, torch.tensor(0.5), same, same[:1], same[:, None, None, None], torch.full((3, 1, 3, 8), 0.5)):
        torch.testing.assert_close(energy(x, y, right), energy(x, y, 0.5))


@records
def test_compiled_solve_as_eager() -> None:
    energy = image_energy(Boundary.INSIDE)  # the smallest program: the C++ compiler takes minutes on a busy machine
    y = torch.randn(2, 1, 6, 6, dtype=DOUBLE)
    options = {"step_size": energy.step_size, "solver": Picard(), "termination": TIGHT}
    expected = minimize(energy, None, y, **options).value
    got = minimize(energy, None, y, **options, driver=Compiled(strict=True)).value
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
