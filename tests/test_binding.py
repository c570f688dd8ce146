"""Nothing is lost in a closure, and the caller's modules and tensors stay as they are."""

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import TIGHT, LogCosh, some_context
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from energynet import FPI_GD, FPI_NN, GradientStep, ImpureFunctionError, LostGradientError, fixed_point, gradient, minimize
from energynet.engine.binding import Binding

F64 = torch.float64
X0 = torch.zeros(2, 3, dtype=F64)


def quadratic(x: Tensor, w: Tensor) -> Tensor:
    return 0.5 * (x - w).square().sum(-1)


def solve(energy: Callable[..., Tensor], *context: Any) -> Tensor:
    return minimize(energy, X0, *context, step_size=0.5, termination=TIGHT).value


# ------------------------------------------------------------------------------------------------- lost captures


def capturing(w: Tensor) -> Tensor:
    return solve(lambda x: quadratic(x, w)).sum()


W = torch.ones(3, dtype=F64)
CAPTURES = {
    "autograd": lambda: capturing(W.clone().requires_grad_()),
    "autograd, not a leaf": lambda: capturing(2 * W.clone().requires_grad_()),
    "grad": lambda: torch.func.grad(capturing)(W),
    "jacrev": lambda: torch.func.jacrev(capturing)(W),
    "jacfwd": lambda: torch.func.jacfwd(capturing)(W),
    "hessian": lambda: torch.func.hessian(capturing)(W),
    "vmap": lambda: torch.func.vmap(capturing)(torch.stack([W, 2 * W])),
    "vmap of grad": lambda: torch.func.vmap(torch.func.grad(capturing))(torch.stack([W, 2 * W])),
    "jvp": lambda: torch.func.jvp(capturing, (W,), (W,)),
    "module in a closure": lambda: solve(lambda x, m=nn.Linear(3, 1, dtype=F64): m(x).squeeze(-1) ** 2),  # noqa: B008
    "torch.func inside": lambda: torch.func.grad(
        lambda w: solve(lambda x: torch.func.vmap(torch.func.grad(lambda a: (a - w).square().sum()))(x).square().sum(-1)).sum()
    )(W),
}


@pytest.mark.parametrize("how", CAPTURES)
def test_a_lost_capture_raises_and_names_the_remedy(how: str) -> None:
    with pytest.raises(LostGradientError, match="Pass it as context"):
        if how == "module in a closure":
            module = nn.Linear(3, 1, dtype=F64)
            solve(lambda x: module(x).squeeze(-1) ** 2)
        CAPTURES[how]()


def test_a_lost_dual_number_raises() -> None:
    with forward_ad.dual_level(), pytest.raises(LostGradientError, match="tangent"):
        capturing(forward_ad.make_dual(W, W))


def test_captures_of_a_map_and_of_nested_functions() -> None:
    w = W.clone().requires_grad_()

    def inner(x: Tensor) -> Tensor:
        def deeper(x: Tensor) -> Tensor:
            return 0.5 * x + w

        return deeper(x)

    with pytest.raises(LostGradientError, match=r"The map .*inner uses a tensor of shape \(3,\)"):
        fixed_point(inner, X0)
    with pytest.raises(LostGradientError):
        FPI_NN(inner, start=X0)()


def test_captures_without_derivatives_are_allowed() -> None:
    assert capturing(W).item() == pytest.approx(6)  # a constant
    with torch.no_grad():
        assert capturing(W.clone().requires_grad_()).item() == pytest.approx(6)  # no gradient is asked for
    other = 2 * W  # a constant beside a transform
    torch.func.grad(lambda w: solve(lambda x, w: quadratic(x, w + other), w).sum())(W)


