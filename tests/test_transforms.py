"""Every transform of torch.func and forward-mode AD, alone and composed, on minimize, fixed_point and layers."""

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import TIGHT, Contraction, LogCosh, newton_fixed_point, newton_minimum, some_context
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from energynet import FPI_GD, FPI_NN, Anderson, Solution, UnrolledAdjoint, minimize

N = 4


def _minimum() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    energy = LogCosh()
    layer = FPI_GD(energy, energy.step_size, termination=TIGHT)
    return layer, lambda z: newton_minimum(energy, torch.zeros(N, dtype=z.dtype), z)


def _network() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    network = Contraction(rate=0.4)
    layer = FPI_NN(network, start=lambda z: z.new_zeros(z.shape[0], N), termination=TIGHT)
    return layer, lambda z: newton_fixed_point(network, torch.zeros(N, dtype=z.dtype), z)


@pytest.fixture(params=[_minimum, _network], ids=["FPI_GD", "FPI_NN"])
def pair(request: pytest.FixtureRequest) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """One sample z (3,) -> x (4,): ours and the dense reference."""
    layer, reference = request.param()
    return (lambda z: layer(z[None])[0]), reference


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


Z = some_context()


def loss(solve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda z: (solve(z) ** 3).sum()


TRANSFORMS = {
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "grad": lambda f: grad(loss(f)),
    "hessian": lambda f: hessian(loss(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(loss(f))),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(loss(f))),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(loss(f))),
    "jacfwd(hessian)": lambda f: jacfwd(hessian(loss(f))),
}


SLOW = {"jacfwd(jacfwd)", "jacfwd(hessian)"}
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TRANSFORMS]


@pytest.mark.parametrize("name", EACH)
def test_transforms_of_one_sample(pair: tuple, name: str) -> None:
    ours, reference = pair
    same(TRANSFORMS[name](ours)(Z[0]), TRANSFORMS[name](reference)(Z[0]))


@pytest.mark.parametrize("name", ["grad", "hessian", pytest.param("jacfwd(jacfwd)", marks=pytest.mark.slow)])
def test_vmap_of_transforms(pair: tuple, name: str) -> None:
    ours, reference = pair
    expected = torch.stack([TRANSFORMS[name](reference)(z) for z in Z])
    same(vmap(TRANSFORMS[name](ours))(Z), expected)


def test_vmap_and_grad_of_vmap(pair: tuple) -> None:
    ours, reference = pair
    same(vmap(ours)(Z), torch.stack([reference(z) for z in Z]))
    same(grad(lambda z: vmap(loss(ours))(z).sum())(Z), torch.stack([grad(loss(reference))(z) for z in Z]))


def test_nested_vmap_over_other_dimensions(pair: tuple) -> None:
    ours, _ = pair
    z = torch.randn(3, 2, 2, dtype=torch.float64)  # the context in the middle of nowhere
    got = vmap(vmap(ours, in_dims=1, out_dims=1), in_dims=2)(z)
    expected = torch.stack([torch.stack([ours(z[:, i, j]) for i in range(2)], 1) for j in range(2)])
    same(got, expected)