class OwnGradient(nn.Module):
    """‖∇f‖² by torch.autograd.grad, with tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(W.clone())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            inner = quadratic(y, self.w + z).sum()
            (slope,) = torch.autograd.grad(inner, y, create_graph=True)
        made = torch.ones(3, dtype=x.dtype, requires_grad=True)
        parameter = nn.Parameter(torch.ones(3, dtype=x.dtype))
        return 0.5 * (slope * made * parameter).square().sum(-1)


def test_autograd_inside_the_energy_works_and_raises_no_alarm() -> None:
    energy, z = OwnGradient(), torch.ones(2, 3, dtype=F64, requires_grad=True)
    x = solve(energy, z)
    got = torch.autograd.grad(x.square().sum(), (z, energy.w))
    torch.testing.assert_close(got[0], 2 * x.detach())
    torch.testing.assert_close(got[1], 4 * torch.ones(3, dtype=F64) * 2)


def test_torch_func_inside_the_energy_raises_no_alarm() -> None:
    def energy(x: Tensor, z: Tensor) -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda a, z: (0.5 * (a - z) ** 2).sum()))(x, z)
        return 0.5 * slope.square().sum(-1)

    z = torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(torch.func.jacrev(lambda z: solve(energy, z).sum())(z), torch.ones_like(z))
    torch.testing.assert_close(torch.func.jacfwd(lambda z: solve(energy, z).sum())(z), torch.ones_like(z))
    w = z.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(solve(energy, w).sum(), w)[0], torch.ones_like(z))


def test_a_solve_inside_an_energy_of_a_solve() -> None:
    """Bilevel in bilevel: min_x ½‖y*(x) − z‖² + ½‖x‖², y* = argmin_y ½‖y − x‖² + ½ y² = x/2."""

    def inner(y: Tensor, x: Tensor) -> Tensor:
        return quadratic(y, x) + 0.5 * y.square().sum(-1)

    def outer(x: Tensor, z: Tensor) -> Tensor:
        y = minimize(inner, torch.zeros_like(x), x, step_size=0.4, termination=TIGHT).value
        return 0.5 * (y - z).square().sum(-1) + 0.5 * x.square().sum(-1)

    z = torch.randn(2, 3, dtype=F64, requires_grad=True)
    x = solve(outer, z)
    torch.testing.assert_close(x.detach(), 0.4 * z.detach())
    torch.testing.assert_close(torch.autograd.grad(x.sum(), z)[0], torch.full_like(z, 0.4))
    hessian = torch.func.hessian(lambda z: solve(outer, z[None].expand(2, 3)).square().sum())(z[0].detach())
    torch.testing.assert_close(hessian, 2 * 2 * 0.16 * torch.eye(3, dtype=F64))


# ------------------------------------------------------------------------------------------------- ways to hold parameters


class Holder(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        return quadratic(x, self.w)

    def method(self, x: Tensor) -> Tensor:
        return self(x)


class Callable_:
    def __init__(self, w: Tensor) -> None:
        self.hidden = {"list": [w]}

    def __call__(self, x: Tensor) -> Tensor:
        return quadratic(x, self.hidden["list"][0])


def in_list(w: Tensor) -> nn.Module:
    module = Holder(torch.zeros(3, dtype=F64))
    module.many = [w]  # type: ignore[assignment]
    module.forward = lambda x: quadratic(x, w)  # type: ignore[method-assign]
    return module


class Unregistered(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.many = [w]

    def forward(self, x: Tensor) -> Tensor:
        return quadratic(x, self.many[0])


class Buffer(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("w", w)

    def forward(self, x: Tensor) -> Tensor:
        return quadratic(x, self.w)


HOLDERS = {
    "parameter": lambda w: Holder(w),
    "non-leaf attribute": lambda w: Holder(1.0 * w),
    "buffer": Buffer,
    "unregistered list": Unregistered,
    "bound method": lambda w: Holder(w).method,
    "callable object": Callable_,
    "partial": lambda w: functools.partial(lambda w, x: quadratic(x, w), w),
    "nested module": lambda w: nn.Sequential(Holder(w)),
    "context": None,
}


@pytest.mark.parametrize("how", HOLDERS)
def test_every_way_to_hold_a_tensor_is_differentiated(how: str) -> None:
    w = nn.Parameter(W.clone())
    x = solve(quadratic, w) if how == "context" else solve(HOLDERS[how](w))
    (got,) = torch.autograd.grad(x.square().sum(), w, create_graph=True)
    torch.testing.assert_close(got.detach(), 4 * W)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), w)[0], torch.full_like(W, 4.0))


def test_a_replaced_forward_that_captures_is_reported() -> None:
    with pytest.raises(LostGradientError):
        solve(in_list(nn.Parameter(W.clone())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"scripted.*Pass the module that was passed to torch.jit.script"):
        solve(torch.jit.script(nn.Sequential(nn.Linear(3, 1, dtype=F64), nn.Flatten(0))))


def test_tied_parameters_collect_both_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Parameter(W.clone())

        def forward(self, x: Tensor) -> Tensor:
            return quadratic(x, self.a * self.b)

    energy = Tied()
    torch.testing.assert_close(torch.autograd.grad(solve(energy).sum(), energy.a)[0], 4 * W)


def test_parametrized_weights_are_computed_once_per_solve_and_differentiated() -> None:
    calls = []

    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            calls.append(1)
            return 2 * w

    energy = Holder(nn.Parameter(W.clone()))
    parametrize.register_parametrization(energy, "w", Double())
    original = energy.parametrizations.w.original
    calls.clear()
    x = solve(energy)
    assert len(calls) == 1
    torch.testing.assert_close(torch.autograd.grad(x.square().sum(), original)[0], 16 * W)
    assert parametrize.is_parametrized(energy)


def test_spectral_norm_matches_the_plain_weight() -> None:
    linear = parametrizations.spectral_norm(nn.Linear(3, 3, dtype=F64)).eval()
    module = nn.Sequential(linear, nn.Tanh())

    class Half(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return 0.5 * self.inner(x) + z

    z = torch.randn(2, 3, dtype=F64)
    x = fixed_point(Half(module), X0, z, termination=TIGHT).value
    (got,) = torch.autograd.grad(x.square().sum(), linear.parametrizations.weight.original)
    weight = linear.parametrizations.weight.original

    def unrolled() -> Tensor:
        x = X0
        for _ in range(100):
            x = Half(module)(x, z)
        return x

    torch.testing.assert_close(got, torch.autograd.grad(unrolled().square().sum(), weight)[0], rtol=1e-8, atol=1e-12)


def test_binding_shares_tensors_and_leaves_the_module_alone() -> None:
    energy = LogCosh()
    before = dict(vars(energy))
    binding = Binding.of(GradientStep(energy, 0.1))
    assert [id(t) for t in binding.tensors] == [id(energy.A), id(energy.W)]
    other = binding.attach([2 * t for t in binding.tensors])
    assert other.energy is not energy and type(other.energy) is LogCosh
    assert other.energy.ridge == energy.ridge and isinstance(energy.A, nn.Parameter)
    assert vars(energy) == before


# ------------------------------------------------------------------------------------------------- functions that are none


def test_random_stateful_and_in_place_functions_are_refused() -> None:
    x = X0 + 1
    keep = x.clone()
    for energy, words in [
        (lambda x: quadratic(x, torch.rand(3, dtype=F64)), "draws random numbers"),
        (lambda x: nn.functional.dropout(x, 0.5).square().sum(-1), "dropout in training mode"),
        (lambda x: nn.functional.batch_norm(x, None, None, training=True).square().sum(-1), "BatchNorm in training mode"),
        (lambda x: x.mul_(2).square().sum(-1), r"in place \(mul_"),
        (lambda x: x[:, 0].sub_(1).square(), "in place"),
        (lambda x: x.__setitem__(0, 0.0) or x.sum(-1), "in place"),
    ]:
        with pytest.raises(ImpureFunctionError, match=words):
            minimize(energy, x, step_size=0.1)
        assert torch.equal(x, keep)
    with pytest.raises(ImpureFunctionError, match="running statistic"):
        minimize(nn.Sequential(nn.BatchNorm1d(3, dtype=F64), nn.Linear(3, 1, dtype=F64), nn.Flatten(0)), x, step_size=0.1)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, dtype=F64), nn.Softplus(), nn.Flatten(0)).eval()
    minimize(lambda x, net=net: x.square().sum(-1), x, step_size=0.1)


@pytest.mark.parametrize("wrong, words", [
    (lambda x: x.square().sum(), None),
    (lambda x: x.square(), r"returned shape \(2, 3\) for x of shape \(2, 3\)"),
    (lambda x: x.square().sum(-1, keepdim=True), r"one scalar per sample"),
    (lambda x: x.square().sum(-1).long(), "no gradient"),
    (lambda x: 3.0, "must return a tensor"),
    (lambda x: x.detach().square().sum(-1), "does not depend on x"),
    (lambda x: torch.ones(2), "does not depend on x"),
])  # fmt: skip
def test_wrong_energies_are_refused_with_shapes(wrong: Callable[[Tensor], Any], words: str | None) -> None:
    if words is None:
        assert minimize(wrong, X0 + 1, step_size=0.2, batch_dims=0).status.shape == ()  # one problem
        return
    with pytest.raises((TypeError, ValueError), match=words):
        minimize(wrong, X0, step_size=0.1)


def test_wrong_inputs_are_told() -> None:
    energy = lambda x: x.square().sum(-1)  # noqa: E731
    for call, words in [
        (lambda: minimize(energy, torch.zeros(2, 3, dtype=torch.long), step_size=0.1), "floating point"),
        (lambda: minimize(energy, None, step_size=0.1), "x0 must be a tensor"),
        (lambda: minimize(energy, X0, step_size=-1.0), "positive"),
        (lambda: minimize(energy, X0, step_size=torch.ones(5)), r"step_size has shape \(5,\) but x0 has 2 samples"),
        (lambda: fixed_point(lambda x: x[:, :1], X0), r"returned \(2, 1\)"),
        (lambda: fixed_point(lambda x: x, torch.zeros(())), "batch_dims=0"),
        (lambda: fixed_point(lambda x: (x[0],), (X0, torch.zeros(3, 1))), "structure and shapes"),
        (lambda: fixed_point(lambda x: x, (X0, torch.zeros(3, 1))), "same leading batch"),
        (lambda: FPI_GD(energy, 0.1)(), "given no x0 and no start"),
        (lambda: FPI_GD(OnlyEvaluate(), 0.1)(), "does not define an initial point"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            call()


class OnlyEvaluate(LogCosh):
    def start(self, *context: Any) -> Any:
        return super(LogCosh, self).start(*context)


# ------------------------------------------------------------------------------------------------- pytrees and odd contexts

Pair = namedtuple("Pair", "a b")


def test_pytrees_of_every_kind() -> None:
    target = {"u": torch.randn(2, 3, dtype=F64), "v": (torch.randn(2, dtype=F64), Pair(torch.randn(2, 2, 2, dtype=F64), 1.5))}
    x0 = {
        "u": torch.zeros(2, 3, dtype=F64),
        "v": (torch.zeros(2, dtype=F64), Pair(torch.zeros(2, 2, 2, dtype=F64), torch.zeros(2, 0, dtype=F64))),
    }
    for leaf in (target["u"], target["v"][0], target["v"][1].a):
        leaf.requires_grad_()

    def energy(x: Any, t: Any, scale: int, names: list[str], mask: Tensor, index: Tensor) -> Tensor:
        assert names == ["kept"] and isinstance(x["v"][1], Pair)
        far = (x["u"] - t["u"])[:, index].square().sum(-1) + (x["v"][0] - t["v"][0]).square()
        return scale * far + torch.where(mask, 2.0, 1.0) * (x["v"][1].a - t["v"][1].a).flatten(1).square().sum(-1)

    mask, index = torch.tensor([True, False]), torch.tensor([0, 1, 2])
    x = minimize(energy, x0, target, 2, ["kept"], mask, index, step_size=0.1, termination=TIGHT).value
    torch.testing.assert_close(x["v"][1].a, target["v"][1].a)
    loss = x["u"].sum() + 2 * x["v"][0].sum() + 3 * x["v"][1].a.sum()
    got = torch.autograd.grad(loss, (target["u"], target["v"][0], target["v"][1].a))
    for g, factor in zip(got, (1.0, 2.0, 3.0), strict=True):
        torch.testing.assert_close(g, torch.full_like(g, factor))
    g = gradient(energy, x0, target, 2, ["kept"], mask, index)
    assert isinstance(g["v"][1], Pair) and g["u"].shape == (2, 3)


def test_mixed_dtypes_in_a_pytree_are_kept() -> None:
    x0 = (torch.zeros(2, 3), torch.zeros(2, 1, dtype=F64))
    x = minimize(lambda x: (x[0] - 1).square().sum(-1).double() + (x[1] - 2).square().sum(-1), x0, step_size=0.3).value
    assert x[0].dtype == torch.float32 and x[1].dtype == F64


def test_step_size_per_sample_and_zero_gradient_in_it() -> None:
    scale = torch.tensor([1.0, 100.0], dtype=F64)
    gamma = (0.5 / scale).requires_grad_()
    energy = lambda x, c: c * (x - 3).square().sum(-1)  # noqa: E731
    solution = minimize(energy, X0, scale, step_size=gamma, termination=TIGHT)
    torch.testing.assert_close(solution.value, torch.full_like(X0, 3.0))
    assert solution.num_steps.amax() <= 2
    assert not solution.value.requires_grad or torch.autograd.grad(solution.value.sum(), gamma, allow_unused=True)[0] in (None,)


def test_the_callers_tensors_stay_as_they_are() -> None:
    z, x0 = some_context(), torch.zeros(2, 4, dtype=F64)
    energy = LogCosh()
    flags = [(t.requires_grad, t._version, t.grad) for t in (z, x0, energy.A, energy.W)]
    minimize(energy, x0, z, step_size=energy.step_size).value.sum().backward()
    assert [(t.requires_grad, t._version) for t in (z, x0, energy.A, energy.W)] == [f[:2] for f in flags]
    already = minimize(energy, x0, z, step_size=energy.step_size, termination=TIGHT).value.detach()
    again = minimize(energy, already, z, step_size=energy.step_size).value
    assert again.data_ptr() != already.data_ptr()