def test_vjp_and_jvp_agree(pair: tuple) -> None:
    ours, reference = pair
    tangent, cotangent = torch.randn(3, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    _, push = jvp(ours, (Z[0],), (tangent,))
    same(push, jvp(reference, (Z[0],), (tangent,))[1])
    same((vjp(ours, Z[0])[1](cotangent)[0] * tangent).sum(), (push * cotangent).sum())


def test_dual_numbers(pair: tuple) -> None:
    ours, reference = pair
    tangent = torch.randn(3, dtype=torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.unpack_dual(ours(forward_ad.make_dual(Z[0], tangent)))
        same(x.tangent, jacrev(reference)(Z[0]) @ tangent)


def test_dual_numbers_through_a_backward(pair: tuple) -> None:
    ours, reference = pair
    tangent = torch.randn(3, dtype=torch.float64)
    expected = hessian(loss(reference))(Z[0]) @ tangent
    with forward_ad.dual_level():
        z = forward_ad.make_dual(Z[0].clone().requires_grad_(), tangent)
        (gradient,) = torch.autograd.grad(loss(ours)(z), z, create_graph=True)
        same(forward_ad.unpack_dual(gradient).tangent, expected)


def test_functional_call_and_per_sample_gradients() -> None:
    layer, _ = _minimum()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def sample_loss(parameters: dict[str, Tensor], z: Tensor) -> Tensor:
        return functional_call(layer, parameters, (z[None],)).square().sum()

    got = vmap(grad(sample_loss), in_dims=(None, 0))(parameters, Z)
    for i, z in enumerate(Z):
        expected = torch.autograd.grad(layer(z[None]).square().sum(), list(layer.parameters()))
        for name, e in zip(parameters, expected, strict=True):
            same(got[name][i], e)


def test_ensembles_map_over_parameters() -> None:
    layer, _ = _minimum()
    parameters = {name: torch.stack([p.detach(), 1.1 * p.detach()]) for name, p in layer.named_parameters()}
    got = vmap(lambda p: functional_call(layer, p, (Z,)))(parameters)
    for i in range(2):
        same(got[i], functional_call(layer, {k: p[i] for k, p in parameters.items()}, (Z,)))


def test_vmap_over_step_sizes_and_starts() -> None:
    def solve(gamma: Tensor, x0: Tensor) -> Tensor:
        return minimize(lambda x: (x - 3).square().sum(), x0, step_size=gamma, termination=TIGHT).value

    x = vmap(solve)(torch.tensor([0.1, 0.4], dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    same(x, torch.full((2, 3), 3.0, dtype=torch.float64))


def test_a_solution_leaves_vmap() -> None:
    layer, _ = _minimum()
    solution = vmap(lambda z: layer.solve(z[None]))(Z)
    assert isinstance(solution, Solution)
    assert solution.status.shape == (2, 1)
    assert bool(solution.converged.all())


@pytest.mark.slow
def test_unrolled_under_transforms() -> None:
    energy = LogCosh(n=2, m=3)
    layer = FPI_GD(energy, energy.step_size, solver=Anderson(3), termination=TIGHT, adjoint=UnrolledAdjoint())
    capped = FPI_GD(energy, energy.step_size, termination=type(TIGHT)(1e-9, 1e-9, 60), adjoint=UnrolledAdjoint())
    reference = lambda z: newton_minimum(energy, torch.zeros(2, dtype=z.dtype), z)  # noqa: E731
    torch.testing.assert_close(hessian(lambda z: layer(z[None]).sum())(Z[0]), hessian(lambda z: reference(z).sum())(Z[0]),
                               rtol=1e-6, atol=1e-8)  # fmt: skip
    expected = torch.stack([jacrev(reference)(z) for z in Z])
    torch.testing.assert_close(vmap(jacrev(lambda z: capped(z[None])[0]))(Z), expected, rtol=1e-6, atol=1e-8)


def test_batched_gradients_of_autograd() -> None:
    layer, _ = _minimum()
    z = Z.clone().requires_grad_()
    vectorized = torch.autograd.functional.jacobian(layer, z, vectorize=True)
    same(vectorized, torch.autograd.functional.jacobian(layer, z))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's own, about what it cannot trace
def test_compile_around_a_training_step() -> None:
    layer, _ = _minimum()
    head = nn.Linear(N, 1).double()
    parameters = [*layer.parameters(), *head.parameters()]

    def gradients(step: Callable[[Tensor], Tensor]) -> list[Tensor]:
        for p in parameters:
            p.grad = None
        step(Z)
        return [p.grad.clone() for p in parameters if p.grad is not None]

    def step(z: Tensor) -> Tensor:
        loss = head(layer(z)).square().sum()
        loss.backward()
        return loss

    expected = gradients(step)
    assert len(expected) == len(parameters)
    for g, e in zip(gradients(torch.compile(step)), expected, strict=True):
        same(g, e)


def test_a_compiled_energy_is_taken_as_the_module_it_wraps() -> None:
    energy = LogCosh()
    compiled = FPI_GD(torch.compile(energy), energy.step_size, start=energy.start, termination=TIGHT)
    got = torch.autograd.grad(compiled(Z).sum(), energy.A)[0]
    same(got, torch.autograd.grad(FPI_GD(energy, energy.step_size, termination=TIGHT)(Z).sum(), energy.A)[0])


@pytest.mark.parametrize("make", [FPI_GD, FPI_NN], ids=["FPI_GD", "FPI_NN"])
def test_vectorized_functional_derivatives_in_forward_mode(make: type) -> None:
    """``torch.autograd.functional`` with ``vectorize=True`` hides a dimension in tangents, by an older vmap."""
    energy = lambda x, z: (x - z**2).cosh().sum(-1) + 0.5 * x.square().sum(-1)  # noqa: E731
    layer = make(energy if make is FPI_GD else lambda x, z: 0.5 * x.sin() + z**2, start=torch.zeros_like, termination=TIGHT)
    functional, z = torch.autograd.functional, torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    expected = torch.func.jacrev(layer)(z)
    torch.testing.assert_close(functional.jacobian(layer, z, strategy="forward-mode", vectorize=True), expected)
    total = lambda z: layer(z).sum()  # noqa: E731
    found = functional.hessian(total, z, outer_jacobian_strategy="forward-mode", vectorize=True).detach()
    torch.testing.assert_close(found, torch.func.hessian(total)(z), rtol=1e-7, atol=1e-9)
